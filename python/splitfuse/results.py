"""What comes back of a request: its `RequestOutput`, and the `Delta`s of a stream."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from . import _core


class NotFinite(_core.Error):
    """The logits of a request were not finite numbers, so no token could be chosen. It alone has ended."""


@dataclass(frozen=True, slots=True)
class Logprob:
    """The log-probability of one token, by the model's own distribution before penalties and temperature."""

    token_id: int
    logprob: float
    rank: int
    """Where it stands in that distribution: 1 is the most likely; ties by lower id."""
    text: str | None = None
    """What the token adds to a text; None without a tokenizer."""


TokenLogprobs = dict[int, Logprob]
"""Token id to Logprob, at one position: the chosen token first, then the most likely others, best first."""


@dataclass(slots=True)
class Completion:
    """One answer to a prompt."""

    index: int
    token_ids: list[int]
    finish_reason: str
    """"stop": end of sequence, stop token or stop string; "length": max_tokens or the context's end; "abort":
    cancelled; "error": it failed, see RequestOutput.error."""
    stop_reason: str | int | None = None
    """The stop string or the stop token that ended it; None for the model's own end of sequence."""
    logprobs: list[TokenLogprobs] | None = None
    """One entry a token, if asked for and kept."""
    cumulative_logprob: float | None = None
    """The sum over the chosen tokens, if log-probabilities were asked for and kept."""
    undelivered: str = ""
    """The end of `text` that no delta has had: what was held back when a streamed answer was cancelled."""
    _text: str | Callable[[], str] = field(default="", repr=False, compare=False)

    @property
    def text(self) -> str:
        """The answer as text; "" without a tokenizer. An answer nobody streamed is decoded when first
        read."""
        if not isinstance(self._text, str):
            self._text = self._text()
        return self._text


@dataclass(slots=True)
class RequestOutput:
    """The answers to one prompt. `text`, `token_ids`, `finish_reason` and `logprobs` are those of the
    first."""

    request_id: str
    prompt: str | None
    """None where the prompt came as token ids."""
    prompt_token_ids: list[int]
    outputs: list[Completion]
    prompt_logprobs: list[TokenLogprobs | None] | None = None
    """One entry a prompt token, None for the first, if asked for."""
    error: Exception | None = None
    """Why it failed, if it did; what was made before is kept."""

    @property
    def text(self) -> str:
        return self.outputs[0].text

    @property
    def token_ids(self) -> list[int]:
        return self.outputs[0].token_ids

    @property
    def finish_reason(self) -> str:
        return self.outputs[0].finish_reason

    @property
    def logprobs(self) -> list[TokenLogprobs] | None:
        return self.outputs[0].logprobs


@dataclass(slots=True)
class Delta:
    """What one step added to one answer of a request: the argument of a streaming callback."""

    index: int
    """Which of n answers."""
    text: str
    """May be empty: bytes of an unfinished character and what may become a stop string are held back."""
    token_ids: list[int]
    logprobs: list[TokenLogprobs] | None = None
    finish_reason: str | None = None
    """Set in the answer's last delta alone."""
    stop_reason: str | int | None = None
