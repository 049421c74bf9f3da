"""What `splitfuse run-batch` does: a file of requests, answered in process by as many at once as fill the engine."""

from __future__ import annotations

import asyncio
import contextlib
import logging
import threading
import time
from collections import deque
from collections.abc import Awaitable, Callable, Iterable, Mapping
from typing import Any

from .._core import Error
from .._progress import CountBar
from ..request import Request
from .batch_file import Ask, Asks, Result, Results, result
from .errors import ApiError
from .runtime import Runtime, StepRecord
from .settings import Settings

_log = logging.getLogger("splitfuse")
_LOOK = 0.5  # seconds between looks at the progress
_PACE_LOOKS = 20  # over which the tokens a second are taken
_DOUBT = 5.0  # seconds that an engine may take to say whether it failed, or only a request did

Answer = Callable[[str, Mapping[str, Any]], Awaitable[tuple[int, dict[str, Any]]]]


class Meter:
    """Counts tokens: an `Observer` of a runtime."""

    def __init__(self) -> None:
        self.read = 0
        """Prompt tokens computed."""
        self.made = 0
        """Answer tokens."""
        self.steps = 0
        self._marks = deque([(time.monotonic(), 0, 0)], _PACE_LOOKS)

    def on_step(self, step: StepRecord) -> None:
        self.steps += 1
        self.read += step.output.prefill_tokens
        self.made += len(step.output.ids)

    def on_end(self, request: Request) -> None:
        pass

    def pace(self) -> str:
        """Tokens a second of late; to be asked every now and then."""
        since, read, made = self._marks[0]
        now = (time.monotonic(), self.read, self.made)
        self._marks.append(now)
        seconds = max(1e-3, now[0] - since)
        return f"{(now[1] - read) / seconds:,.0f} prompt + {(now[2] - made) / seconds:,.0f} answer tokens/s"


async def run_batch(
    settings: Settings, asks: Asks, results: Results, *, limit: int, total: int | None, shown: bool
) -> Meter:
    """Loads the model and writes the results of all `asks`, `limit` of them at once, as they come. `total`:
    results in the end, for the bar that is `shown`. Raises Error if the engine fails, and what loading, reading
    and writing raise; what has no result by then is for another run."""
    from .answers import answer

    runtime = Runtime(settings)
    meter = Meter()
    runtime.observers.append(meter)

    async def ask(url: str, body: Mapping[str, Any]) -> tuple[int, dict[str, Any]]:
        try:
            status, reply = await answer(runtime, url, body)
        except Exception:
            _log.exception("a request could not be answered")
            return 500, ApiError(500, "the request could not be answered").body
        if status >= 500:
            await _certainty(runtime, meter)
            if runtime.failure is not None:
                raise Error(f"the engine has failed: {runtime.failure}")
        return status, reply

    with CountBar("Answering", total, shown) as bar:
        try:
            await runtime.start()
            watch = asyncio.ensure_future(_watch(bar, results, meter))
            try:
                await answer_all(asks, results, ask, limit)
            finally:
                watch.cancel()
        finally:
            await runtime.stop()
    return meter


async def _certainty(runtime: Runtime, meter: Meter) -> None:
    """Waits for a sign of the engine's life or of its failure: a step that fails ends its requests first."""
    steps, until = meter.steps, time.monotonic() + _DOUBT
    while runtime.failure is None and meter.steps == steps and time.monotonic() < until:
        await asyncio.sleep(0.01)


async def _watch(bar: CountBar, results: Results, meter: Meter) -> None:
    while True:
        await asyncio.sleep(_LOOK)
        bar.update(results.count, meter.pace())


async def answer_all(asks: Iterable[Ask | Result], results: Results, answer: Answer, limit: int) -> None:
    """Holds at most `limit` of `asks` at a time. They are taken on a thread of their own, as a file may be slow,
    and so is a pipe."""
    loop = asyncio.get_running_loop()
    inbox: asyncio.Queue[Ask | Result | BaseException | None] = asyncio.Queue()
    room = threading.Semaphore(limit)
    stopped = threading.Event()

    def read() -> None:
        last: BaseException | None = None
        with contextlib.suppress(RuntimeError):  # the loop has been closed, so nobody listens any more
            try:
                room.acquire()
                for item in asks:
                    loop.call_soon_threadsafe(inbox.put_nowait, item)
                    room.acquire()
                    if stopped.is_set():
                        return
            except Exception as error:
                last = error
            loop.call_soon_threadsafe(inbox.put_nowait, last)

    async def work() -> None:
        while isinstance(item := await inbox.get(), (Ask, dict)):
            if isinstance(item, Ask):
                item = result(item.custom_id, *await answer(item.url, item.body))
            results.add(item)
            room.release()
        inbox.put_nowait(item)  # the others are to end too
        if item is not None:
            raise item

    threading.Thread(target=read, name="splitfuse-batch", daemon=True).start()
    workers = [asyncio.ensure_future(work()) for _ in range(limit)]
    try:
        await asyncio.gather(*workers)
    except Error:
        # No new ones; and those that are open end at once, but for answers that are complete and being written out.
        stopped.set()
        while not inbox.empty():
            inbox.get_nowait()
        inbox.put_nowait(None)
        await asyncio.gather(*workers, return_exceptions=True)
        raise
    finally:
        stopped.set()
        room.release()
        for worker in workers:
            worker.cancel()
        await asyncio.gather(*workers, return_exceptions=True)
