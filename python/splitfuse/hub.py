"""Models by their name on the Hugging Face hub, and the user's cache folder."""

from __future__ import annotations

import os
import re
import shutil
import threading
from collections.abc import Iterable
from pathlib import Path

from ._core import CheckpointError

_REPO_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")
_SECONDS = 10.0  # for the first answer; a download may take its time
_SIDE_FILES = re.compile(
    r"(config|generation_config|tokenizer|tokenizer_config|special_tokens_map|added_tokens|vocab|chat_template)\.json"
    r"|merges\.txt|tokenizer\.model|chat_template\.jinja"
)
_SAFETENSORS = re.compile(r"model(-\d+-of-\d+)?\.safetensors|model\.safetensors\.index\.json")
_BIN = re.compile(r"pytorch_model(-\d+-of-\d+)?\.bin|pytorch_model\.bin\.index\.json")


def cache_dir() -> Path:
    """$SPLITFUSE_CACHE, else splitfuse in $XDG_CACHE_HOME, else in ~/.cache. Not made here."""
    if own := os.environ.get("SPLITFUSE_CACHE"):
        return Path(own).expanduser()
    return Path(os.environ.get("XDG_CACHE_HOME") or "~/.cache").expanduser() / "splitfuse"


def install(finished: Path, target: Path) -> None:
    """Moves the directory of a finished checkpoint into the cache. Another process may have been faster; then its one
    stays. Raises OSError."""
    try:
        os.rename(finished, target)
    except OSError:
        if not (target / "model.safetensors").is_file():
            shutil.rmtree(target, ignore_errors=True)
            os.rename(finished, target)


def is_repo_id(name: str) -> bool:
    return _REPO_ID.fullmatch(name) is not None and ".." not in name and "--" not in name


def is_offline() -> bool:
    """Whether the user forbids the hub, with HF_HUB_OFFLINE."""
    from huggingface_hub import constants

    return bool(constants.HF_HUB_OFFLINE)


def is_reachable(repo: str, seconds: float) -> bool:
    """Whether the hub answers for `repo` within `seconds`, come what may: a name server can be slow beyond
    any timeout of the client."""
    answers: list[bool] = []

    def ask() -> None:
        try:
            from huggingface_hub import HfApi

            HfApi().model_info(repo, timeout=seconds)
            answers.append(True)
        except Exception:  # whatever the reason, it does not answer
            return

    thread = threading.Thread(target=ask, daemon=True)
    thread.start()
    thread.join(seconds)
    return bool(answers)


def cached_snapshot(repo: str, revision: str | None = None) -> Path | None:
    """The folder of `repo` in the hub's cache, if its configuration and weights are there; touches no
    network."""
    from huggingface_hub import snapshot_download

    try:  # the client would miss the files that were never asked for
        folder = snapshot_download(
            repo, revision=revision, local_files_only=True, allow_patterns="config.json"
        )
    except (OSError, ValueError):
        return None
    here = [file.name for file in Path(folder).iterdir()]
    whole = "config.json" in here and any(
        _SAFETENSORS.fullmatch(name) or _BIN.fullmatch(name) for name in here
    )
    return Path(folder) if whole else None


def snapshot(repo: str, revision: str | None = None) -> Path:
    """The folder of `repo`, with the files that a model needs downloaded where they are not here yet.

    Raises CheckpointError, in one line, if it can't be had.
    """
    from huggingface_hub import HfApi, snapshot_download
    from huggingface_hub import errors as hub_errors

    if is_offline():
        return _only_cached(repo, revision, "HF_HUB_OFFLINE is set")
    try:
        siblings = HfApi().model_info(repo, revision=revision, timeout=_SECONDS).siblings or []
        wanted = _choose(repo, [sibling.rfilename for sibling in siblings])
        return Path(snapshot_download(repo, revision=revision, allow_patterns=wanted))
    except hub_errors.GatedRepoError:
        raise CheckpointError(
            f"{repo}: access is restricted; ask for it at https://huggingface.co/{repo} and log in with "
            "`hf auth login`"
        ) from None
    except hub_errors.RevisionNotFoundError:
        raise CheckpointError(f"{repo}: the hub has no revision {revision!r}") from None
    except hub_errors.RepositoryNotFoundError:
        raise CheckpointError(
            f"{repo}: neither a file or directory here nor a model on the Hugging Face hub; for a private "
            "one log in with `hf auth login`"
        ) from None
    except CheckpointError:
        raise
    except Exception as error:  # the client's HTTP library has its own kinds, and they change
        return _only_cached(repo, revision, f"the Hugging Face hub can't be reached ({_first_line(error)})")


def _only_cached(repo: str, revision: str | None, reason: str) -> Path:
    path = cached_snapshot(repo, revision)
    if path is None:
        raise CheckpointError(
            f"{repo}: no such file or directory, {reason}, and the hub's cache does not have it"
        )
    return path


def _choose(repo: str, files: Iterable[str]) -> list[str]:
    names = list(files)
    for whole, weights in (("model.safetensors", _SAFETENSORS), ("pytorch_model.bin", _BIN)):
        shards = [name for name in names if weights.fullmatch(name)]
        if chosen := [whole] if whole in names else shards:
            return [*chosen, *(name for name in names if _SIDE_FILES.fullmatch(name))]
    other = [name for name in names if name.endswith((".gguf", ".safetensors", ".bin"))]
    hint = f"; it has {', '.join(other[:3])}: download one and give its path" if other else ""
    raise CheckpointError(f"{repo}: the model has neither model.safetensors nor pytorch_model.bin{hint}")


def _first_line(error: Exception) -> str:
    text = str(error).strip()
    return text.splitlines()[0] if text else type(error).__name__
