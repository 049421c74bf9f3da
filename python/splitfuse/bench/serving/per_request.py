"""Figures of `vllm bench serve` that look at requests one by one, as it defines them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from ..._core import InvalidArgument
from .sla import gaps
from .workload import Record


def ttft(record: Record) -> float:
    """Seconds to the first token; 0 if none came."""
    return record.tokens[0] - record.sent if record.tokens else 0.0


def tpot(record: Record) -> float:
    """Mean seconds a token after the first; 0 if there is no other."""
    if not record.tokens or record.count < 2:
        return 0.0
    return (record.tokens[-1] - record.tokens[0]) / (record.count - 1)


def latency(record: Record) -> float:
    """Seconds from question to end; 0 if it has not ended."""
    return record.ended - record.sent if record.ended is not None else 0.0


_BOUNDED = {"ttft": ttft, "tpot": tpot, "e2el": latency}


@dataclass(frozen=True)
class Goodput:
    """What makes a request good: at most so many milliseconds of "ttft", "tpot" and "e2el", where bounds are given."""

    bounds: dict[str, float]

    @staticmethod
    def parse(pairs: Sequence[str]) -> Goodput:
        """Of "ttft:500 tpot:50", as vLLM's --goodput. Raises InvalidArgument."""
        bounds = {}
        for pair in pairs:
            name, _, value = pair.partition(":")
            try:
                bound = float(value)
            except ValueError:
                bound = -1.0
            if name not in _BOUNDED or not 0 <= bound < float("inf"):
                raise InvalidArgument(f"--goodput {pair}: give {', '.join(_BOUNDED)} as NAME:MILLISECONDS")
            bounds[name] = bound
        return Goodput(bounds)

    def passes(self, record: Record) -> bool:
        """Of a completed request."""
        return all(1e3 * _BOUNDED[name](record) <= bound for name, bound in self.bounds.items())


def peaks(done: Sequence[Record]) -> dict[str, float | int]:
    """Of completed requests: the most tokens in one of the seconds that begin with the first request, and the most
    requests that were open at once."""
    begin = min((record.sent for record in done), default=0.0)
    by_second = Counter(int(token - begin) for record in done for token in record.tokens)
    changes = [(record.sent, 1) for record in done]
    changes += [(record.sent + latency(record), -1) for record in done]
    most = is_open = 0
    for _, change in sorted(changes):  # at one moment, ends come first
        is_open += change
        most = max(most, is_open)
    return {
        "max_output_tokens_per_s": float(max(by_second.values(), default=0)),
        "max_concurrent_requests": most,
    }


def details(records: Sequence[Record]) -> dict[str, list[Any]]:
    """Lists with an entry a request, in the order they were sent, failed ones too; seconds. Not `generated_texts`:
    prompts are random tokens, and nobody reads what is said to them."""
    records = sorted(records, key=lambda record: record.sent)
    return {
        "input_lens": [record.prompt_tokens for record in records],
        "output_lens": [record.count if record.completed else 0 for record in records],
        "ttfts": [ttft(record) for record in records],
        "itls": [gaps(record).tolist() for record in records],
        "latencies": [latency(record) for record in records],
        "start_times": [record.sent for record in records],
        "errors": [record.error or "" for record in records],
    }
