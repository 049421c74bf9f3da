"""Several servers of one model on this machine, for as long as they are measured."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

from ..._server_process import ServerProcess

_START = 600.0  # seconds that loading may take
_GRACE = 5.0  # seconds to end in


@contextlib.contextmanager
def replicas(
    model: str, count: int, options: Mapping[str, Any], more: Sequence[str] = ()
) -> Iterator[list[str]]:
    """Starts `count` times `splitfuse serve MODEL` with these engine options, on free ports of the loopback
    address; gives their URLs and ends them. Raises ServerError if one does not start."""
    command = [model, "--port", "0", *engine_arguments(options), *more]
    with contextlib.ExitStack() as stack:
        servers = []
        for _ in range(count):
            server = ServerProcess(command, _GRACE)
            stack.callback(server.end)
            servers.append(server)
        yield [server.wait_ready(_START) for server in servers]


def engine_arguments(options: Mapping[str, Any]) -> list[str]:
    """What `splitfuse.cli.options.engine_options` has read, as the options it was read from."""
    arguments = []
    for name, value in options.items():
        option = name.replace("_", "-")
        if isinstance(value, bool):
            arguments.append(f"--{option}" if value else f"--no-{option}")
        elif value is not None:
            arguments += [f"--{option}", str(value)]
    return arguments
