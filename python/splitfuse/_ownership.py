"""Who owns an engine: the caller of `step()`, or a thread of the scheduler's own after `start()`."""

from __future__ import annotations

import contextlib
import logging
import threading
from abc import ABC, abstractmethod
from collections.abc import Iterator

from ._core import StateError

_log = logging.getLogger("splitfuse")


class Owned(ABC):
    """The life of a scheduler, whose requests and steps are the subclass's."""

    def __init__(self) -> None:
        self._lock = threading.Condition()  # guards what follows, and what the subclass says
        self._thread: threading.Thread | None = None
        self._stopping: str | None = None  # "drain" | "abort" while stop() is at work
        self._closed = False

        self._owner = threading.Lock()  # held by the thread that owns the engine

    @property
    @abstractmethod
    def has_work(self) -> bool:
        """True while a request is not done."""

    @abstractmethod
    def _turn(self) -> object:
        """One step."""

    @abstractmethod
    def _end_all(self, reason: str, error: Exception | None = None) -> None:
        """Ends every request."""

    @abstractmethod
    def _forget_cancels(self) -> None:
        """Of requests that have ended all the same."""

    @abstractmethod
    def _tell_failure(self, error: Exception) -> None:
        """To whoever wants to know."""

    @contextlib.contextmanager
    def _owned(self) -> Iterator[None]:
        if not self._owner.acquire(blocking=False):
            raise StateError("another thread is stepping this scheduler; stop() ends that of start()")
        try:
            yield
        finally:
            self._owner.release()

    def start(self) -> None:
        """Begins a thread that owns the engine and sleeps while there is nothing to do. `stop` ends it."""
        with self._lock:
            if self._closed or self._thread is not None:
                raise StateError(f"the scheduler is {'closed' if self._closed else 'started already'}")
            if not self._owner.acquire(blocking=False):
                raise StateError("another thread is stepping this scheduler")
            self._thread = threading.Thread(target=self._run, name="splitfuse", daemon=True)
            self._thread.start()

    def stop(self, *, drain: bool = True, timeout: float | None = None) -> None:
        """Takes no more requests until those there are have finished, or with `drain=False` been cancelled,
        and ends the thread of `start()`, if any. After that the scheduler can be stepped or started again.
        Called from a callback it returns at once, and the thread ends after it. Raises TimeoutError if the
        thread has not ended after `timeout` seconds; it still is to."""
        with self._lock:
            thread = self._thread
            if thread is None and not self._owner.acquire(blocking=False):
                raise StateError("another thread is stepping this scheduler")
            self._stopping = "drain" if drain else "abort"
            self._lock.notify_all()
        if thread is None:
            self._run()
        elif thread is not threading.current_thread():
            thread.join(timeout)
            if thread.is_alive():
                raise TimeoutError(f"a step of the engine has not ended within {timeout:g} s")

    def close(self, timeout: float | None = None) -> None:
        """Cancels every request, as `stop` does, and takes none any more. The engine stays as it is."""
        with self._lock:
            self._closed = True
        self.stop(drain=False, timeout=timeout)

    def abandon(self, error: Exception) -> None:
        """For `on_failure`, where the engine is not to be stepped again: ends every request with the error,
        those that wait too, takes none any more, and lets the thread end."""
        with self._lock:
            self._closed = True
            self._stopping = "abort"
        self._end_all("error", error)

    def _run(self) -> None:
        """Owns the engine until stopped."""
        try:
            while self._awaits_work():
                try:
                    self._turn()
                except Exception as error:  # none is known, but nobody may be left waiting
                    _log.exception("the scheduler failed; every request ends with the error")
                    self._end_all("error", error)
                    self._tell_failure(error)
        finally:
            self._end_all("abort")
            with self._lock:
                self._forget_cancels()
                self._thread = self._stopping = None
                self._owner.release()

    def _awaits_work(self) -> bool:
        """Sleeps until there is work (True), or it is time to stop (False)."""
        with self._lock:
            while not self.has_work and self._stopping is None:
                self._lock.wait()
            return self.has_work and self._stopping != "abort"
