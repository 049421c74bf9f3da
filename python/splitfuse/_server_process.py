"""A `splitfuse serve` of one's own: a child process that never outlives its parent, whatever ends that.

This file is both sides of it: `ServerProcess` starts it as `python -m splitfuse._server_process`, which watches the
parent and runs the command.
"""

from __future__ import annotations

import contextlib
import os
import re
import signal
import subprocess
import sys
import threading
import time
import weakref
from collections import deque
from collections.abc import Iterator, Sequence
from typing import IO

from ._http import Address, Calls, ServerError

_LOOK = 0.05  # seconds between looks at a server that is starting
_PATIENCE = 1.0  # seconds for its /health to answer
_WATCH = 0.5  # seconds between the child's looks at its parent
_KEPT = 50  # lines of what it printed that are kept
_URL = re.compile(rb"splitfuse: (http://\S+)")


class ServerProcess:
    """Runs `splitfuse serve ARGUMENTS`, which are to name the port. It ends with this object, or with this
    process.

    `grace`: seconds that it may take to end when told to; then it is killed. `api_key` is handed over through a
    pipe: a command line can be read by everyone on the machine.
    """

    def __init__(self, arguments: Sequence[str], grace: float, api_key: str | None = None) -> None:
        command = [sys.executable, "-m", __name__, str(os.getpid()), str(grace), "serve", *arguments]
        with _readable(api_key) as keys:
            self._process = subprocess.Popen(
                [*command, *(f"--api-key-file=/dev/fd/{fd}" for fd in keys)],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                pass_fds=keys,
                start_new_session=True,  # Ctrl-C in the terminal is for the parent, who decides
            )
        self._printed = _Printed(self._process.stdout)
        self._end = weakref.finalize(self, _end, self._process, grace)

    def wait_ready(self, timeout: float) -> str:
        """The URL it serves at, once it does. Raises ServerError, with what it printed, if it ends before or takes
        longer than `timeout` seconds."""
        until = time.monotonic() + timeout
        try:
            while time.monotonic() < until:
                if self.ends_within(_LOOK):
                    raise ServerError(f"the server ended while it started, {self.how_it_ended()}")
                url = self._printed.url
                if url is not None and _healthy(url):
                    return url
            self.end()
            raise ServerError(f"the server was not ready after {timeout:g} s{self._printed.last()}")
        except BaseException:
            self.end()
            raise

    def ends_within(self, seconds: float) -> bool:
        """Waits for its end; says whether it has ended."""
        try:
            self._process.wait(seconds)
        except subprocess.TimeoutExpired:
            return False
        return True

    def how_it_ended(self) -> str:
        """With which exit code, and the last that it printed."""
        return f"with exit code {self._process.wait()}{self._printed.last()}"

    def end(self) -> None:
        """SIGTERM, and SIGKILL after the grace time. Does nothing if it has ended."""
        self._end()


class _Printed:
    """Reads what a process prints, for it must not wait for a reader, and keeps the end of it."""

    def __init__(self, pipe: IO[bytes] | None) -> None:
        assert pipe is not None
        self.url: str | None = None
        """Where it says that it will serve."""
        self._lines: deque[bytes] = deque(maxlen=_KEPT)
        self._pipe = pipe
        self._thread = threading.Thread(target=self._read, name="splitfuse-server-output", daemon=True)
        self._thread.start()

    def last(self) -> str:
        """ ": " and the last lines, or "" if there were none. To be asked of a process that has ended."""
        self._thread.join(1.0)
        text = b"".join(self._lines).decode(errors="replace").strip()
        return f": {text}" if text else ""

    def _read(self) -> None:
        with self._pipe as pipe:
            for line in pipe:
                self._lines.append(line)
                if self.url is None and (found := _URL.search(line)):
                    self.url = found[1].decode()


@contextlib.contextmanager
def _readable(text: str | None) -> Iterator[list[int]]:
    """A descriptor from which `text` can be read once; none if there is no text."""
    if text is None:
        yield []
        return
    reader, writer = os.pipe()
    try:
        with open(writer, "w") as file:
            file.write(text)
        yield [reader]
    finally:
        os.close(reader)


def _healthy(url: str) -> bool:
    try:
        Calls(Address(url), patience=_PATIENCE).probe("/health")
    except ServerError:
        return False
    return True


def _end(process: subprocess.Popen[bytes], grace: float) -> None:
    process.terminate()
    try:
        process.wait(grace)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()


# ---------------------------------------------------------------- the child


def _watch(parent: int, grace: float) -> None:
    """Ends this process when `parent` has gone."""
    while os.getppid() == parent:
        time.sleep(_WATCH)
    os.kill(os.getpid(), signal.SIGTERM)
    time.sleep(grace)
    os.kill(os.getpid(), signal.SIGKILL)


def _main(parent: str, grace: str, *command: str) -> int:
    threading.Thread(target=_watch, args=(int(parent), float(grace)), daemon=True).start()
    from .cli import main

    return main(command)


if __name__ == "__main__":
    sys.exit(_main(*sys.argv[1:]))
