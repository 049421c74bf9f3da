"""Progress bars on stderr, where it is a terminal; rich is imported only when one is shown."""

from __future__ import annotations

import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import TracebackType

_PATIENCE = 1.0  # seconds that work may take before a bar appears


def on_terminal() -> bool:
    return sys.stderr is not None and sys.stderr.isatty()


@contextmanager
def byte_bar(title: str, shown: bool) -> Iterator[Callable[[int, int], None] | None]:
    """Gives the native `progress(bytes done, bytes in all)`, or None where nothing is shown."""
    if not shown:
        yield None
        return
    from rich.console import Console
    from rich.progress import BarColumn, DownloadColumn, Progress, TextColumn, TransferSpeedColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        DownloadColumn(binary_units=True),
        TransferSpeedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
        task = bar.add_task(title, total=None)
        yield lambda done, total: bar.update(task, completed=done, total=total)


class CountBar:
    """Counts finished requests; appears only if they take longer than a second. `total`: None if unknown."""

    def __init__(self, title: str, total: int | None, shown: bool) -> None:
        self._title = title
        self._total = total
        self._shown = shown
        self._since = time.monotonic()
        self._bar: object = None

    def __enter__(self) -> CountBar:
        return self

    def __exit__(self, *_: type[BaseException] | BaseException | TracebackType | None) -> None:
        if self._bar is not None:
            self._progress.stop()

    def update(self, done: int, note: str = "") -> None:
        if not self._shown or (self._bar is None and time.monotonic() - self._since < _PATIENCE):
            return
        if self._bar is None:
            self._start()
        self._progress.update(self._task, completed=done, note=note)

    def _start(self) -> None:
        from rich.console import Console
        from rich.progress import (
            BarColumn,
            MofNCompleteColumn,
            Progress,
            TextColumn,
            TimeElapsedColumn,
            TimeRemainingColumn,
        )

        columns = (
            TextColumn("{task.description}"),
            BarColumn(),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
            TextColumn("{task.fields[note]}"),
        )
        self._bar = self._progress = Progress(*columns, console=Console(stderr=True), transient=True)
        self._progress.start()
        self._task = self._progress.add_task(self._title, total=self._total, note="")
