"""The requests that wait for admission to the engine. Guarded by its owner's lock."""

from __future__ import annotations

import heapq
from typing import TYPE_CHECKING

from ._core import Error, InvalidArgument

if TYPE_CHECKING:
    from .request import Request


class QueueFull(Error):
    """Refused: as many requests wait as may. Try again later."""


class Intake:
    """A queue by (priority, arrival). `most`: requests that may wait, None: any number."""

    def __init__(self, most: int | None) -> None:
        if most is not None and most < 0:
            raise InvalidArgument(f"max_queued must be 0 or more, or None, not {most}")
        self.waiting = 0
        self._most = most
        self._heap: list[tuple[int, int, Request]] = []  # those that were dropped leave it when they surface

    def add(self, request: Request, arrival: int) -> None:
        if self._most is not None and self.waiting >= self._most:
            raise QueueFull(f"{self.waiting} requests wait already, as many as may (max_queued)")
        heapq.heappush(self._heap, (request.priority, arrival, request))
        self.waiting += 1

    def first_priority(self) -> int | None:
        """Of whom `pop` would give; None if nobody waits."""
        while self._heap and not self._heap[0][2]._queued:
            heapq.heappop(self._heap)
        return self._heap[0][0] if self._heap else None

    def pop(self) -> Request:
        """After `first_priority` has found somebody."""
        request = heapq.heappop(self._heap)[2]
        self.drop(request)
        return request

    def drop(self, request: Request) -> None:
        """Takes it out; does nothing if it waits no more."""
        if request._queued:
            request._queued = False
            self.waiting -= 1

    def everyone(self) -> list[Request]:
        return [request for _, _, request in self._heap if request._queued]
