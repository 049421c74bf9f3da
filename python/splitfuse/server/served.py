"""What answers requests: a model, its engine and its scheduler."""

from __future__ import annotations

from functools import cached_property
from typing import TYPE_CHECKING

from .._core import Engine
from ..scheduler import Scheduler
from .fingerprint import fingerprint

if TYPE_CHECKING:
    from ..loader import LoadedModel
    from ..tokenizer import Tokenizer

_LAST_STEP = 5.0  # seconds that a step may take to end when the server does


class Served:
    """A model and the engine and scheduler that run it: what a restart replaces as a whole."""

    def __init__(self, loaded: LoadedModel, engine: Engine, scheduler: Scheduler) -> None:
        self.loaded = loaded
        self.engine = engine
        self.scheduler = scheduler
        self.tokenizer: Tokenizer | None = loaded.tokenizer
        self.failed = False

    @cached_property
    def fingerprint(self) -> str:
        config = self.engine.model_config.to_json()
        return fingerprint(self.loaded.name, config, self.engine.describe())

    def close(self) -> None:
        """Raises TimeoutError if a step hangs: then the engine can't be closed."""
        self.scheduler.close(_LAST_STEP)
        self.engine.close()
