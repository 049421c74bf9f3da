"""`LLM`: a model that answers, in one object. It loads, tokenises, schedules and gives text back."""

from __future__ import annotations

import logging
import os
import queue
import weakref
from collections.abc import Iterator, Mapping, Sequence
from types import TracebackType
from typing import TYPE_CHECKING, Any

from . import _core
from ._core import Engine, InvalidArgument, StateError
from ._progress import CountBar, on_terminal
from .engine_setup import load_engine
from .request import Delta, NotFinite, Request, RequestOutput, SamplingParams

if TYPE_CHECKING:
    from .loader import LoadedModel
    from .scheduler import Scheduler
    from .tokenizer import Tokenizer

_log = logging.getLogger("splitfuse")
_POLL = 0.2  # seconds between looks at the progress of a batch

Message = Mapping[str, Any]
Prompt = str | Sequence[int]
_Asked = tuple[str | None, Sequence[int]]  # a prompt's text, if it came as text, and its tokens


def advised(generation_config: Mapping[str, Any]) -> dict[str, Any]:
    """What generation_config.json advises, as sampling parameters."""
    names = ("temperature", "top_p", "top_k", "min_p", "repetition_penalty")
    found = {name: generation_config[name] for name in names if generation_config.get(name) is not None}
    if generation_config.get("do_sample") is False:
        found["temperature"] = 0.0
    return found


class LLM:
    """A model and the engine that runs it.

    model: a Hugging Face directory or hub id, a .gguf file, what `splitfuse convert` wrote, or "demo".
    device: "cpu", or "auto". dtype: "bfloat16" (auto) or "float32", of weights and activations.
    quantize: "int8" or "int4" holds the matrices in fewer bits (docs/quantization.md), "auto" in those of the
    file, "none" as `dtype` says; None: "none", or what a checkpoint was converted to. quantize_cache: keep integers
    that had to be fitted, in the user's cache folder, for the next start. lora: the directory of a PEFT adapter to
    merge into the matrices. threads: None takes the cores this process may use. pin_threads: each but the caller's
    stays on a CPU of its own. isa: "auto" or a rung of `splitfuse info`'s ladder. token_budget: tokens of one forward;
    "auto" measures at start. max_sequences: of one forward. max_model_len: longest sequence; None: what model and KV
    memory allow.
    kv_memory: of the KV cache, bytes or "512MiB"; "auto": 1 GiB, or one longest sequence if that is more.
    kv_dtype: of the KV cache, "auto" for dtype or "int8": about half of bfloat16's bytes a token, at a small loss.
    prefix_caching: reuse the keys and values of prompts that begin alike. policy: which tokens run in a
    forward, a name of `splitfuse.policies`. verbose: print memory plan and budget on stderr (both are logged);
    None: where that is a terminal.

    All memory is taken here. Safe to use from several threads: their requests run together. `close()` gives
    the memory back; so does leaving a `with` block, or the end of the program.
    """

    def __init__(
        self,
        model: str | os.PathLike[str] | LoadedModel,
        *,
        device: str = "auto",
        dtype: str = "auto",
        quantize: str | None = None,
        quantize_cache: bool = True,
        lora: str | os.PathLike[str] | None = None,
        threads: int | None = None,
        token_budget: int | str = "auto",
        max_sequences: int = 256,
        max_model_len: int | None = None,
        kv_memory: int | str = "auto",
        kv_dtype: str = "auto",
        prefix_caching: bool = True,
        isa: str = "auto",
        pin_threads: bool = False,
        policy: str = "splitfuse",
        verbose: bool | None = None,
    ) -> None:
        from .policies import make_scheduler, step_tokens

        loaded, self.engine = load_engine(
            model,
            verbose=verbose,
            device=device,
            dtype=dtype,
            threads=threads,
            token_budget=token_budget,
            max_step_tokens=step_tokens(policy),
            max_sequences=max_sequences,
            max_model_len=max_model_len,
            kv_memory=kv_memory,
            kv_dtype=kv_dtype,
            prefix_caching=prefix_caching,
            isa=isa,
            pin_threads=pin_threads,
            quantize=quantize,
            quantize_cache=quantize_cache,
            lora=lora,
        )
        self.name: str = loaded.name
        self.tokenizer: Tokenizer | None = loaded.tokenizer
        """None if the model came without one: it takes and gives token ids alone."""
        self.generation_config: Mapping[str, Any] = loaded.generation_config
        self.scheduler = make_scheduler(policy, self.engine, self.tokenizer)
        self.scheduler.start()
        self._close = weakref.finalize(self, _shut_down, self.scheduler, self.engine)

    @classmethod
    def from_model(cls, model: Any, tokenizer: Any = None, **options: Any) -> LLM:
        """A model of transformers that is in memory already, with its tokenizer if text is wanted. `options`: those of
        `LLM`. The engine packs weights of its own; afterwards the model may be deleted."""
        from .loader import load_live

        return cls(load_live(model, tokenizer), **options)

    @property
    def model_config(self) -> _core.ModelConfig:
        return self.engine.model_config

    @property
    def max_model_len(self) -> int:
        """Longest sequence, prompt and answer together, in tokens."""
        return self.engine.memory_plan.max_model_len

    def default_params(self, **changes: Any) -> SamplingParams:
        """What the model's makers advise (generation_config.json), with `changes`."""
        return SamplingParams(**{**advised(self.generation_config), **changes})

    def generate(
        self,
        prompts: Prompt | Sequence[Prompt],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Continues one prompt or many, each text or a list of token ids; one result a prompt, in order.

        `params`: one for all, or one a prompt. `progress`: show a bar; None: on a terminal. Everything is
        checked before anything runs: a bad prompt or parameter is an InvalidArgument. A request whose logits
        are not finite ends alone, with `finish_reason` "error"; if the engine fails, that is raised. Ctrl-C
        cancels.
        """
        self._check_open()
        return self._run([self._prompt(p) for p in _prompts(prompts)], params, progress)

    def chat(
        self,
        messages: Sequence[Message] | Sequence[Sequence[Message]],
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        chat_template_kwargs: Mapping[str, Any] | None = None,
        progress: bool | None = None,
    ) -> list[RequestOutput]:
        """Answers one conversation, a list of {"role": ..., "content": ...}, or a list of them; as `generate`
        otherwise. `chat_template_kwargs` are handed to the model's template."""
        self._check_open()
        several = len(messages) > 0 and not isinstance(messages[0], Mapping)
        conversations = messages if several else [messages]
        extra = chat_template_kwargs or {}
        return self._run([self._conversation(c, extra) for c in conversations], params, progress)  # type: ignore[arg-type]

    def stream(
        self, prompt: Prompt | Sequence[Message], params: SamplingParams | None = None
    ) -> Iterator[str]:
        """The answer to one prompt or conversation in pieces, as they come. Checked at once; it starts to run
        with the first piece, and leaving the loop cancels it."""
        self._check_open()
        if not isinstance(prompt, str) and len(prompt) > 0 and isinstance(prompt[0], Mapping):
            asked: _Asked = self._conversation(prompt, {})  # type: ignore[arg-type]
        else:
            asked = self._prompt(prompt)  # type: ignore[arg-type]
        params = params if params is not None else SamplingParams()
        self.scheduler.check(asked[1], params)
        if params.n != 1:
            raise InvalidArgument(f"a stream has one answer, so n must be 1, not {params.n}")
        if self.tokenizer is None:
            raise InvalidArgument("a stream of text needs a tokenizer, and this model came without one")
        return self._stream(*asked, params)

    def close(self) -> None:
        """Cancels what runs and gives all memory back. Any later call raises StateError; closing again does
        nothing."""
        self._close()

    def __enter__(self) -> LLM:
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self.close()

    def __repr__(self) -> str:
        return f"<LLM {self.name}{'' if self._close.alive else ', closed'}>"

    def _check_open(self) -> None:
        if not self._close.alive:
            raise StateError("this LLM is closed")

    def _prompt(self, prompt: Prompt) -> _Asked:
        if not isinstance(prompt, str):
            return None, prompt
        return prompt, self._tokenizer_for("text prompts").encode(prompt)

    def _conversation(self, messages: Sequence[Message], extra: Mapping[str, Any]) -> _Asked:
        tokenizer = self._tokenizer_for("conversations")
        text = tokenizer.render_chat(messages, **extra)
        return text, tokenizer.encode(text, add_special_tokens=False)

    def _tokenizer_for(self, what: str) -> Tokenizer:
        if self.tokenizer is None:
            raise InvalidArgument(f"{what} need a tokenizer, and this model came without one; give token ids")
        return self.tokenizer

    def _run(
        self,
        prompts: list[_Asked],
        params: SamplingParams | Sequence[SamplingParams] | None,
        progress: bool | None,
    ) -> list[RequestOutput]:
        if params is None or isinstance(params, SamplingParams):
            params = [params if params is not None else SamplingParams()] * len(prompts)
        if len(params) != len(prompts):
            raise InvalidArgument(
                f"{len(prompts)} prompts but {len(params)} params: give one for all, or one a prompt"
            )
        for i, ((_, ids), each) in enumerate(zip(prompts, params, strict=True)):
            try:
                self.scheduler.check(ids, each)
            except InvalidArgument as error:
                raise (error if len(prompts) == 1 else InvalidArgument(f"prompt {i}: {error}")) from None
        requests: list[Request] = []
        try:
            for (text, ids), each in zip(prompts, params, strict=True):
                requests.append(self.scheduler.submit(ids, each, prompt=text))
            self._wait(requests, on_terminal() if progress is None else progress)
        except BaseException:
            for request in requests:
                request.cancel()
            raise
        return [_result(request) for request in requests]

    def _wait(self, requests: list[Request], shown: bool) -> None:
        with CountBar("Generating", len(requests), shown and len(requests) > 1) as bar:
            for i, request in enumerate(requests):
                while not request.wait(_POLL if shown else None):
                    bar.update(i + sum(r.done for r in requests[i:]))

    def _stream(self, text: str | None, ids: Sequence[int], params: SamplingParams) -> Iterator[str]:
        pieces: queue.SimpleQueue[str | None] = queue.SimpleQueue()

        def on_output(_: Request, delta: Delta) -> None:
            if delta.text:
                pieces.put(delta.text)

        request = self.scheduler.submit(
            ids, params, prompt=text, on_output=on_output, on_done=lambda _: pieces.put(None)
        )
        try:
            while (piece := pieces.get()) is not None:
                yield piece
        finally:
            request.cancel()
        request.result()


def _shut_down(scheduler: Scheduler, engine: Engine) -> None:
    scheduler.close()
    engine.close()


def _prompts(prompts: Prompt | Sequence[Prompt]) -> list[Prompt]:
    """One prompt or many, as a list. A flat list of integers is one prompt."""
    if isinstance(prompts, str):
        return [prompts]
    if not hasattr(prompts, "__len__") or isinstance(prompts, (bytes, Mapping)):
        raise InvalidArgument(
            f"prompts must be text, token ids, or a list of these, not {type(prompts).__name__}"
        )
    if len(prompts) > 0 and not isinstance(prompts[0], str) and not hasattr(prompts[0], "__len__"):
        return [prompts]  # type: ignore[list-item]
    return list(prompts)  # type: ignore[arg-type]


def _result(request: Request) -> RequestOutput:
    """What a batch gives back for it: output that is not finite costs nobody else, other failures are
    raised."""
    if isinstance(request.error, NotFinite) and request.output is not None:
        _log.warning("%s", request.error)
        return request.output
    return request.result()
