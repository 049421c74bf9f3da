"""From a request to its answer, whoever asks: the routes over HTTP, and run-batch without it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from pydantic import BaseModel

from ..request import Request
from .chat import ChatReply
from .completions import CompletionReply
from .errors import ApiError
from .protocol import ChatRequest, CompletionRequest, read
from .reply import Reply
from .runtime import Runtime
from .stream import Stream

_SHAPES: dict[str, type[BaseModel]] = {
    "/v1/chat/completions": ChatRequest,
    "/v1/completions": CompletionRequest,
}


def check_model(runtime: Runtime, name: str | None) -> None:
    """Raises ApiError 404 for a model that is not served; None is whichever there is."""
    if name is not None and not runtime.answers_to(name):
        raise ApiError(404, f"The model {name[:200]!a} does not exist.", param="model")


async def prepare(runtime: Runtime, request: ChatRequest | CompletionRequest) -> Reply:
    """Checks a request and tokenises its prompts. Raises ApiError."""
    check_model(runtime, request.model)
    reply = (
        ChatReply(runtime, request) if isinstance(request, ChatRequest) else CompletionReply(runtime, request)
    )
    await reply.tokenize()
    return reply


async def ended(streams: list[Stream]) -> list[Request]:
    """The requests, once all are done. Raises ApiError if one fails; it takes the others along."""
    try:
        for stream in streams:
            await stream.result()
    except BaseException:
        for stream in streams:
            stream.cancel()
        raise
    return [stream.request for stream in streams if stream.request is not None]


async def answer(runtime: Runtime, url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
    """What POST `url` would give for `body`: the status, and the answer or an error envelope. Names that mean
    nothing here are listed in the answer's "ignored_params"."""
    try:
        if url not in _SHAPES:
            raise ApiError(404, f"there is no {url[:200]!a}", param="url")
        request = read(_SHAPES[url], body)
        if request.stream:
            raise ApiError(400, "there is nothing to stream to", param="stream")
        reply = await prepare(runtime, request)
        whole: dict[str, Any] = await runtime.in_worker(reply.body, await ended(reply.submit()))
    except ApiError as error:
        return error.status, error.body
    if reply.ignored:
        whole["ignored_params"] = reply.ignored
    return 200, whole
