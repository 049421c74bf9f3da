"""uvicorn's HTTP protocol, with bounds on what a client may send before its request is complete, and on how long
it may leave what it is sent.

uvicorn keeps every header it is sent, and waits for ever: for the rest of a request's head, and for a client to
take its answer.
"""

from __future__ import annotations

import asyncio
from typing import Any, ClassVar

from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from .settings import Limits, Settings

_TOO_MANY = b"HTTP/1.1 431 Request Header Fields Too Large\r\nconnection: close\r\ncontent-length: 0\r\n\r\n"


class BoundedProtocol(HttpToolsProtocol):
    limits: ClassVar[Limits]
    stall_timeout: ClassVar[float]

    _deadline: asyncio.TimerHandle | None = None
    _head = 0  # bytes of the present request's line and headers
    _stall: asyncio.TimerHandle | None = None
    _unsent = 0  # bytes that waited for the reader when _stall was set

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        # So that pause_writing tells of every reader who leaves something lying, and not of large amounts alone.
        transport.set_write_buffer_limits(high=0)
        self._deadline = self.loop.call_later(self.limits.head_seconds, self._out_of_time)

    def connection_lost(self, exc: Exception | None) -> None:
        self._disarm()
        self._disarm_stall()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        # The parser gives a header only once it is complete, so what it holds back is counted here.
        if self._deadline is not None:
            self._head += len(data)
            if self._head > self.limits.header_bytes + len(data):
                self._refuse()
                return
        super().data_received(data)

    def on_message_begin(self) -> None:
        super().on_message_begin()
        # With it a response can be broken off without waiting for a reader who does not read.
        self.scope["extensions"] = {"splitfuse.abort": {"call": self.transport.abort}}
        if self._deadline is None:  # a further request of the same connection
            self._head = 0
            self._deadline = self.loop.call_later(self.limits.head_seconds, self._out_of_time)

    def on_header(self, name: bytes, value: bytes) -> None:
        super().on_header(name, value)
        if len(self.headers) == self.limits.headers + 1:
            self._refuse()

    def on_headers_complete(self) -> None:
        self._disarm()
        if len(self.headers) <= self.limits.headers:
            super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        if self.cycle is not None:
            super().on_body(body)

    def on_message_complete(self) -> None:
        if self.cycle is not None:
            super().on_message_complete()

    def pause_writing(self) -> None:
        super().pause_writing()
        self._arm_stall()

    def resume_writing(self) -> None:
        self._disarm_stall()
        super().resume_writing()

    def _arm_stall(self) -> None:
        self._unsent = self.transport.get_write_buffer_size()
        self._stall = self.loop.call_later(self.stall_timeout, self._look_at_reader)

    def _look_at_reader(self) -> None:
        """Whether the answer is still being made or not: who takes nothing is cut off; who is slow is not."""
        if self.transport.get_write_buffer_size() < self._unsent:
            self._arm_stall()
        else:
            self.transport.abort()

    def _disarm_stall(self) -> None:
        if self._stall is not None:
            self._stall.cancel()
            self._stall = None

    def _refuse(self) -> None:
        if not self.transport.is_closing():
            self.transport.write(_TOO_MANY)
            self.transport.close()

    def _out_of_time(self) -> None:
        self._deadline = None
        self.transport.abort()

    def _disarm(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def uvicorn_options(settings: Settings) -> dict[str, Any]:
    limits = settings.limits
    # uvicorn makes one of these a connection, and knows nothing of ours to give it.
    bounds = {"limits": limits, "stall_timeout": settings.stall_timeout}
    protocol = type("BoundedProtocol", (BoundedProtocol,), bounds)
    return {"http": protocol, "timeout_keep_alive": limits.idle_seconds, "ws": "none"}
