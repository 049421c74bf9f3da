"""The way of one request's tokens from the engine's thread to the event loop."""

from __future__ import annotations

import asyncio
import time
from collections import deque

from ..request import Delta, Request, RequestOutput
from .errors import ApiError


class Stream:
    """What `Runtime.submit` gives back. Its methods belong to the event loop.

    Nobody ever waits for a reader: what it has not taken yet lies in a bounded queue, and a reader that lets
    it overflow, or takes nothing for too long, is cut off: its request is cancelled and its task too.
    """

    def __init__(self, limit: int, stall_timeout: float) -> None:
        """`limit`: deltas, and log-probabilities in them, that may wait for the reader."""
        self.request: Request | None = None  # set once submitted
        self.cut_off = False
        self._limit = limit
        self._stall_timeout = stall_timeout
        self._items: deque[Delta] = deque()
        self._weight = 0  # of those: what `limit` counts
        self._taken = time.monotonic()  # when the reader last took something, or found nothing to take
        self._reader: asyncio.Task[object] | None = None
        self._waiter: asyncio.Future[None] | None = None
        self._ended = False
        self._failure: ApiError | None = None

    async def deltas(self) -> list[Delta]:
        """All that has come since the last call, in order, at least one; [] at the end. Raises ApiError if
        the request has failed. One task alone may call it."""
        if self._reader is None:
            self._reader = asyncio.current_task()
        self._taken = time.monotonic()
        while not self._items and not self._ended:
            await self._wait()
            self._taken = time.monotonic()
        items = list(self._items)
        self._drop_items()
        if not items:
            self._check()
        return items

    async def result(self) -> RequestOutput:
        """Waits for the end. Raises ApiError if the request has failed."""
        while not self._ended:
            await self._wait()
        self._check()
        assert self.request is not None
        assert self.request.output is not None
        return self.request.output

    def cancel(self) -> None:
        """Ends the request at the next step; does nothing once it has ended."""
        if self.request is not None:
            self.request.cancel()

    # ---------------------------------------------------------------- for the runtime

    def deliver(self, delta: Delta) -> None:
        if self.cut_off:
            return
        self._items.append(delta)
        self._weight += 1 if delta.logprobs is None else 1 + sum(map(len, delta.logprobs))
        if self._weight > self._limit:
            self._cut()
        else:
            self._wake()

    def end(self) -> None:
        self._ended = True
        self._wake()

    def fail(self, failure: ApiError) -> None:
        """Ends it with this, whatever becomes of the request."""
        self._failure = self._failure or failure
        self._drop_items()
        self.cancel()
        self.end()

    def check_reader(self, now: float) -> None:
        """Cuts a reader off that has had something to take for too long."""
        if self._items and not self.cut_off and now - self._taken > self._stall_timeout:
            self._cut()

    def _cut(self) -> None:
        self.cut_off = True
        self._drop_items()
        self.cancel()
        if self._reader is not None:
            self._reader.cancel()

    def _drop_items(self) -> None:
        self._items.clear()
        self._weight = 0

    def _check(self) -> None:
        if self._failure is not None:
            raise self._failure
        error = self.request.error if self.request is not None else None
        if error is not None:
            raise failure(error)

    async def _wait(self) -> None:
        self._waiter = asyncio.get_running_loop().create_future()
        try:
            await self._waiter
        finally:
            self._waiter = None

    def _wake(self) -> None:
        if self._waiter is not None and not self._waiter.done():
            self._waiter.set_result(None)


def failure(error: Exception) -> ApiError:
    """What a client is told of a request that failed after it was taken in. Nothing of the engine's insides:
    the log has them."""
    from ..request import NotFinite

    if isinstance(error, NotFinite):
        return ApiError(500, "the model's output is not finite, so no token can be chosen")
    return ApiError(500, "the engine failed while it ran this request")
