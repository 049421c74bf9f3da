"""Integers that were fitted to a model's matrices, kept in the user's cache: fitting takes time, opening them none.

An entry is a canonical checkpoint without its tokenizer, in a directory whose name is a hash of all that it depends on.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import re
import shutil
import tempfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import replace
from pathlib import Path

from . import _core, hub
from ._core import CheckpointError, ConfigError
from ._progress import byte_bar, on_terminal
from .loader import CHECKPOINT_FILE, LoadedModel

_log = logging.getLogger("splitfuse")

FITTING = 1
"""To be raised with every change of the integers that a model comes to, or of the file that holds them."""
KEPT = 4
"""Entries that stay, those last used."""
_ENTRY = re.compile(r"[0-9a-f]{32}")
_WORK = ".fit-"


def folder() -> Path:
    return hub.cache_dir() / "quantized"


def with_integers(loaded: LoadedModel, quantize: str, say: Callable[[str], None]) -> LoadedModel:
    """`loaded`, its weights read from the cache, where they are put first if they are not there yet. `loaded` itself
    if nothing has to be fitted for `quantize` ("dense", "int8" or "int4"), and, after a warning, if the cache can't be
    written. `say` is told where they are."""
    if not loaded.files or not loaded.is_fitted(quantize):
        return loaded
    try:
        entry = folder() / _key(loaded, quantize)
        weights = _open(entry, loaded, quantize)
        if weights is None:
            _write(entry, loaded, quantize)
            weights = _open(entry, loaded, quantize)
    except (OSError, RuntimeError) as error:  # RuntimeError: no home directory, or a CheckpointError
        _log.warning(
            "the %s matrices of %s are not kept for the next start: %s", quantize, loaded.name, error
        )
        return loaded
    if weights is None:  # another process found it damaged or removed it
        return loaded
    say(f"matrices {quantize} from {entry}")
    return replace(loaded, weights=weights)


def _key(loaded: LoadedModel, quantize: str) -> str:
    files = []
    for file in loaded.files:
        path = file.resolve()
        status = path.stat()
        files.append((str(path), status.st_size, status.st_mtime_ns))
    text = json.dumps([FITTING, _core.__version__, quantize, loaded.config.to_json(), files])
    return hashlib.sha256(text.encode()).hexdigest()[:32]


def _open(entry: Path, loaded: LoadedModel, quantize: str) -> _core.WeightSource | None:
    """The weights of an entry; None if there is none. A damaged one is removed."""
    file = entry / CHECKPOINT_FILE
    if not file.is_file():
        return None
    try:
        config, weights = _core.open_checkpoint(str(file))
    except (CheckpointError, ConfigError):
        weights = None
    if weights is None or weights.format != quantize or config.to_json() != loaded.config.to_json():
        shutil.rmtree(entry, ignore_errors=True)
        return None
    with suppress(OSError):  # a cache that is only read is good too
        os.utime(entry)
    return weights


def _write(entry: Path, loaded: LoadedModel, quantize: str) -> None:
    """Raises OSError or CheckpointError, and leaves nothing behind, if it can't be done."""
    folder().mkdir(parents=True, exist_ok=True)
    _remove_abandoned()
    title = f"Fitting {loaded.name} to {quantize}"
    with _work_folder() as work, byte_bar(title, on_terminal()) as progress:
        new = work / entry.name
        new.mkdir()
        loaded.save_weights(new / CHECKPOINT_FILE, None, progress, quantize)
        hub.install(new, entry)
    _remove_old()


@contextmanager
def _work_folder() -> Iterator[Path]:
    """A directory that is locked for as long as this process works in it."""
    work = Path(tempfile.mkdtemp(prefix=_WORK, dir=folder()))
    lock = os.open(work, os.O_RDONLY)
    try:
        fcntl.flock(lock, fcntl.LOCK_EX)
        yield work
    finally:
        shutil.rmtree(work, ignore_errors=True)
        os.close(lock)


def _remove_abandoned() -> None:
    """What processes left that were killed at work."""
    for work in folder().glob(f"{_WORK}*"):
        with suppress(OSError):
            lock = os.open(work, os.O_RDONLY | os.O_DIRECTORY | os.O_NOFOLLOW)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(work, ignore_errors=True)
            finally:
                os.close(lock)


def _remove_old() -> None:
    """Whoever has an entry open goes on reading it: the file is mapped."""
    entries = []
    for path in folder().iterdir():
        if _ENTRY.fullmatch(path.name) and path.is_dir() and not path.is_symlink():
            with suppress(OSError):  # another process was faster
                entries.append((path.stat().st_mtime_ns, path))
    for _, path in sorted(entries, reverse=True)[KEPT:]:
        shutil.rmtree(path, ignore_errors=True)
