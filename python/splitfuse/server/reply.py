"""A request in order, ready to run, and how its answer is written: what chat and completions share."""

from __future__ import annotations

import json
import secrets
import time
from abc import ABC, abstractmethod
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from .._core import InvalidArgument
from ..llm import advised
from ..request import Request, RequestOutput, SamplingParams
from .errors import ApiError
from .logprobs import id_of, name_of
from .params import bad_argument, ignored, sampling_params
from .protocol import ChatRequest, CompletionRequest
from .runtime import Runtime
from .stream import Stream
from .texts import Prompt

if TYPE_CHECKING:
    from .frames import Frames


class Reply(ABC):
    """The answers to the prompts of one request: choice `number of the prompt * n + i` is its answer i."""

    id_prefix: ClassVar[str]
    kind: ClassVar[str]
    """`object` of the whole."""
    stream_kind: ClassVar[str]
    """`object` of a frame."""

    def __init__(self, runtime: Runtime, request: ChatRequest | CompletionRequest) -> None:
        """Raises ApiError 400 for what is not supported, or asks for too much."""
        self.ignored = ignored(request)
        self.params = sampling_params(
            request, runtime.settings.limits, advised(runtime.served.loaded.generation_config)
        )
        self.runtime = runtime
        self.tokenizer = runtime.served.tokenizer
        self.prompts: Sequence[Prompt] = ()
        self.streamed = bool(request.stream)
        options = request.stream_options
        self.usage_at_end = options is not None and bool(options.include_usage)
        self.usage_always = options is not None and bool(options.continuous_usage_stats)
        self.shows_ids = bool(request.return_token_ids)
        self.name = id_of if request.return_tokens_as_token_ids else name_of
        self.id = f"{self.id_prefix}-{secrets.token_hex(16)}"
        self.model = request.model or runtime.names[0]
        self._created = int(time.time())
        self._fingerprint = runtime.served.fingerprint
        self._priority = request.priority or 0
        self._cache_salt = request.cache_salt or ""
        self.tenant = ""
        """Whose key asks, where there are several: nobody finds out what others' prompts began with."""

    @abstractmethod
    async def tokenize(self) -> None:
        """Fills in `prompts`."""

    @abstractmethod
    def choices(self, number: int, output: RequestOutput) -> list[dict[str, Any]]:
        """The answers to prompt `number`."""

    @abstractmethod
    def frames(self, number: int, request: Request) -> Frames:
        """Writes the same as they come."""

    def params_for(self, prompt: Prompt) -> SamplingParams:
        return self.params

    def shown_tokens(self, token_ids: Sequence[int]) -> Sequence[int]:
        """Of an answer's tokens, those that the client asked for."""
        return token_ids

    def submit(self) -> list[Stream]:
        """A stream a prompt, once all of them have been found in order. Raises ApiError."""
        params: list[SamplingParams] = []
        for number, prompt in enumerate(self.prompts):
            try:
                params.append(self.params_for(prompt))
                self.runtime.served.scheduler.check(prompt.ids, params[-1])
            except InvalidArgument as error:
                raise about(number, len(self.prompts), bad_argument(error)) from None
        self._check_amounts(params)
        streams: list[Stream] = []
        try:
            for number, (prompt, each) in enumerate(zip(self.prompts, params, strict=True)):
                stream = self.runtime.submit(
                    prompt.ids,
                    each,
                    streamed=self.streamed,
                    priority=self._priority,
                    cache_salt=f"{self.tenant}/{self._cache_salt}" if self.tenant else self._cache_salt,
                    request_id=f"{self.id}-{number}",
                    prompt=prompt.text,
                )
                streams.append(stream)
        except BaseException:
            for stream in streams:
                stream.cancel()
            raise
        return streams

    def _check_amounts(self, params: Sequence[SamplingParams]) -> None:
        """A small request could ask for more than there is memory. Raises ApiError 400."""
        limits, context = self.runtime.settings.limits, self.runtime.max_model_len
        tokens = prompt_entries = answer_entries = repeated = 0
        for prompt, each in zip(self.prompts, params, strict=True):
            length = len(prompt.ids)
            tokens += length
            repeated += each.n * length
            if each.prompt_logprobs is not None:  # every answer repeats those of its prompt
                prompt_entries += each.n * length * (1 + each.prompt_logprobs)
            if each.logprobs is not None:
                answer_entries += each.n * (each.max_tokens or context - length) * (1 + each.logprobs)
        if len(self.prompts) > 1:
            _at_most("prompt", tokens, limits.queued_tokens, "tokens of all prompts")
        _at_most(
            "n", prompt_entries, limits.prompt_logprobs, "log-probabilities of prompt tokens in one answer"
        )
        if not self.streamed:
            asked = "top_logprobs" if self.kind.startswith("chat") else "logprobs"
            _at_most(
                asked,
                answer_entries,
                limits.answer_logprobs,
                "log-probabilities in one answer, not streamed,",
            )
        if self.repeats_prompts:
            name = "return_token_ids" if self.shows_ids else "echo"
            _at_most(name, repeated, limits.repeated_tokens, "prompt tokens repeated in one answer")

    @property
    def repeats_prompts(self) -> bool:
        """Whether each answer shows its prompt."""
        return self.shows_ids

    def envelope(self, kind: str) -> dict[str, Any]:
        return {
            "id": self.id,
            "object": kind,
            "created": self._created,
            "model": self.model,
            "system_fingerprint": self._fingerprint,
        }

    def body(self, requests: Sequence[Request]) -> dict[str, Any]:
        """The whole answer, of requests that are done. Making it takes a while: texts are decoded."""
        outputs = [request.output for request in requests]
        choices = [
            choice
            for number, output in enumerate(outputs)
            if output is not None
            for choice in self.choices(number, output)
        ]
        return {**self.envelope(self.kind), "choices": choices, "usage": self.usage(requests)}

    def text(self, requests: Sequence[Request]) -> str:
        """The same as JSON."""
        return dumps(self.body(requests))

    def usage(self, requests: Sequence[Request]) -> dict[str, Any]:
        made = sum(
            len(self.shown_tokens(answer.token_ids))
            for request in requests
            if request.output is not None
            for answer in request.output.outputs
        )
        read = sum(len(request.prompt_token_ids) for request in requests)
        return usage(read, made, sum(request.cached_tokens for request in requests))

    def last_frame(self, requests: Sequence[Request]) -> dict[str, Any] | None:
        """What a stream ends with, if the usage was asked for."""
        if not self.usage_at_end:
            return None
        return {**self.envelope(self.stream_kind), "choices": [], "usage": self.usage(requests)}


def about(number: int, prompts: int, error: ApiError) -> ApiError:
    """A refusal that says which prompt is meant, where there are several."""
    if prompts == 1:
        return error
    return ApiError(error.status, f"prompt {number}: {error.message}", param=error.param)


def usage(prompt_tokens: int, completion_tokens: int, cached_tokens: int) -> dict[str, Any]:
    return {
        "prompt_tokens": prompt_tokens,
        "completion_tokens": completion_tokens,
        "total_tokens": prompt_tokens + completion_tokens,
        "prompt_tokens_details": {"cached_tokens": cached_tokens},
    }


def dumps(value: Any) -> str:
    """JSON in ASCII alone: some clients cut a stream at every line separator that Unicode knows."""
    return json.dumps(value, separators=(",", ":"), allow_nan=False)


def _at_most(param: str, count: int, most: int, what: str) -> None:
    if count > most:
        raise ApiError(400, f"{param}: {count} {what} exceed {most}", param=param)
