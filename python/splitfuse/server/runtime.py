"""The engine behind a server: loads it, hands requests to its thread and tokens back, knows how it does.

Two threads matter. The event loop's takes requests in and writes answers out; the scheduler's owns the engine.
They meet here alone: `submit` and `cancel` go one way, and what a step made comes back in one wake-up of the
loop, so neither waits for the other.
"""

from __future__ import annotations

import asyncio
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Protocol

from .._core import Capacity, Engine, InvalidArgument, ModelConfig, StateError, StepOutput
from ..request import Delta, Request, SamplingParams
from ..scheduler import QueueFull, Scheduler
from .errors import ApiError
from .settings import Settings
from .stream import Stream

if TYPE_CHECKING:
    from ..loader import LoadedModel
    from ..tokenizer import Tokenizer

_log = logging.getLogger("splitfuse")
_WATCH = 0.5  # seconds between looks at slow readers
_RATE_WINDOW = 64  # requests over whose ends the pace is taken, for Retry-After
_WORKERS = 2  # threads for tokenising and templates, which must not hold up the loop


@dataclass(frozen=True, slots=True)
class StepRecord:
    """What one forward was. `output` is a copy and may be kept."""

    ended: float
    """`time.monotonic()`."""
    seconds: float
    output: StepOutput
    capacity: Capacity
    """After it."""
    queued: int
    """Requests that wait for admission to the engine."""
    scheduler: Scheduler
    """Whose step it was: another one after a restart."""


class Observer(Protocol):
    """Told of everything, on the engine's thread: be short."""

    def on_step(self, step: StepRecord) -> None: ...

    def on_end(self, request: Request) -> None:
        """A request has ended: see its `output` and `times`."""


class Served:
    """A model and the engine and scheduler that run it: what a restart replaces as a whole."""

    def __init__(self, loaded: LoadedModel, engine: Engine, scheduler: Scheduler) -> None:
        self.loaded = loaded
        self.engine = engine
        self.scheduler = scheduler
        self.tokenizer: Tokenizer | None = loaded.tokenizer

    def close(self) -> None:
        self.scheduler.close()
        self.engine.close()


class Runtime:
    """Make it, `await start()`, `submit`, `await stop()`. Methods belong to the event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.observers: list[Observer] = []
        self.created = int(time.time())
        self.draining = False
        self.failure: Exception | None = None
        """Why the engine is down, if it is."""
        self.restarts = 0
        self.rejections: Counter[str] = Counter()
        """Requests that were in order and not taken in, by reason: "queue_full", "draining", "unavailable"."""
        self._served: Served | None = None
        self._loop: asyncio.AbstractEventLoop | None = None
        self._workers = ThreadPoolExecutor(_WORKERS, "splitfuse-text")
        self._streams: set[Stream] = set()
        self._tasks: set[asyncio.Task[None]] = set()
        self._ends: deque[float] = deque(maxlen=_RATE_WINDOW)
        # Written by the engine's thread.
        self._outbox: deque[tuple[Stream, Delta | None]] = deque()
        self._capacity: Capacity | None = None
        self._moved = time.monotonic()  # when a step last ended

    # ---------------------------------------------------------------- life

    async def start(self) -> None:
        """Loads the model and starts its thread. Raises what loading raises."""
        self._loop = asyncio.get_running_loop()
        await self._build()
        self._spawn(self._watch())

    def cancel_all(self) -> None:
        """Ends every open request with what it has."""
        for stream in list(self._streams):
            stream.cancel()

    async def stop(self) -> None:
        """Takes no more requests, cancels those there are, and closes the engine."""
        self.draining = True
        for task in list(self._tasks):
            task.cancel()
        if self._served is not None:
            await asyncio.to_thread(self._served.close)
            await asyncio.sleep(0)  # the cancelled requests' ends are delivered
            self._served = None
        self._workers.shutdown(wait=False)

    async def _build(self) -> None:
        self._served = await asyncio.to_thread(self._load)
        self._capacity = self._served.engine.query()
        self._moved = time.monotonic()
        self.failure = None
        self._served.scheduler.start()

    def _load(self) -> Served:
        from ..llm import load_engine
        from ..policies import make_scheduler, step_tokens

        loaded, engine = load_engine(
            self.settings.model, max_step_tokens=step_tokens(self.settings.policy), **self.settings.engine
        )
        scheduler = make_scheduler(
            self.settings.policy,
            engine,
            loaded.tokenizer,
            max_queued=self.settings.limits.queued,
            on_step=self._on_step,
            on_failure=self._on_failure,
        )
        return Served(loaded, engine, scheduler)

    async def _rebuild(self) -> None:
        """After a failure. Whoever was being served has been told by then."""
        served, self._served = self._served, None
        if served is not None:
            await asyncio.to_thread(served.close)
        try:
            await self._build()
            _log.warning("the engine is back (restart %d of %d)", self.restarts, self.settings.restarts)
        except Exception as error:
            self.failure = error
            _log.exception("the engine could not be built anew")

    async def _watch(self) -> None:
        while True:
            await asyncio.sleep(_WATCH)
            now = time.monotonic()
            for stream in list(self._streams):
                stream.check_reader(now)

    def _spawn(self, work: Any) -> None:
        task = asyncio.ensure_future(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    # ---------------------------------------------------------------- what it is

    @property
    def served(self) -> Served:
        """Raises ApiError 503 while there is none."""
        if self._served is None:
            raise self._unavailable()
        return self._served

    @property
    def ready(self) -> bool:
        """Whether requests are taken in."""
        return self._served is not None and self.failure is None and not self.draining

    @property
    def names(self) -> tuple[str, ...]:
        """The names a client may call the model by; the first is shown."""
        return self.settings.served_names or (self.served.loaded.name,)

    @property
    def tokenizer(self) -> Tokenizer:
        """Raises ApiError 400 if the model came without one."""
        if self.served.tokenizer is None:
            raise ApiError(400, "this model came without a tokenizer: give prompts as token ids")
        return self.served.tokenizer

    @property
    def model_config(self) -> ModelConfig:
        return self.served.engine.model_config

    @property
    def max_model_len(self) -> int:
        return self.served.engine.memory_plan.max_model_len

    @property
    def capacity(self) -> Capacity | None:
        """The engine's, as the last step left it; None before it is loaded."""
        return self._capacity

    @property
    def open_requests(self) -> int:
        return len(self._streams)

    @property
    def queued(self) -> int:
        """Requests that wait for admission to the engine."""
        return self._served.scheduler.queued if self._served is not None else 0

    def sick(self) -> str | None:
        """Why the server can't be called healthy, or None: it is loading, has failed, or work waits and no
        step has ended for `health_timeout`."""
        if self.failure is not None:
            return "the engine has failed"
        if self._served is None:
            return "the model is being loaded"
        idle = time.monotonic() - self._moved
        if self._served.scheduler.has_work and idle > self.settings.health_timeout:
            return f"work waits, and no step has ended for {idle:.0f} s"
        return None

    # ---------------------------------------------------------------- requests

    async def in_worker(self, work: Callable[..., Any], *arguments: Any) -> Any:
        """Runs text work (tokenising, templates) on a thread of its own pool."""
        return await asyncio.get_running_loop().run_in_executor(self._workers, work, *arguments)

    def submit(
        self,
        prompt_token_ids: Sequence[int],
        params: SamplingParams,
        *,
        streamed: bool,
        priority: int = 0,
        cache_salt: str = "",
        request_id: str | None = None,
        prompt: str | None = None,
    ) -> Stream:
        """Queues a request. `streamed`: its deltas are wanted, else the result alone. Raises ApiError: 400 if
        it could never be served, 429 if too many wait, 503 if there is no engine to serve it."""
        if not self.ready:
            raise self._turned_away()
        stream = Stream(self.settings.limits.stream_items * params.n, self.settings.stall_timeout)
        scheduler = self.served.scheduler
        if not scheduler.has_work:
            self._moved = time.monotonic()  # it has stood still because there was nothing to do
        try:
            stream.request = scheduler.submit(
                prompt_token_ids,
                params,
                priority=priority,
                cache_salt=cache_salt,
                on_output=(lambda _, delta: self._outbox.append((stream, delta))) if streamed else None,
                on_done=lambda request: self._on_done(stream, request),
                request_id=request_id,
                prompt=prompt,
            )
        except InvalidArgument as error:
            raise ApiError(400, str(error)) from None
        except QueueFull as error:
            self.rejections["queue_full"] += 1
            raise ApiError(429, str(error), retry_after=self._retry_after()) from None
        except StateError:
            raise self._turned_away() from None
        self._streams.add(stream)
        return stream

    def _turned_away(self) -> ApiError:
        self.rejections["draining" if self.draining else "unavailable"] += 1
        return self._unavailable()

    def _unavailable(self) -> ApiError:
        if self.draining:
            return ApiError(503, "the server is shutting down", retry_after=1)
        return ApiError(503, self.sick() or "the engine is not ready", retry_after=1)

    def _retry_after(self) -> int:
        """Seconds until about half of those that wait will have been served, at the present pace."""
        if len(self._ends) < 2:
            return 1
        pace = (len(self._ends) - 1) / max(1e-3, time.monotonic() - self._ends[0])
        return max(1, min(60, round(self.queued / 2 / pace)))

    # ---------------------------------------------------------------- on the engine's thread

    def _on_step(self, output: StepOutput | None) -> None:
        served = self._served
        if served is not None:
            self._capacity = capacity = served.engine.query()  # a cancelled request changes it without a step
            if output is not None:
                self._moved = time.monotonic()
                seconds = (output.host_us + output.forward_us) / 1e6
                scheduler = served.scheduler
                record = StepRecord(self._moved, seconds, output, capacity, scheduler.queued, scheduler)
                for observer in self.observers:
                    observer.on_step(record)
        if self._outbox:
            self._wake()

    def _on_done(self, stream: Stream, request: Request) -> None:
        self._outbox.append((stream, None))
        self._wake()
        for observer in self.observers:
            observer.on_end(request)

    def _on_failure(self, error: Exception) -> None:
        self.failure = error
        self._call(self._failed)

    def _wake(self) -> None:
        self._call(self._deliver)

    def _call(self, callback: Callable[[], None]) -> None:
        assert self._loop is not None
        try:
            self._loop.call_soon_threadsafe(callback)
        except RuntimeError:  # the loop has been closed, so nobody listens any more
            _log.debug("the event loop is closed")

    # ---------------------------------------------------------------- back on the loop

    def _deliver(self) -> None:
        while self._outbox:
            stream, delta = self._outbox.popleft()
            if delta is not None:
                stream.deliver(delta)
                continue
            self._ends.append(time.monotonic())
            self._streams.discard(stream)
            stream.end()

    def _failed(self) -> None:
        """The engine's state is not trusted any more, so those that wait for it end as those it ran have."""
        for stream in list(self._streams):
            stream.fail(ApiError(500, "the engine has failed"))
        if self.restarts < self.settings.restarts and not self.draining:
            self.restarts += 1
            self._spawn(self._rebuild())
        elif not self.draining:
            _log.error("the engine has failed and stays down: %s", self.failure)
