"""Runs the application under uvicorn: sockets, signals, the end."""

from __future__ import annotations

import asyncio
import logging
import os
import signal
import socket
import sys
import threading
from types import FrameType

import uvicorn

from .._core import ConfigError
from .app import create_app
from .http_protocol import uvicorn_options
from .open_files import raise_limit, too_few
from .runtime import Runtime
from .settings import Settings

_log = logging.getLogger("splitfuse")
_BACKLOG = 2048
_KEEP_ALIVE = {socket.TCP_KEEPIDLE: 60, socket.TCP_KEEPINTVL: 15, socket.TCP_KEEPCNT: 4}
_LAST_WORDS = 5  # seconds for answers to be written after the requests have ended
_LOOK = 0.05  # seconds between looks at a drain
_FAILED = 1


def serve(settings: Settings, *, access_log: bool = False) -> int:
    """Serves until SIGTERM or SIGINT, which let what runs finish within `drain_timeout`; a second one ends at
    once. The exit code: 0, or 1 if the engine has failed and stays down; with 1 it ends the process itself where a
    step hangs. Raises what loading the model raises, and ConfigError if the address can't be had."""
    app = create_app(settings)
    open_files = raise_limit()
    listener = _listen(settings)
    config = uvicorn.Config(
        app,
        backlog=_BACKLOG,
        log_level="warning" if not access_log else "info",
        access_log=access_log,
        server_header=False,
        timeout_graceful_shutdown=_LAST_WORDS,
        **uvicorn_options(settings),
    )
    host, port = listener.getsockname()[:2]
    _say(f"splitfuse: http://{f'[{host}]' if ':' in host else host}:{port} (loading {settings.model})")
    server = _Server(config, app.state.runtime, open_files)
    if threading.current_thread() is threading.main_thread():
        # What uvicorn puts back at the end: a second signal that comes late finds a server that has ended well.
        for number in (signal.SIGTERM, signal.SIGINT):
            signal.signal(number, signal.SIG_IGN)
    server.run(sockets=[listener])
    if server.load_error is not None:
        raise server.load_error
    if app.state.runtime.given_up:
        _say(f"splitfuse: error: the engine has failed: {app.state.runtime.failure}")
        return _FAILED
    return 0


def _listen(settings: Settings) -> socket.socket:
    """Bound before the model is loaded: that a port is taken shows at once."""
    try:
        found = socket.getaddrinfo(settings.host, settings.port, type=socket.SOCK_STREAM)
        family, kind, number, _, address = found[0]
        listener = socket.socket(family, kind, number)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        # What follows is inherited by what is accepted. A client that vanished without a word is noticed,
        # 2 minutes later.
        listener.setsockopt(socket.IPPROTO_TCP, socket.TCP_NODELAY, 1)
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for option, value in _KEEP_ALIVE.items():
            listener.setsockopt(socket.IPPROTO_TCP, option, value)
        listener.bind(address)
        listener.setblocking(False)
    except OSError as error:
        raise ConfigError(
            f"can't listen on {settings.host} port {settings.port}: {error.strerror or error}"
        ) from None
    return listener


class _Server(uvicorn.Server):
    def __init__(self, config: uvicorn.Config, runtime: Runtime, open_files: int) -> None:
        """`open_files`: how many there may be."""
        super().__init__(config)
        self.load_error: Exception | None = None
        self._runtime = runtime
        self._open_files = open_files
        self._announced = False

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """uvicorn's own would raise the signal again at the end: a drained server has not died of it."""
        self.force_exit = self.should_exit
        self.should_exit = True

    async def on_tick(self, counter: int) -> bool:
        runtime = self._runtime
        if not self._announced and runtime.ready:
            self._announced = True
            self._announce()
        if not self._announced and runtime.failure is not None:
            self.load_error = runtime.failure
            return True
        if runtime.given_up and not runtime.settings.stay_up:
            return True  # a supervisor starts it anew
        return await super().on_tick(counter)

    def _announce(self) -> None:
        runtime = self._runtime
        engine = runtime.served.engine.describe()
        _say(f"splitfuse: serving {runtime.names[0]}, policy {runtime.settings.policy}; {engine}")
        assert runtime.capacity is not None
        running = runtime.capacity.max_sequences
        if warning := too_few(self._open_files, runtime.settings.limits.queued, running):
            _say(f"splitfuse: {warning}")

    async def shutdown(self, sockets: list[socket.socket] | None = None) -> None:
        """Listens on meanwhile, so that a load balancer sees /ready fail, and clients a 503."""
        runtime = self._runtime
        runtime.draining = True
        loop = asyncio.get_running_loop()
        until = loop.time() + runtime.settings.drain_timeout
        if runtime.open_requests and not self.force_exit:
            _say(f"splitfuse: {runtime.open_requests} requests may finish; a second signal ends them")
        while runtime.open_requests and not self.force_exit and loop.time() < until:
            await asyncio.sleep(_LOOK)
        runtime.cancel_all()
        self.force_exit = False  # what has ended is still written out, within seconds
        await super().shutdown(sockets)
        if runtime.stuck is not None:
            # Python would wait for the thread, and the engine can't be taken down under it.
            _say(f"splitfuse: error: {runtime.stuck}: ending without it")
            os._exit(_FAILED)


def _say(text: str) -> None:
    print(text, file=sys.stderr, flush=True)
