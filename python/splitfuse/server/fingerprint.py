"""OpenAI's `system_fingerprint`: servers that have the same give the same answers to the same request and seed."""

from __future__ import annotations

import hashlib
import re

from .. import __version__

# What an answer's bits do not depend on.
_SAME_NUMBERS = re.compile(r"\d+ (pinned )?threads?|token budget \d+")


def fingerprint(model: str, config: str, engine: str) -> str:
    """ "splitfuse-VERSION-HASH" of a model's name and configuration, and of what `Engine.describe()` says of device,
    instruction set and formats. Weights of the same name are taken for the same."""
    parts = [part for part in engine.split(", ") if not _SAME_NUMBERS.fullmatch(part)]
    digest = hashlib.sha256("\n".join([__version__, model, config, *parts]).encode()).hexdigest()
    return f"splitfuse-{__version__}-{digest[:8]}"
