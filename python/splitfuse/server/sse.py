"""Server-sent events as an ASGI response of our own: all that has come since the last look goes out as one
message, a client that went away is noticed at once, and one that only waits is told that we are still here."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from typing import Any

from fastapi import Response
from starlette.types import Receive, Scope, Send

from .errors import ApiError
from .frames import DONE, Frames, event
from .stream import Stream

KEEP_ALIVE = 15.0
"""Seconds between looks whether there has been a frame; if not, a comment is sent, so that nothing on the way
gives the connection up."""


async def until_gone(receive: Receive) -> None:
    """Waits until the client has gone away."""
    while (await receive())["type"] != "http.disconnect":
        pass


class EventStream(Response):
    """`last`: the frame that may follow when all streams have ended. The response begins with the first frame, so
    that a request which fails before is answered with a status of its own. A reader that is cut off gets no
    clean end: its task is cancelled by its stream."""

    def __init__(
        self,
        streams: Sequence[Stream],
        frames: Sequence[Frames],
        last: Callable[[], dict[str, Any] | None],
        headers: Mapping[str, str],
    ) -> None:
        super().__init__(headers=headers, media_type="text/event-stream")
        del self.headers["content-length"]
        self.headers["cache-control"] = "no-cache"
        self.headers["x-accel-buffering"] = "no"
        self._streams = streams
        self._frames = frames
        self._last = last
        self._begun = False
        self._beginning = asyncio.Lock()
        self._silent = True

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        self._send = send
        watch = asyncio.ensure_future(self._watch(receive))
        try:
            try:
                await self._run()
                last = self._last()
            except ApiError as failure:
                if not self._begun:
                    raise
                last = failure.body
            await self._write(DONE if last is None else event(last) + DONE, more=False)
        finally:
            watch.cancel()
            self._cancel()

    async def _run(self) -> None:
        # A task each, as a stream that overflows cuts off the task that reads it. One's own is also resumed sooner
        # than this one, below all the layers of the application.
        pumps = [
            asyncio.ensure_future(self._pump(*pair)) for pair in zip(self._streams, self._frames, strict=True)
        ]
        try:
            await asyncio.gather(*pumps)
        finally:
            for pump in pumps:
                pump.cancel()

    async def _pump(self, stream: Stream, frames: Frames) -> None:
        while deltas := await stream.deltas():
            await self._write(frames.write(deltas))
        if rest := frames.end():
            await self._write(rest)

    async def _write(self, text: str, more: bool = True) -> None:
        if not self._begun:
            await self._begin()
        self._silent = False
        await self._send({"type": "http.response.body", "body": text.encode(), "more_body": more})

    async def _begin(self) -> None:
        async with self._beginning:
            if not self._begun:
                await self._send({"type": "http.response.start", "status": 200, "headers": self.raw_headers})
                self._begun = True

    async def _watch(self, receive: Receive) -> None:
        """Until the client has gone away; then nothing is made for it any more."""
        gone = asyncio.ensure_future(until_gone(receive))
        try:
            while not gone.done():
                self._silent = True
                await asyncio.wait([gone], timeout=KEEP_ALIVE)
                if self._silent and not gone.done():
                    await self._write(": keep-alive\n\n")
        finally:
            gone.cancel()
        self._cancel()

    def _cancel(self) -> None:
        for stream in self._streams:
            stream.cancel()
