"""POST /v1/completions: prompts as text or token ids, one or many, and how their answers are written."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from ..request import Completion, Delta, Request, RequestOutput, SamplingParams, TokenLogprobs
from .errors import ApiError
from .frames import Frames
from .logprobs import completion_logprobs, prompt_logprobs
from .protocol import CompletionRequest
from .reply import Reply, about
from .runtime import Runtime
from .texts import Prompt, Texts, truncate


class CompletionReply(Reply):
    id_prefix = "cmpl"
    kind = "text_completion"
    stream_kind = "text_completion"

    def __init__(self, runtime: Runtime, request: CompletionRequest) -> None:
        super().__init__(runtime, request)
        self._request = request
        self._length_given = request.max_tokens is not None or request.max_new_tokens is not None
        self._only_echo = request.echo is True and 0 in (request.max_tokens, request.max_new_tokens)
        self.echo = bool(request.echo)
        self.echoed: list[str] = []
        """The prompts as text, if they are to be shown."""

    async def tokenize(self) -> None:
        prompt = self._request.prompt
        several = isinstance(prompt, list) and not isinstance(prompt[0], int)
        asked: Sequence[Any] = prompt if several else [prompt]
        if self.echo or isinstance(asked[0], str):
            await self.runtime.in_worker(self._read, asked, Texts(self.runtime))
        else:
            self._read(asked, None)

    def _read(self, asked: Sequence[str | list[int]], texts: Texts | None) -> None:
        request = self._request
        most = self.runtime.max_model_len - (self.params.max_tokens or 1)
        prompts = []
        for number, each in enumerate(asked):
            if isinstance(each, str):
                assert texts is not None
                try:
                    prompt = texts.encode(each, request.add_special_tokens is not False)
                except ApiError as error:
                    raise about(number, len(asked), error) from None
            else:
                prompt = Prompt(None, each)
            prompts.append(truncate(prompt, request.truncate_prompt_tokens, most))
        self.prompts = prompts
        if self.echo and texts is not None:
            skip = self.params.skip_special_tokens
            most = self.runtime.max_model_len  # a longer one is about to be refused
            self.echoed = [texts.decode(p.ids[:most], skip) if p.text is None else p.text for p in prompts]

    @property
    def repeats_prompts(self) -> bool:
        return self.shows_ids or self.echo

    def params_for(self, prompt: Prompt) -> SamplingParams:
        """The default length gives way to the context's end; one that was asked for is refused there."""
        room = self.runtime.max_model_len - len(prompt.ids)
        if self._length_given or not 0 < room < (self.params.max_tokens or 0):
            return self.params
        return replace(self.params, max_tokens=room)

    def shown_tokens(self, token_ids: Sequence[int]) -> Sequence[int]:
        return () if self._only_echo else token_ids

    def finish(self, answer: Completion | Delta) -> dict[str, Any]:
        if self._only_echo:
            return {"finish_reason": "length", "stop_reason": None}
        return {"finish_reason": answer.finish_reason, "stop_reason": answer.stop_reason}

    def shown_text(self, text: str) -> str:
        return "" if self._only_echo else text

    def choices(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        return [self._choice(number, output, answer) for answer in output.outputs]

    def _choice(self, number: int, output: RequestOutput, answer: Completion) -> dict[str, Any]:
        text = self.shown_text(answer.text)
        choice: dict[str, Any] = {
            "index": number * self.params.n + answer.index,
            "text": self.echoed[number] + text if self.echo else text,
            **self.finish(answer),
        }
        if answer.logprobs is not None:
            prompt = output.prompt_logprobs if self.echo else None
            choice["logprobs"] = self.logprobs(
                prompt, output.prompt_token_ids, answer.logprobs, answer.token_ids, 0
            )[0]
        if self._request.prompt_logprobs is not None and output.prompt_logprobs is not None:
            choice["prompt_logprobs"] = prompt_logprobs(output.prompt_logprobs, self._request.prompt_logprobs)
        if self.shows_ids:
            choice["prompt_token_ids"] = output.prompt_token_ids
            choice["token_ids"] = list(self.shown_tokens(answer.token_ids))
        return choice

    def logprobs(
        self,
        prompt: Sequence[TokenLogprobs | None] | None,
        prompt_ids: Sequence[int],
        answer: Sequence[TokenLogprobs],
        ids: Sequence[int],
        offset: int,
    ) -> tuple[dict[str, Any], int]:
        """Of the prompt, unless it is None, and what follows; and the offset of what comes then."""
        positions: list[TokenLogprobs | None] = [*(prompt or ()), *(() if self._only_echo else answer)]
        tokens = [*(prompt_ids if prompt is not None else ()), *self.shown_tokens(ids)]
        top = self.params.logprobs or 0
        return completion_logprobs(positions, tokens, top, self.name, self.tokenizer, offset)

    def frames(self, number: int, request: Request) -> Frames:
        return _CompletionFrames(self, number, request)


class _CompletionFrames(Frames):
    opening = '"text":'
    closing = ""

    def __init__(self, reply: CompletionReply, number: int, request: Request) -> None:
        super().__init__(reply, number, request)
        self._reply: CompletionReply = reply
        self._number = number
        self._offsets = [0] * reply.params.n

    def text(self, delta: Delta, first: bool) -> str:
        text = self._reply.shown_text(delta.text)
        return self._reply.echoed[self._number] + text if first and self._reply.echo else text

    def more(self, delta: Delta, first: bool) -> dict[str, Any]:
        more: dict[str, Any] = {}
        if delta.finish_reason is not None:
            more |= self._reply.finish(delta)
        if delta.logprobs is not None:
            prompt = self._request.prompt_logprobs if first and self._reply.echo else None
            more["logprobs"], self._offsets[delta.index] = self._reply.logprobs(
                prompt,
                self._request.prompt_token_ids,
                delta.logprobs,
                delta.token_ids,
                self._offsets[delta.index],
            )
        if self._reply.shows_ids:
            if first:
                more["prompt_token_ids"] = self._request.prompt_token_ids
            more["token_ids"] = list(self._reply.shown_tokens(delta.token_ids))
        return more
