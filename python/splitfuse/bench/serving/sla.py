"""When a request was served well enough: FastGen's service level, and the same scaled to a machine.

FastGen (DeepSpeed blog, 2023) calls a request good if its first token came within prompt / 512 seconds, and the
exponential moving average of the time between its tokens stayed under 1/2, 1/4 or 1/6 s at every token. On four
A100 and a 70B model the forward of a mean prompt of 2600 tokens took 0.53 s; so these bounds were 9.6 forwards
for the first token and 0.94, 0.47 and 0.31 of one between tokens. A faster or slower machine, or another model,
is held to the same multiples of its own forward.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import numpy.typing as npt

from .workload import Record

EMA_SPAN = 16
_TTFT_FORWARDS = 9.6
_ITL_FORWARDS = {"lax": 0.94, "mid": 0.47, "tight": 0.31}
_PROMPT_RATE = 512.0  # prompt tokens a second
_TOKEN_RATES = (2.0, 4.0, 6.0)  # answer tokens a second


@dataclass(frozen=True)
class Sla:
    """A first token within `ttft_per_token` seconds a prompt token, and an average gap under `itl` seconds."""

    name: str
    ttft_per_token: float
    itl: float

    def passes(self, record: Record) -> bool:
        if not record.completed or not record.tokens:
            return False
        if record.tokens[0] - record.sent > self.ttft_per_token * record.prompt_tokens:
            return False
        return bool((moving_average(gaps(record)) < self.itl).all())


def published() -> list[Sla]:
    """FastGen's, as they were."""
    return [Sla(f"{rate:g} tok/s", 1 / _PROMPT_RATE, 1 / rate) for rate in _TOKEN_RATES]


def scaled(forward_seconds: float, mean_prompt: int) -> list[Sla]:
    """FastGen's in multiples of what the forward of the mean prompt alone takes here."""
    ttft = _TTFT_FORWARDS * forward_seconds / mean_prompt
    return [Sla(name, ttft, share * forward_seconds) for name, share in _ITL_FORWARDS.items()]


def gaps(record: Record) -> npt.NDArray[np.float64]:
    """Seconds between tokens, without the wait for the first."""
    return np.diff(np.asarray(record.tokens, np.float64))


def moving_average(values: Sequence[float] | npt.NDArray[np.float64]) -> npt.NDArray[np.float64]:
    """The exponentially weighted mean of all values up to each, with weights (1 - 2 / (span + 1)) ** age that are
    divided by their sum: pandas' `ewm(span=16).mean()`."""
    keep = 1 - 2 / (EMA_SPAN + 1)
    averages = np.empty(len(values))
    total = weight = 0.0
    for i, value in enumerate(values):
        total = total * keep + float(value)
        weight = weight * keep + 1.0
        averages[i] = total / weight
    return averages
