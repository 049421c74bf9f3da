"""Several servers of one model on this machine, for as long as they are measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence

from ..._server_process import ServerProcess

_START = 600.0  # seconds that loading may take
_GRACE = 5.0  # seconds to end in


@contextlib.contextmanager
def replicas(model: str, count: int, threads: int, arguments: Sequence[str]) -> Iterator[list[str]]:
    """Starts `count` times `splitfuse serve MODEL` with so many threads each, on free ports of the loopback
    address; gives their URLs and ends them. Raises ServerError if one does not start."""
    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(count):
            command = [model, "--port", "0", "--threads", str(threads), *arguments]
            server = ServerProcess(command, _GRACE)
            stack.callback(server.end)
            servers.append(server)
        yield [server.wait_ready(_START) for server in servers]
