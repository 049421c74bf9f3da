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
from functools import partial
from typing import TYPE_CHECKING, Any, Protocol

from .._core import Capacity, InvalidArgument, ModelConfig, StateError, StepOutput
from ..request import Delta, Request, SamplingParams
from ..scheduler import QueueFull, Scheduler
from .errors import ApiError
from .served import Served
from .settings import Settings
from .stream import Stream

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

_log = logging.getLogger("splitfuse")
_WATCH = 0.5  # seconds between looks at slow readers
_RATE_WINDOW = 64  # requests over whose ends the pace is taken, for Retry-After
_LAST_STEP = 5.0  # seconds that loading may take to end when the server does
_PAUSE = 1.0  # seconds between attempts to build the engine anew
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


class Runtime:
    """Make it, `await start()`, `submit`, `await stop()`. Methods belong to the event loop."""

    def __init__(self, settings: Settings) -> None:
        self.settings = settings
        self.observers: list[Observer] = []
        self.created = int(time.time())
        self.draining = False
        self.failure: Exception | None = None
        """Why the engine is down, if it is."""
        self.given_up = False
        """Whether it stays down: no restarts are left."""
        self.stuck: str | None = None
        """After `stop`: what has not ended, and keeps the process from ending in good order."""
        self.restarts = 0
        self.rejections: Counter[str] = Counter()
        """Requests that were in order and not taken in, by reason: "queue_full", "draining", "unavailable"."""
        self._served: Served | None = None
        self._loading: asyncio.Future[Served] | None = None
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
        """Takes no more requests, cancels those there are, and closes the engine: see `stuck`."""
        self.draining = True
        for task in list(self._tasks):
            task.cancel()
        served = self._served
        if self._loading is not None and served is None:
            await asyncio.wait([self._loading], timeout=_LAST_STEP)
            if not self._loading.done():  # a thread that loads can't be stopped
                self.stuck = "the model is still being loaded"
            elif self._loading.exception() is None:
                served = self._loading.result()
        if served is not None:
            try:
                await asyncio.to_thread(served.close)
            except TimeoutError as error:
                self.stuck = str(error)
            await asyncio.sleep(0)  # the cancelled requests' ends are delivered
            self._served = None
        self._workers.shutdown(wait=False)

    async def _build(self) -> None:
        self._loading = asyncio.ensure_future(asyncio.to_thread(self._load))
        self._served = await asyncio.shield(self._loading)
        self._capacity = self._served.engine.query()
        self._moved = time.monotonic()
        self.failure = None
        self._served.scheduler.start()

    def _load(self) -> Served:
        from ..engine_setup import load_engine
        from ..policies import make_scheduler, step_tokens

        loaded, engine = load_engine(
            self.settings.model, max_step_tokens=step_tokens(self.settings.policy), **self.settings.engine
        )
        # Each tells whose it is: one that failed is still heard of when another one is at work.
        scheduler: Scheduler = make_scheduler(
            self.settings.policy,
            engine,
            loaded.tokenizer,
            max_queued=self.settings.limits.queued,
            max_queued_tokens=self.settings.limits.queued_tokens,
            on_step=lambda output: self._on_step(scheduler, output),
            on_failure=lambda error: self._on_failure(scheduler, error),
        )
        return Served(loaded, engine, scheduler)

    async def _rebuild(self, served: Served) -> None:
        """After a failure, until it succeeds or no restarts are left. Whoever was being served has been told."""
        self._served = None
        try:
            await asyncio.to_thread(served.close)
        except TimeoutError as error:
            self.failure = error
            self._give_up()
            return
        while self.restarts < self.settings.restarts and not self.draining:
            self.restarts += 1
            try:
                await self._build()
                _log.warning("the engine is back (restart %d of %d)", self.restarts, self.settings.restarts)
                return
            except Exception as error:
                self.failure = error
                _log.exception("the engine could not be built anew")
            await asyncio.sleep(_PAUSE)
        self._give_up()

    def _give_up(self) -> None:
        if not self.draining:
            _log.error("the engine has failed and stays down: %s", self.failure)
            self.given_up = True

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

    def answers_to(self, name: str) -> bool:
        """Also to the model as the operator gave it, a path perhaps, which is what vLLM's clients ask for."""
        return name in self.names or (not self.settings.served_names and name == self.settings.model)

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
        served = self._served  # once: it is asked from other threads while it may be replaced
        return served.scheduler.queued if served is not None else 0

    def sick(self) -> str | None:
        """Why the server can't be called healthy, or None: it is loading, has failed, or work waits and no
        step has ended for `health_timeout`."""
        if self.failure is not None:
            return "the engine has failed"
        served = self._served
        if served is None:
            return "the model is being loaded"
        idle = time.monotonic() - self._moved
        if served.scheduler.has_work and idle > self.settings.health_timeout:
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
                keep_logprobs=not streamed,
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

    def _on_step(self, scheduler: Scheduler, output: StepOutput | None) -> None:
        served = self._served
        if served is not None and served.scheduler is scheduler:
            self._capacity = capacity = served.engine.query()  # a cancelled request changes it without a step
            if output is not None:
                ended = time.monotonic()
                if output.chunks:  # a policy that holds everything back for ever must show
                    self._moved = ended
                seconds = (output.host_us + output.forward_us) / 1e6
                record = StepRecord(ended, seconds, output, capacity, scheduler.queued, scheduler)
                for observer in self.observers:
                    observer.on_step(record)
        if self._outbox:
            self._wake()

    def _on_done(self, stream: Stream, request: Request) -> None:
        self._outbox.append((stream, None))
        self._wake()
        for observer in self.observers:
            observer.on_end(request)

    def _on_failure(self, scheduler: Scheduler, error: Exception) -> None:
        served = self._served
        if served is not None and served.scheduler is scheduler:
            self.failure = error
            self._call(partial(self._failed, served))
        scheduler.abandon(error)  # what waits would be run by an engine that is not trusted any more

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

    def _failed(self, served: Served) -> None:
        """The engine's state is not trusted any more, so those that wait for it end as those it ran have."""
        if served.failed or served is not self._served:
            return  # heard of already
        served.failed = True
        for stream in list(self._streams):
            stream.fail(ApiError(500, "the engine has failed"))
        if self.restarts < self.settings.restarts and not self.draining:
            self._spawn(self._rebuild(served))
        else:
            self._give_up()
