"""A real server on a free port: the application under uvicorn, in a thread of the test's own process."""

from __future__ import annotations

import asyncio
import contextlib
import json
import os
import socket
import threading
import time
from collections.abc import Iterator
from dataclasses import replace
from typing import Any

import httpx
import openai
import uvicorn

from splitfuse import Request
from splitfuse.server.app import create_app
from splitfuse.server.http_protocol import uvicorn_options
from splitfuse.server.runtime import Runtime, StepRecord
from splitfuse.server.settings import Settings

PATIENCE = 60.0  # seconds after which a test that waits has failed
TINY_ENGINE = {"dtype": "float32", "threads": 1, "token_budget": 64, "kv_memory": "16MiB", "verbose": False}


class Watch:
    """An observer that only writes down."""

    def __init__(self) -> None:
        self.steps = 0
        self.reasons: list[str] = []
        """Why answers have ended."""

    def on_step(self, step: StepRecord) -> None:
        self.steps += 1

    def on_end(self, request: Request) -> None:
        assert request.output is not None
        self.reasons += [answer.finish_reason for answer in request.output.outputs]


class Running:
    """A server and what a test needs of it."""

    def __init__(
        self, runtime: Runtime, port: int, loop: asyncio.AbstractEventLoop, connections: set[Any]
    ) -> None:
        self.runtime = runtime
        self.port = port
        self.connections = connections
        """Those that the server holds."""
        self.url = f"http://127.0.0.1:{port}"
        self.model = runtime.names[0]
        self._loop = loop

    @property
    def scheduler(self) -> Any:
        return self.runtime.served.scheduler

    def openai(self, **options: Any) -> openai.OpenAI:
        options = {"api_key": "none", "max_retries": 0, "timeout": PATIENCE, **options}
        return openai.OpenAI(base_url=f"{self.url}/v1", **options)

    def async_openai(self) -> openai.AsyncOpenAI:
        return openai.AsyncOpenAI(base_url=f"{self.url}/v1", api_key="none", max_retries=0, timeout=PATIENCE)

    def post(self, path: str, body: Any) -> httpx.Response:
        content = json.dumps(body).encode()  # in ASCII: httpx would not send half a surrogate pair
        headers = {"Content-Type": "application/json"}
        return httpx.post(self.url + path, content=content, headers=headers, timeout=PATIENCE)

    def get(self, path: str) -> httpx.Response:
        return httpx.get(self.url + path, timeout=PATIENCE)

    def used_blocks(self) -> int:
        capacity = self.runtime.capacity
        assert capacity is not None
        return capacity.used_blocks

    def wait_idle(self) -> None:
        """Until nothing runs and no block is held; fails if that never comes."""
        wait_until(lambda: not self.runtime.open_requests and self.used_blocks() == 0)

    @contextlib.contextmanager
    def watched(self) -> Iterator[Watch]:
        watch = Watch()
        self.runtime.observers.append(watch)
        try:
            yield watch
        finally:
            self.runtime.observers.remove(watch)

    def on_loop(self, call: Any) -> Any:
        """Runs the coroutine that `call` makes on the server's event loop."""
        return asyncio.run_coroutine_threadsafe(call(), self._loop).result(PATIENCE)


def wait_until(condition: Any) -> None:
    until = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < until, "waited in vain"
        time.sleep(0.002)


@contextlib.contextmanager
def serving(model: str | os.PathLike[str], *, send_buffer: int = 0, **settings: Any) -> Iterator[Running]:
    """`settings`: fields of Settings; `engine` adds to the options of a tiny engine. `send_buffer`: bytes that the
    system keeps for a client who does not read; 0: as many as it likes."""
    engine = {**TINY_ENGINE, **settings.pop("engine", {})}
    chosen = replace(Settings(os.fspath(model), engine=engine), **settings)
    app = create_app(chosen)
    runtime: Runtime = app.state.runtime
    listener = socket.create_server(("127.0.0.1", 0), backlog=512)
    if send_buffer:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, send_buffer)  # inherited by what is accepted
    config = uvicorn.Config(app, log_level="critical", timeout_graceful_shutdown=1, **uvicorn_options(chosen))
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, kwargs={"sockets": [listener]}, name="serving")
    thread.start()
    try:
        wait_until(lambda: runtime.ready or runtime.failure is not None)
        assert runtime.failure is None, runtime.failure
        assert runtime._loop is not None
        yield Running(runtime, listener.getsockname()[1], runtime._loop, server.server_state.connections)
    finally:
        server.should_exit = True
        thread.join(PATIENCE)
        assert not thread.is_alive(), "the server did not end"
