"""What a caller asks for, `SamplingParams`, and a `Request`. What comes back is in results.py."""

from __future__ import annotations

import math
import operator
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from . import _core
from ._core import InvalidArgument
from .results import Completion as Completion
from .results import Delta as Delta
from .results import Logprob as Logprob
from .results import NotFinite as NotFinite
from .results import RequestOutput as RequestOutput
from .results import TokenLogprobs as TokenLogprobs

if TYPE_CHECKING:
    from ._answer import Answer
    from .scheduler import Scheduler

_FLOAT32_MAX = 3.4028234663852886e38
_FLOAT32_TINY = 1.1754943508222875e-38
MAX_ANSWERS = 1024  # to one prompt: they take room in the engine all at once
_INT32_MAX = 2**31 - 1


@dataclass(frozen=True, kw_only=True)
class SamplingParams:
    """How the tokens of a request are chosen. Names and defaults are vLLM's.

    Logits pass, in this order: penalties, logit_bias, min_tokens, temperature, min_p, top_k, top_p. Values
    are checked here; one out of range is an `InvalidArgument` (a ValueError) that names it. Immutable, so one
    object may serve many prompts: `dataclasses.replace` makes variants.
    """

    n: int = 1
    """How many answers to the same prompt."""
    max_tokens: int | None = 16
    """The longest answer in tokens; None: what the context allows."""
    min_tokens: int = 0
    """No end of sequence, stop token or stop string before this many tokens."""
    temperature: float = 1.0
    """0 is greedy."""
    top_p: float = 1.0
    """Keep the smallest set of tokens whose probability reaches this, (0, 1]."""
    top_k: int = 0
    """Keep this many of the most likely tokens; 0 or -1: all."""
    min_p: float = 0.0
    """Drop tokens less likely than this share of the most likely one, [0, 1]."""
    seed: int | None = None
    """0 .. 2**64 - 1. The same seed gives the same answer, whatever else runs; None: a fresh one each
    request."""
    stop: str | Sequence[str] = ()
    """Text that ends the answer; it may lie across token borders. Not part of the answer's text."""
    stop_token_ids: Sequence[int] = ()
    """Tokens that end the answer, beside the model's own end of sequence."""
    ignore_eos: bool = False
    """Go on past the model's end of sequence."""
    include_stop_str_in_output: bool = False
    """Keep the stop string, or the text of the stop token, in the answer's text."""
    skip_special_tokens: bool = True
    """Leave special tokens out of the text."""
    repetition_penalty: float = 1.0
    """Divides the logits of tokens seen in prompt or answer, > 0."""
    presence_penalty: float = 0.0
    """Taken once from the logits of tokens seen in the answer, [-2, 2]."""
    frequency_penalty: float = 0.0
    """Taken once for every time a token is in the answer, [-2, 2]."""
    logit_bias: Mapping[int, float] = field(default_factory=dict)
    """Added to the logits of these tokens."""
    logprobs: int | None = None
    """Log-probabilities of each answer token: the chosen one's and those of this many most likely ones."""
    prompt_logprobs: int | None = None
    """The same of each prompt token."""

    def __post_init__(self) -> None:
        put = object.__setattr__
        put(self, "n", _integer("n", self.n, 1, MAX_ANSWERS))
        if self.max_tokens is not None:
            put(self, "max_tokens", _integer("max_tokens", self.max_tokens, 1))
        put(self, "min_tokens", _integer("min_tokens", self.min_tokens, 0))
        if self.max_tokens is not None and self.min_tokens > self.max_tokens:
            raise InvalidArgument(f"min_tokens is {self.min_tokens}, more than max_tokens, {self.max_tokens}")
        put(self, "temperature", _number("temperature", self.temperature, 0.0, _FLOAT32_MAX, "0 or more"))
        put(self, "top_p", _number("top_p", self.top_p, 0.0, 1.0, "in (0, 1]", open_low=True))
        top_k = _integer("top_k", self.top_k, -1)
        put(self, "top_k", 0 if top_k == -1 else top_k)
        put(self, "min_p", _number("min_p", self.min_p, 0.0, 1.0, "in [0, 1]"))
        if self.seed is not None:
            put(self, "seed", _integer("seed", self.seed, 0, 2**64 - 1))
        put(self, "stop", _stop_strings(self.stop))
        put(self, "stop_token_ids", _token_ids("stop_token_ids", self.stop_token_ids))
        for name in ("ignore_eos", "include_stop_str_in_output", "skip_special_tokens"):
            if not isinstance(getattr(self, name), bool):
                raise InvalidArgument(f"{name} must be True or False, not {getattr(self, name)!r}")
        penalty = _number(
            "repetition_penalty", self.repetition_penalty, 0.0, _FLOAT32_MAX, "more than 0", open_low=True
        )
        put(self, "repetition_penalty", penalty)
        for name in ("presence_penalty", "frequency_penalty"):
            put(self, name, _number(name, getattr(self, name), -2.0, 2.0, "in [-2, 2]"))
        put(self, "logit_bias", _logit_bias(self.logit_bias))
        for name in ("logprobs", "prompt_logprobs"):
            if getattr(self, name) is not None:
                put(self, name, _integer(name, getattr(self, name), 0, _core.MAX_LOGPROBS))

    def to_native(self, *, max_tokens: int, seed: int, sample_index: int = 0) -> _core.SamplingParams:
        """The native parameters of answer `sample_index`, with what a request settles filled in: `max_tokens`
        and `seed` where they are None here. Prompt log-probabilities are computed for answer 0 alone."""
        want_prompt = self.prompt_logprobs is not None and sample_index == 0
        return _core.SamplingParams(
            max_tokens=max_tokens,
            min_tokens=self.min_tokens,
            temperature=self.temperature,
            top_p=self.top_p,
            top_k=self.top_k,
            min_p=self.min_p,
            seed=seed,
            sample_index=sample_index,
            repetition_penalty=self.repetition_penalty,
            presence_penalty=self.presence_penalty,
            frequency_penalty=self.frequency_penalty,
            logit_bias=list(self.logit_bias.items()),
            stop_token_ids=list(self.stop_token_ids),
            ignore_eos=self.ignore_eos,
            logprobs=-1 if self.logprobs is None else self.logprobs,
            prompt_logprobs=self.prompt_logprobs if want_prompt else -1,
        )


def _integer(name: str, value: Any, low: int, high: int = _INT32_MAX) -> int:
    wanted = f"an integer of at least {low}" if high == _INT32_MAX else f"an integer from {low} to {high}"
    try:
        number = operator.index(value)
    except TypeError:
        raise InvalidArgument(f"{name} must be {wanted}, not {value!r}") from None
    if isinstance(value, bool) or not low <= number <= high:
        raise InvalidArgument(f"{name} must be {wanted}, not {value!r}")
    return number


def _number(name: str, value: Any, low: float, high: float, wanted: str, *, open_low: bool = False) -> float:
    if isinstance(value, (bool, str)) or not hasattr(value, "__float__"):
        raise InvalidArgument(f"{name} must be a number {wanted}, not {value!r}")
    number = float(value)
    if math.isnan(number) or not low <= number <= high or (open_low and number - low < _FLOAT32_TINY):
        raise InvalidArgument(f"{name} must be {wanted}, not {value!r}")
    return number


def _stop_strings(value: Any) -> tuple[str, ...]:
    strings = (value,) if isinstance(value, str) else value if value is not None else ()
    if not isinstance(strings, Sequence) or not all(isinstance(s, str) for s in strings):
        raise InvalidArgument(f"stop must be a string or a list of strings, not {value!r}")
    if not all(strings):
        raise InvalidArgument("stop holds an empty string, which would end every answer at once")
    return tuple(strings)


def _token_ids(name: str, value: Any) -> tuple[int, ...]:
    if isinstance(value, (str, bytes)) or not hasattr(value, "__iter__"):
        if value is None:
            return ()
        raise InvalidArgument(f"{name} must be a list of token ids, not {value!r}")
    return tuple(_integer(f"{name}[{i}]", token, 0) for i, token in enumerate(value))


def _logit_bias(value: Any) -> dict[int, float]:
    if value is None:
        return {}
    if not isinstance(value, Mapping):
        raise InvalidArgument(f"logit_bias must be a dict of token id to number, not {value!r}")
    return {
        _integer("a token id of logit_bias", token, 0): _number(
            f"logit_bias[{token!r}]", bias, -_FLOAT32_MAX, _FLOAT32_MAX, "finite"
        )
        for token, bias in value.items()
    }


def check_request(
    prompt_token_ids: Sequence[int] | npt.NDArray[Any],
    params: SamplingParams,
    vocab_size: int,
    max_model_len: int,
) -> list[int]:
    """The prompt as a list of ids, or InvalidArgument if no engine of this vocabulary and context could serve
    the request."""
    if not isinstance(params, SamplingParams):
        raise InvalidArgument(f"params must be a SamplingParams, not {type(params).__name__}")
    try:
        ids = np.asarray(prompt_token_ids)
    except ValueError:
        raise InvalidArgument("a prompt must be a flat list of integer token ids") from None
    if ids.size == 0:
        raise InvalidArgument("the prompt is empty: at least one token is needed")
    if ids.ndim != 1 or ids.dtype.kind not in "iu":
        raise InvalidArgument("a prompt must be a flat list of integer token ids")
    allowed = f"is outside the vocabulary, 0 to {vocab_size - 1}"
    if ids.min() < 0 or ids.max() >= vocab_size:
        raise InvalidArgument(
            f"prompt token {next(int(t) for t in ids if not 0 <= t < vocab_size)} {allowed}"
        )
    for name, named in (("stop_token_ids", params.stop_token_ids), ("logit_bias", params.logit_bias)):
        for token in named:
            if token >= vocab_size:
                raise InvalidArgument(f"{name}: token {token} {allowed}")
    if len(ids) + (params.max_tokens or 1) > max_model_len:
        asked = f" and max_tokens of {params.max_tokens}" if params.max_tokens is not None else ""
        raise InvalidArgument(
            f"a prompt of {len(ids)} tokens{asked} exceeds the context of {max_model_len} tokens: shorten "
            "it, lower max_tokens (None takes what is left), or raise max_model_len"
        )
    if params.min_tokens > max_model_len - len(ids):
        raise InvalidArgument(
            f"min_tokens is {params.min_tokens}, but after a prompt of {len(ids)} tokens the context of "
            f"{max_model_len} tokens leaves {max_model_len - len(ids)}"
        )
    tokens: list[int] = ids.tolist()
    return tokens


@dataclass(slots=True)
class RequestTimes:
    """When what happened to a request, in seconds of `time.monotonic()`; None: not yet, or never."""

    arrived: float
    started: float | None = None
    """The first forward that computed some of its prompt began."""
    first_token: float | None = None
    ended: float | None = None


class Request:
    """A submitted request, made by `Scheduler.submit`. Safe to use from any thread."""

    def __init__(
        self,
        scheduler: Scheduler,
        request_id: str,
        prompt: str | None,
        prompt_token_ids: list[int],
        params: SamplingParams,
        priority: int,
        cache_salt: str,
        on_output: Callable[[Request, Delta], None] | None,
        on_done: Callable[[Request], None] | None,
    ) -> None:
        self.id = request_id
        self.prompt = prompt
        self.prompt_token_ids = prompt_token_ids
        self.params = params
        self.priority = priority
        self.cache_salt = cache_salt
        self.seed = secrets.randbits(64) if params.seed is None else params.seed
        """What it is sampled with: `params.seed`, or the one drawn for it."""
        self.times = RequestTimes(time.monotonic())
        self.cached_tokens = 0
        """Of the prompt, taken from the prefix cache. Known with the first token."""
        self.preemptions = 0
        """How often an answer's KV blocks were taken from it, to be computed anew."""
        self.prompt_logprobs: list[TokenLogprobs | None] | None = None
        """As in `RequestOutput`; whole from the first token on."""
        if params.prompt_logprobs is not None:
            self.prompt_logprobs = [None] * len(prompt_token_ids)
        self._scheduler = scheduler
        self._on_output = on_output
        self._on_done = on_done
        self._answers: list[Answer] = []
        self._begun = 0  # answers that have been put
        self._queued = True
        self._keeps_logprobs = True
        self._output: RequestOutput | None = None
        self._event = threading.Event()

    @property
    def done(self) -> bool:
        return self._event.is_set()

    @property
    def output(self) -> RequestOutput | None:
        """The result once done, failed and cancelled requests included."""
        return self._output

    @property
    def error(self) -> Exception | None:
        """Why it failed, once done, if it did."""
        return self._output.error if self._output is not None else None

    def cancel(self) -> None:
        """Asks for it to end at the next step, with what it has by then. Does nothing once done."""
        self._scheduler.cancel(self)

    def wait(self, timeout: float | None = None) -> bool:
        """Waits, at most `timeout` seconds, until done; says whether it is. Somebody must be stepping the
        scheduler: `start()`, or another thread."""
        return self._event.wait(timeout)

    def result(self, timeout: float | None = None) -> RequestOutput:
        """Waits as `wait` does. Raises the error of a failed request, TimeoutError if it is not done in
        time."""
        if not self._event.wait(timeout):
            raise TimeoutError(f"request {self.id} is not done after {timeout} s")
        assert self._output is not None
        if self._output.error is not None:
            raise self._output.error
        return self._output
