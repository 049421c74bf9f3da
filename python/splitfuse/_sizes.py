"""Sizes in bytes, as people write them."""

from __future__ import annotations

import re

from ._core import ConfigError

_UNITS = {
    "": 1,
    "k": 10**3,
    "m": 10**6,
    "g": 10**9,
    "t": 10**12,
    "ki": 2**10,
    "mi": 2**20,
    "gi": 2**30,
    "ti": 2**40,
}


def parse_bytes(value: int | str) -> int:
    """A size: a number of bytes, or text such as "512MiB", "2GB", "1.5 GiB". Raises ConfigError on anything
    else."""
    if isinstance(value, int) and not isinstance(value, bool):
        if value > 0:
            return value
    elif isinstance(value, str):
        match = re.fullmatch(r"\s*(\d+(?:\.\d+)?)\s*([kmgt]?i?)b?\s*", value, re.IGNORECASE)
        if (
            match
            and match[2].lower() in _UNITS
            and (size := int(float(match[1]) * _UNITS[match[2].lower()])) > 0
        ):
            return size
    raise ConfigError(f'a size must be bytes, or text such as "512MiB" or "2GB", not {value!r}')
