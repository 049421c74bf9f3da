"""A small deterministic engine in Python: the same four verbs as `splitfuse.Engine`, a model of one line.

The next token is a function of the history, the seed and the sample index, so a test knows every answer
beforehand. It keeps the contract that schedulers rely on: one owner thread, refusals at put(), decodes before
prompts, a token budget, finished sequences that stay until flush(), and a prefix cache that it only counts.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from types import SimpleNamespace
from typing import Any

import numpy as np

from splitfuse import InvalidArgument, StateError, StepPlan
from splitfuse._core import Limits, SeqView

EOS = 0


def next_token(history: Sequence[int], seed: int, sample_index: int, vocab_size: int) -> int:
    """Never EOS."""
    value = sum(position * token for position, token in enumerate(history[-4:], 1)) + 7 * len(history)
    return 1 + (value * 2654435761 + seed * 40503 + sample_index * 9176) % (vocab_size - 1)


def answer(
    prompt: Sequence[int], count: int, *, seed: int = 0, sample_index: int = 0, vocab_size: int = 128
) -> list[int]:
    """The `count` tokens that FakeEngine makes of `prompt`."""
    history = list(prompt)
    for _ in range(count):
        history.append(next_token(history, seed, sample_index, vocab_size))
    return history[len(prompt) :]


@dataclass
class _Sequence:
    id: int
    tokens: list[int]
    prompt: int
    params: Any
    priority: int
    arrival: int
    computed: int = 0
    finished: bool = False
    salt: str = ""


@dataclass
class FakeEngine:
    vocab_size: int = 128
    max_model_len: int = 256
    max_sequences: int = 8
    token_budget: int = 32
    max_step_tokens: int = 32
    choose: Callable[[Sequence[int], int, int, int], int] = next_token
    delay: float = 0.0  # seconds a step takes
    fail: Callable[[int], Exception | None] = lambda step: None
    puts: list[int] = field(default_factory=list)
    flushed: list[int] = field(default_factory=list)
    planned: list[StepPlan] = field(default_factory=list)
    steps: int = 0
    cached_tokens: int = 0

    def __post_init__(self) -> None:
        self.model_config = SimpleNamespace(vocab_size=self.vocab_size)
        self.sequences: dict[int, _Sequence] = {}
        self.most_live = 0
        self.closed = False
        self._prefixes: set[tuple[str, tuple[int, ...]]] = set()
        self._busy = threading.Lock()

    def query(self, seq_id: int | None = None) -> Any:
        if seq_id is not None:
            return SimpleNamespace(cached=0)
        return SimpleNamespace(
            max_model_len=self.max_model_len,
            max_sequences=self.max_sequences,
            token_budget=self.token_budget,
            max_step_tokens=max(self.max_step_tokens, self.token_budget),
        )

    def put(
        self, seq_id: int, tokens: Sequence[int], params: Any, priority: int = 0, cache_salt: str = ""
    ) -> None:
        with self._owned():
            if seq_id in self.sequences:
                raise InvalidArgument(f"sequence {seq_id} is still being served")
            if len(tokens) + params.max_tokens > self.max_model_len:
                raise InvalidArgument("too long")
            self.puts.append(seq_id)
            self.sequences[seq_id] = _Sequence(
                seq_id, list(tokens), len(tokens), params, priority, len(self.puts), salt=cache_salt
            )
            self.most_live = max(self.most_live, len(self.sequences))

    def flush(self, seq_id: int) -> None:
        with self._owned():
            if seq_id not in self.sequences:
                raise InvalidArgument(f"no sequence {seq_id}")
            self.flushed.append(seq_id)
            del self.sequences[seq_id]

    def view(self) -> tuple[list[SeqView], Limits]:
        views = [SeqView(s.id, len(s.tokens), s.computed, 0, 0, s.priority) for s in self._in_order()]
        return views, Limits(
            max_tokens=self.token_budget,
            max_seqs=self.max_sequences,
            free_blocks=1000,
            total_blocks=1000,
            block_size=16,
        )

    def has_work(self) -> bool:
        return any(not s.finished for s in self.sequences.values())

    def close(self) -> None:
        self.closed = True

    def step(self, plan: StepPlan | None = None) -> Any:
        with self._owned():
            self.steps += 1
            if self.delay:
                time.sleep(self.delay)
            if (error := self.fail(self.steps)) is not None:
                raise error
            chunks = self._own_plan() if plan is None else list(plan.chunks)
            if plan is not None:
                self.planned.append(plan)
                if any(seq_id not in self.sequences for seq_id, _ in chunks):
                    raise InvalidArgument("the plan names an unknown sequence")
            return self._run(chunks)

    def _run(self, chunks: list[tuple[int, int]]) -> Any:
        rows: list[Any] = []
        prompt: list[Any] = []
        decodes = prefills = cached = 0
        for seq_id, count in chunks:
            s = self.sequences[seq_id]
            if s.computed == 0 and (s.salt, tuple(s.tokens[: s.prompt])) in self._prefixes:
                hit = s.prompt - 1
                s.computed += hit
                cached += hit
                count = min(count, len(s.tokens) - s.computed)
            if s.computed and len(s.tokens) - s.computed == 1:
                decodes += count
            else:
                prefills += count
            s.computed += count
            if s.computed < len(s.tokens):
                continue
            if len(s.tokens) == s.prompt:
                self._prefixes.add((s.salt, tuple(s.tokens)))
                if s.params.prompt_logprobs >= 0:
                    prompt += [
                        self._logprob(seq_id, s.tokens[i], s.params.prompt_logprobs, i)
                        for i in range(1, s.prompt)
                    ]
            rows.append(self._sample(s))
        self.cached_tokens += cached
        return SimpleNamespace(
            ids=np.array([r.id for r in rows], np.int64),
            tokens=np.array([r.token for r in rows], np.int32),
            finish=np.array(
                [{None: 0, "stop": 1, "length": 2, "error": 3}[r.finish] for r in rows], np.uint8
            ),
            sampled=rows,
            prompt=prompt,
            chunks=chunks,
            preempted=[],
            decode_tokens=decodes,
            prefill_tokens=prefills,
            cached_tokens=cached,
            host_us=1.0,
            forward_us=1.0,
        )

    def _sample(self, s: _Sequence) -> Any:
        token = self.choose(s.tokens, s.params.seed, s.params.sample_index, self.vocab_size)
        finish = None
        if token < 0:
            finish = "error"
        else:
            s.tokens.append(token)
            made = len(s.tokens) - s.prompt
            if token in s.params.stop_token_ids or (token == EOS and not s.params.ignore_eos):
                finish = "stop"
            elif made >= s.params.max_tokens:
                finish = "length"
        s.finished = finish is not None
        row = self._logprob(s.id, token, max(s.params.logprobs, 0))
        row.finish = finish
        return row

    def _logprob(self, seq_id: int, token: int, top: int, position: int = -1) -> Any:
        others = [((token + i) % self.vocab_size, -float(i) - 1) for i in range(top)]
        return SimpleNamespace(id=seq_id, token=token, logprob=-0.5, rank=1, top=others, position=position)

    def _in_order(self) -> list[_Sequence]:
        live = [s for s in self.sequences.values() if not s.finished]
        return sorted(live, key=lambda s: (s.priority, s.arrival))

    def _own_plan(self) -> list[tuple[int, int]]:
        room, chunks = self.token_budget, []
        live = self._in_order()
        for decode in (True, False):
            for s in live:
                left = len(s.tokens) - s.computed
                if room and len(chunks) < self.max_sequences and (s.computed > 0 and left == 1) == decode:
                    chunks.append((s.id, min(left, room)))
                    room -= chunks[-1][1]
        return chunks

    def _owned(self) -> Any:
        if self.closed:
            raise StateError("the engine is closed")
        if not self._busy.acquire(blocking=False):
            raise StateError("two threads at once")
        return _Release(self._busy)


class _Release:
    def __init__(self, lock: threading.Lock) -> None:
        self._lock = lock

    def __enter__(self) -> None: ...

    def __exit__(self, *_: object) -> None:
        self._lock.release()


class FakeTokenizer:
    """One character a token: id 65 is "A". Id 0 is a special token, "<end>"."""

    joins_bytes = False

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        return [ord(c) for c in text]

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return "".join(
            "" if i == EOS and skip_special_tokens else "<end>" if i == EOS else chr(i) for i in ids
        )

    def token_text(self, token: int) -> str:
        return self.decode([token], skip_special_tokens=False)

    def is_special(self, token: int) -> bool:
        return token == EOS

    def is_byte(self, token: int) -> bool:
        return False

    def id_to_token(self, token: int) -> str | None:
        return self.token_text(token)


def spells(text: str) -> Callable[[Sequence[int], int, int, int], int]:
    """A model that says `text` after a prompt that ends in "|", then EOS for ever."""

    def choose(history: Sequence[int], seed: int, sample_index: int, vocab_size: int) -> int:
        done = len(history) - 1 - max(i for i, t in enumerate(history) if t == ord("|"))
        return ord(text[done]) if done < len(text) else EOS

    return choose
