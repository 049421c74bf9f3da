"""Model families. A family is one short file: what its Hugging Face `config.json` means, and how its tensors
are called. Its class name in `architectures` picks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._core import ConfigError
from .family import Family
from .llama import LLAMA

FAMILIES: tuple[Family, ...] = (LLAMA,)

__all__ = ["FAMILIES", "Family", "family_of", "supported_architectures"]


def supported_architectures() -> list[str]:
    return sorted(name for family in FAMILIES for name in family.architectures)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`. Raises ConfigError, listing what is supported, for any other."""
    names = config.get("architectures")
    named = names if isinstance(names, list) else []
    for family in FAMILIES:
        if any(name in family.architectures for name in named):
            return family
    raise ConfigError(
        f"{where}: architecture {', '.join(map(str, named)) or 'not named'} is not supported; "
        f"supported: {', '.join(supported_architectures())}"
    )
