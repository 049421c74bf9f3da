"""What clients ask for, as FastGen's benchmark did: normal lengths, forced answers, random tokens."""

from __future__ import annotations

import random
from dataclasses import dataclass, field

DEVIATION = 0.3
"""Of the lengths, as a share of their mean."""


@dataclass(frozen=True)
class Ask:
    """One request: a prompt of token ids, and how many tokens are to come back."""

    prompt: list[int]
    output: int


@dataclass
class Record:
    """What became of one request. Times are seconds of one clock."""

    prompt_tokens: int
    output_tokens: int
    """Asked for."""
    sent: float
    tokens: list[float] = field(default_factory=list)
    """When each token came; a server may send several at once."""
    ended: float | None = None
    error: str | None = None
    made: int | None = None
    """Tokens that the server counted, where it tells."""

    @property
    def count(self) -> int:
        return len(self.tokens) if self.made is None else self.made

    @property
    def completed(self) -> bool:
        return self.ended is not None and self.error is None


def make_asks(
    count: int, prompt: int, output: int, vocab_size: int, longest: int, seed: int, salt: str = ""
) -> list[Ask]:
    """`count` requests with lengths Normal(mean, 0.3 mean), within 1 and three times the mean; prompt and answer
    together at most `longest` tokens. No two share a prefix; with another `salt` neither do those of the same seed,
    whose lengths are the same."""
    rng, tokens = random.Random(seed), random.Random(f"{seed} {salt}")

    def length(mean: int, most: int) -> int:
        return max(1, min(round(rng.gauss(mean, DEVIATION * mean)), 3 * mean, most))

    asks = []
    for _ in range(count):
        answer = length(output, longest - 1)
        size = length(prompt, longest - answer)
        asks.append(Ask([tokens.randrange(vocab_size) for _ in range(size)], answer))
    return asks
