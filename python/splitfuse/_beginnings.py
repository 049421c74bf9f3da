"""When the sequences of requests begin: first forward, first token, what the prefix cache had of them."""

from __future__ import annotations

import time
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from . import _core
    from .request import Request


class Beginnings:
    """Holds the sequences without a first token, by the engine's id, and costs nothing while there are none."""

    def __init__(self, engine: _core.Engine) -> None:
        self._engine = engine
        self._fresh: dict[int, Request] = {}

    def add(self, sequence: int, request: Request) -> None:
        self._fresh[sequence] = request

    def drop(self, sequence: int) -> None:
        self._fresh.pop(sequence, None)

    def note(self, output: _core.StepOutput, began: float) -> None:
        """Writes down whom the step that `began` then has begun, and given a first token."""
        if not self._fresh:
            return
        now = time.monotonic()
        for sequence, _ in output.chunks:
            request = self._fresh.get(sequence)
            if request is not None and request.times.started is None:
                request.times.started = began
        for sequence in output.ids[output.finish != 3].tolist():
            request = self._fresh.pop(sequence, None)
            if request is not None and request.times.first_token is None:
                request.times.first_token = now
                request.cached_tokens = self._engine.query(sequence).cached
