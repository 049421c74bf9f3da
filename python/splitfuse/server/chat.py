"""POST /v1/chat/completions: conversations, and how their answers are written."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from ..request import Completion, Delta, Request, RequestOutput
from .frames import Frames, event
from .logprobs import chat_logprobs, prompt_logprobs
from .protocol import ChatRequest
from .reply import Reply
from .runtime import Runtime
from .texts import Texts, truncate


class ChatReply(Reply):
    id_prefix = "chatcmpl"
    kind = "chat.completion"
    stream_kind = "chat.completion.chunk"

    def __init__(self, runtime: Runtime, request: ChatRequest) -> None:
        super().__init__(runtime, request)
        self._request = request
        self._top = request.top_logprobs or 0
        last = request.messages[-1]
        begins = request.add_generation_prompt
        if begins is None:
            begins = not request.continue_final_message
        self.role = "assistant" if begins else last.role
        """Of the answer: it may go on with what was said last."""
        self.echoed = ""
        """What the answer's text begins with, and the model has not written."""
        if request.echo and last.role == self.role and isinstance(last.content, str):
            self.echoed = last.content

    async def tokenize(self) -> None:
        request, texts = self._request, Texts(self.runtime)
        prompt = await self.runtime.in_worker(texts.encode_chat, request, bool(request.add_special_tokens))
        most = self.runtime.max_model_len - (self.params.max_tokens or 1)
        self.prompts = [truncate(prompt, request.truncate_prompt_tokens, most)]

    def choices(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        return [self._choice(answer) for answer in output.outputs]

    def _choice(self, answer: Completion) -> dict[str, Any]:
        choice: dict[str, Any] = {
            "index": answer.index,
            "message": {"role": self.role, "content": self.echoed + answer.text},
            "finish_reason": answer.finish_reason,
            "stop_reason": answer.stop_reason,
        }
        if answer.logprobs is not None:
            choice["logprobs"] = self.logprobs(answer.logprobs)
        if self.shows_ids:
            choice["token_ids"] = answer.token_ids
        return choice

    def body(self, requests: Sequence[Request]) -> dict[str, Any]:
        body, (request,) = super().body(requests), requests
        if self.shows_ids:
            body["prompt_token_ids"] = request.prompt_token_ids
        if request.output is not None and request.output.prompt_logprobs is not None:
            top = self.params.prompt_logprobs or 0
            body["prompt_logprobs"] = prompt_logprobs(request.output.prompt_logprobs, top)
        return body

    def logprobs(self, positions: Sequence[dict[int, Any]]) -> dict[str, Any]:
        return chat_logprobs(positions, self._top, self.name, self.tokenizer)

    def frames(self, number: int, request: Request) -> Frames:
        return _ChatFrames(self, request)


class _ChatFrames(Frames):
    opening = '"delta":{"content":'
    closing = "}"

    def __init__(self, reply: ChatReply, request: Request) -> None:
        super().__init__(reply, 0, request)
        self._reply: ChatReply = reply

    def begin(self, index: int) -> str:
        choice = {"index": index, "delta": {"role": self._reply.role, "content": ""}, "finish_reason": None}
        frame: dict[str, Any] = {**self._reply.envelope(self._reply.stream_kind), "choices": [choice]}
        if self._reply.shows_ids:
            frame["prompt_token_ids"] = self._request.prompt_token_ids
        return event(self.with_usage(frame, index))

    def text(self, delta: Delta, first: bool) -> str:
        return self._reply.echoed + delta.text if first else delta.text

    def more(self, delta: Delta, first: bool) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if delta.logprobs is not None:
            more["logprobs"] = self._reply.logprobs(delta.logprobs)
        if self._reply.shows_ids:
            more["token_ids"] = delta.token_ids
        return more
