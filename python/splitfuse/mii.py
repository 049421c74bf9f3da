"""DeepSpeed-MII's names over `LLM`: `splitfuse.pipeline(model)(prompts, max_new_tokens=...)`. Those of its
servers and clients are in remote.py."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

from ._core import InvalidArgument
from .llm import LLM
from .request import Completion, Delta, Request, SamplingParams


@dataclass(frozen=True, slots=True)
class Response:
    """One generated text, or, given to a `streaming_fn`, one piece of it."""

    generated_text: str
    prompt_length: int
    generated_length: int
    finish_reason: str | None
    """"stop", "length", "abort" or "error"; None for a piece that is not the last."""

    def __str__(self) -> str:
        return self.generated_text


@dataclass(frozen=True, kw_only=True)
class MiiParams:
    """MII's generation parameters, with its defaults."""

    max_length: int | None = None
    max_new_tokens: int | None = None
    min_new_tokens: int = 0
    do_sample: bool = True
    top_p: float = 0.9
    top_k: int | None = None
    temperature: float | None = None
    stop: str | Sequence[str] = ()
    ignore_eos: bool = False
    return_full_text: bool = False

    def sampling(self, prompt_length: int | None) -> SamplingParams:
        """The same in vLLM's names, for a prompt of so many tokens; None: not known. Raises
        InvalidArgument."""
        chosen: dict[str, Any] = {"temperature": 0.0}
        if self.do_sample:
            temperature = 1.0 if self.temperature is None else self.temperature
            chosen = {"temperature": temperature, "top_p": self.top_p, "top_k": self.top_k or 0}
        return SamplingParams(
            max_tokens=self._limit(prompt_length),
            min_tokens=self.min_new_tokens,
            stop=self.stop,
            ignore_eos=self.ignore_eos,
            **chosen,
        )

    def _limit(self, used: int | None) -> int | None:
        if self.max_length is None or used is None:
            return self.max_new_tokens
        if self.max_length <= used:
            raise InvalidArgument(f"max_length is {self.max_length}, but the prompt alone has {used} tokens")
        left = self.max_length - used
        return left if self.max_new_tokens is None else min(left, self.max_new_tokens)


def prompt_list(prompts: str | Sequence[str], streamed: bool) -> list[str]:
    """One prompt or many, as a list. Raises InvalidArgument if the answers to many are to be streamed."""
    texts = [prompts] if isinstance(prompts, str) else list(prompts)
    if streamed and len(texts) != 1:
        raise InvalidArgument(f"streaming_fn takes the answer to a single prompt, not to {len(texts)}")
    return texts


def pipeline(model: str | os.PathLike[str], *, max_length: int | None = None, **options: Any) -> Pipeline:
    """A model to call, with the parameters of mii.pipeline. `max_length`: longest sequence, prompt and
    answer; `options`: those of `LLM`."""
    return Pipeline(LLM(model, max_model_len=max_length, **options))


class Pipeline:
    """Made by `pipeline`. Call it with a prompt, or a list of them; `llm` is what runs."""

    def __init__(self, llm: LLM) -> None:
        self.llm = llm

    def __call__(
        self,
        prompts: str | Sequence[str],
        *,
        max_length: int | None = None,
        max_new_tokens: int | None = None,
        min_new_tokens: int = 0,
        do_sample: bool = True,
        top_p: float = 0.9,
        top_k: int | None = None,
        temperature: float | None = None,
        stop: str | Sequence[str] = (),
        ignore_eos: bool = False,
        return_full_text: bool = False,
        streaming_fn: Callable[[list[Response]], None] | None = None,
    ) -> list[Response]:
        """One Response a prompt, in order. Parameters and defaults are MII's.

        max_length: of prompt and answer in tokens; None: the model's. max_new_tokens: of the answer; None:
        what max_length leaves. do_sample=False is greedy, whatever temperature, top_p and top_k say.
        return_full_text: the text begins with the prompt. streaming_fn: called with [piece] as the answer to
        a single prompt comes.
        """
        texts = prompt_list(prompts, streaming_fn is not None)
        wanted = MiiParams(
            max_length=max_length,
            max_new_tokens=max_new_tokens,
            min_new_tokens=min_new_tokens,
            do_sample=do_sample,
            top_p=top_p,
            top_k=top_k,
            temperature=temperature,
            stop=stop,
            ignore_eos=ignore_eos,
        )
        params = [wanted.sampling(self._length(text, max_length)) for text in texts]
        if streaming_fn is not None:
            return [self._stream(texts[0], params[0], streaming_fn, return_full_text)]
        outputs = self.llm.generate(texts, params)
        return [
            _response(o.prompt or "", len(o.prompt_token_ids), o.outputs[0], return_full_text)
            for o in outputs
        ]

    def destroy(self) -> None:
        """Gives the model's memory back."""
        self.llm.close()

    def _length(self, text: str, max_length: int | None) -> int | None:
        if max_length is None or not isinstance(text, str) or self.llm.tokenizer is None:
            return None
        return len(self.llm.tokenizer.encode(text))

    def _stream(
        self,
        text: str,
        params: SamplingParams,
        streaming_fn: Callable[[list[Response]], None],
        full_text: bool,
    ) -> Response:
        ids = self.llm.tokenizer.encode(text) if self.llm.tokenizer is not None else []
        first = True

        def on_output(request: Request, delta: Delta) -> None:
            nonlocal first
            piece = text + delta.text if full_text and first else delta.text
            first = False
            streaming_fn([Response(piece, len(ids), len(delta.token_ids), delta.finish_reason)])

        request = self.llm.scheduler.submit(ids, params, prompt=text, on_output=on_output)
        try:
            return _response(text, len(ids), request.result().outputs[0], full_text)
        finally:
            request.cancel()


def _response(prompt: str, prompt_length: int, answer: Completion, full_text: bool) -> Response:
    text = prompt + answer.text if full_text else answer.text
    return Response(text, prompt_length, len(answer.token_ids), answer.finish_reason)
