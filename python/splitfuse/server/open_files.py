"""A connection is an open file, of which the system lets a process have only so many."""

from __future__ import annotations

import contextlib
import resource
import sys

_BESIDE = 64  # open files that are no connections: the loop's, the listener, the weights, what libraries hold


def raise_limit() -> int:
    """Raises the soft limit on open files to the hard one where the system lets it, and gives what it is then."""
    _, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    with contextlib.suppress(ValueError, OSError):
        resource.setrlimit(resource.RLIMIT_NOFILE, (hard, hard))
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return sys.maxsize if soft == resource.RLIM_INFINITY else soft


def too_few(limit: int, queued: int, running: int) -> str | None:
    """What to tell an operator if `limit` open files are fewer than `queued` waiting requests and `running` ones,
    each on a connection of its own, can need; else None."""
    needed = queued + running + _BESIDE
    if limit >= needed:
        return None
    return (
        f"warning: this process may have {limit} open files, but {queued} requests that wait and {running} that "
        f"run can need {needed}: raise the hard limit (ulimit -Hn), or lower --max-queued"
    )
