"""The routes of OpenAI's API, in vLLM's dialect. They only pass on: what they do is in answers.py."""

from __future__ import annotations

import asyncio
from typing import Annotated, Any

from fastapi import APIRouter, Body, Request, Response

from .answers import check_model, ended, prepare
from .errors import ApiError
from .params import ignored, ignored_header
from .protocol import (
    ChatAnswer,
    ChatRequest,
    CompletionAnswer,
    CompletionRequest,
    DetokenizeAnswer,
    DetokenizeRequest,
    ErrorEnvelope,
    ModelCard,
    ModelList,
    TokenizeAnswer,
    TokenizeChat,
    TokenizeRequest,
)
from .reply import Reply, dumps
from .runtime import Runtime
from .sse import EventStream, until_gone
from .texts import Texts

router = APIRouter()

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": ErrorEnvelope, "description": "Not valid, or not supported: the message names it."},
    401: {"description": "An API key is needed."},
    404: {"model": ErrorEnvelope, "description": "No such model."},
    429: {"model": ErrorEnvelope, "description": "Too many requests wait. Retry-After: seconds."},
    "4XX": {"model": ErrorEnvelope, "description": "Too large, too slow, or from where it may not come."},
    500: {"model": ErrorEnvelope, "description": "The engine failed."},
    503: {"model": ErrorEnvelope, "description": "Loading, shutting down, or the engine is down."},
}
_STREAM = {"text/event-stream": {"schema": {"type": "string"}}}


@router.get("/v1/models", response_model=ModelList, responses=_REFUSALS)
async def models(request: Request) -> Any:
    runtime: Runtime = request.app.state.runtime
    return {"object": "list", "data": [_card(runtime, name) for name in runtime.names]}


@router.get("/v1/models/{name:path}", response_model=ModelCard, responses=_REFUSALS)
async def model(request: Request, name: str) -> Any:
    runtime: Runtime = request.app.state.runtime
    check_model(runtime, name)
    return _card(runtime, name)


@router.post(
    "/v1/chat/completions",
    response_model=ChatAnswer,
    responses={**_REFUSALS, 200: {"content": _STREAM}},
)
async def chat_completions(request: Request, body: ChatRequest) -> Response:
    return await _respond(request, await prepare(request.app.state.runtime, body))


@router.post(
    "/v1/completions",
    response_model=CompletionAnswer,
    responses={**_REFUSALS, 200: {"content": _STREAM}},
)
async def completions(request: Request, body: CompletionRequest) -> Response:
    return await _respond(request, await prepare(request.app.state.runtime, body))


@router.post("/tokenize", response_model=TokenizeAnswer, responses=_REFUSALS)
async def tokenize(request: Request, body: Annotated[TokenizeRequest, Body()]) -> Response:
    runtime: Runtime = request.app.state.runtime
    check_model(runtime, body.model)
    unknown, texts, most = ignored(body), Texts(runtime), runtime.max_model_len

    def work() -> str:
        if isinstance(body, TokenizeChat):
            ids = texts.encode_chat(body, bool(body.add_special_tokens)).ids
        else:
            ids = texts.encode(body.prompt, body.add_special_tokens is not False).ids
        spelled = texts.spell(ids) if body.return_token_strs else None
        return dumps({"count": len(ids), "max_model_len": most, "tokens": ids, "token_strs": spelled})

    return _json(await runtime.in_worker(work), unknown)


@router.post("/detokenize", response_model=DetokenizeAnswer, responses=_REFUSALS)
async def detokenize(request: Request, body: DetokenizeRequest) -> Response:
    runtime: Runtime = request.app.state.runtime
    check_model(runtime, body.model)
    unknown, texts = ignored(body), Texts(runtime)
    if body.tokens and max(body.tokens) >= (size := runtime.model_config.vocab_size):
        raise ApiError(
            400, f"tokens: {max(body.tokens)} is outside the vocabulary, 0 to {size - 1}", param="tokens"
        )
    text = await runtime.in_worker(texts.decode, body.tokens, False)
    return _json(dumps({"prompt": text}), unknown)


async def _respond(request: Request, reply: Reply) -> Response:
    reply.tenant = request.scope.get("splitfuse.tenant", "")
    streams = reply.submit()
    requests = [stream.request for stream in streams if stream.request is not None]
    if reply.streamed:
        frames = [reply.frames(number, each) for number, each in enumerate(requests)]
        return EventStream(streams, frames, lambda: reply.last_frame(requests), ignored_header(reply.ignored))

    async def watch() -> None:
        await until_gone(request.receive)
        for stream in streams:
            stream.cancel()

    watcher = asyncio.ensure_future(watch())
    try:
        return _json(await reply.runtime.in_worker(reply.text, await ended(streams)), reply.ignored)
    finally:
        watcher.cancel()


def _json(text: str, unknown: list[str]) -> Response:
    return Response(text, media_type="application/json", headers=ignored_header(unknown))


def _card(runtime: Runtime, name: str) -> dict[str, Any]:
    permission = {
        "id": f"modelperm-{runtime.created:x}",
        "object": "model_permission",
        "created": runtime.created,
        "allow_create_engine": False,
        "allow_sampling": True,
        "allow_logprobs": True,
        "allow_search_indices": False,
        "allow_view": True,
        "allow_fine_tuning": False,
        "organization": "*",
        "group": None,
        "is_blocking": False,
    }
    return {
        "id": name,
        "object": "model",
        "created": runtime.created,
        "owned_by": "splitfuse",
        "root": runtime.served.loaded.name,
        "parent": None,
        "max_model_len": runtime.max_model_len,
        "permission": [permission],
    }
