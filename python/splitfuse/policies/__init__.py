"""Scheduling policies: each is a `plan()` over the same engine, kernels and KV pool.

`splitfuse`, the default, is native. The others are those that Dynamic SplitFuse replaced, to be compared with
it on one's own load, and two that go on from it. docs/policies.md says when to use which.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

from .._core import ConfigError
from ..scheduler import Scheduler
from .even import Even
from .mlfq import Mlfq
from .orca import Orca
from .prefill_first import PrefillFirst
from .static_batch import StaticBatch
from .static_chunk import StaticChunk

if TYPE_CHECKING:
    from .._core import Engine
    from ..tokenizer import Tokenizer

POLICIES: dict[str, type[Scheduler]] = {
    "splitfuse": Scheduler,
    "prefill_first": PrefillFirst,
    "orca": Orca,
    "static_chunk": StaticChunk,
    "static_batch": StaticBatch,
    "even": Even,
    "mlfq": Mlfq,
}

_WHOLE_SEQUENCE = 1 << 20  # tokens; an engine takes it as its longest sequence


def _policy(name: str) -> type[Scheduler]:
    if name not in POLICIES:
        raise ConfigError(f"there is no policy {name!r}; there are: {', '.join(POLICIES)}")
    return POLICIES[name]


def make_scheduler(
    name: str, engine: Engine, tokenizer: Tokenizer | None = None, **options: Any
) -> Scheduler:
    """The scheduler of that policy; `options` are those of `Scheduler`. Raises ConfigError if there is no
    such policy."""
    return _policy(name)(engine, tokenizer, **options)


def step_tokens(*names: str) -> int:
    """What `EngineConfig.max_step_tokens` must be for an engine that runs these policies: those that never
    split a prompt need forwards as long as the longest sequence."""
    whole = [name for name in names if getattr(_policy(name), "whole_prompts", False)]
    return _WHOLE_SEQUENCE if whole else 0
