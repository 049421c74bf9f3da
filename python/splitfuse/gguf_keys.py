"""The metadata of a GGUF file that is about its architecture, key by key."""

from __future__ import annotations

import math
from collections.abc import Collection
from typing import Any

from ._core import ConfigError
from .gguf_file import GgufFile

# Keys that say nothing which the result depends on.
_HARMLESS = ("vocab_size", "tensor_data_layout", "rope.scaling.finetuned")
_LIMIT = 2**31
_NO_TOKEN = 2**32 - 1


class Keys:
    """Keys below the architecture's name, each asked for once; those never asked for are reported. Every method raises
    ConfigError, naming file and key."""

    def __init__(self, file: GgufFile, supported: Collection[str]) -> None:
        self.file = file
        architecture = file.metadata.get("general.architecture")
        if not isinstance(architecture, str) or architecture not in supported:
            raise ConfigError(
                f"{file.path}: architecture {architecture!r} is not supported in a GGUF file; "
                f"supported: {', '.join(sorted(supported))}"
            )
        if file.metadata.get("split.count", 1) > 1:
            raise ConfigError(
                f"{file.path}: one part of a split GGUF; merge the parts with llama.cpp's gguf-split first"
            )
        self.architecture = architecture
        self._asked = set(_HARMLESS)

    def error(self, key: str, text: str) -> ConfigError:
        return ConfigError(f"{self.file.path}: {self.architecture}.{key} {text}")

    def has(self, tensor: str) -> bool:
        return tensor in self.file.tensors

    def layers(self, key: str, default: Any = None) -> Any:
        """The value, which may be a list, one for each layer."""
        self._asked.add(key)
        return self.file.metadata.get(f"{self.architecture}.{key}", default)

    def get(self, key: str, default: Any = None) -> Any:
        value = self.layers(key, default)
        if isinstance(value, list):
            if len(set(value)) != 1:
                raise self.error(key, "differs from layer to layer, which is not supported")
            return value[0]
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if value is None:
            raise self.error(key, "is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(key, f"is {value!r}; expected a number")
        return value

    def above_zero(self, key: str, default: float | None = None) -> float:
        value = self.number(key, default)
        if not value > 0:
            raise self.error(key, f"is {value}; expected a number above 0")
        return value

    def integer(self, key: str, default: int | None = None, least: int = 1) -> int:
        value = self.number(key, default)
        if not isinstance(value, int) or not least <= value < _LIMIT:
            raise self.error(key, f"is {value!r}; expected {least} to {_LIMIT - 1}")
        return value

    def flag(self, key: str, default: bool) -> bool:
        value = self.get(key, default)
        if not isinstance(value, bool):
            raise self.error(key, f"is {value!r}; expected true or false")
        return value

    def expect(self, key: str, *supported: Any) -> None:
        """The key is missing, or has one of these values."""
        if (value := self.get(key, supported[0])) not in supported:
            only = " or ".join(repr(item) for item in supported)
            raise self.error(key, f"is {value!r}; only {only} is supported")

    def check_rest(self) -> None:
        prefix = f"{self.architecture}."
        for key in self.file.metadata:
            if key.startswith(prefix) and key.removeprefix(prefix) not in self._asked:
                known = ", ".join(sorted(self._asked))
                raise ConfigError(f"{self.file.path}: {key} is not supported; supported: {known}")

    def eos_ids(self) -> list[int]:
        ids: list[int] = []
        for kind in ("eos", "eot", "eom"):  # end of sequence, of turn, of message
            name = f"tokenizer.ggml.{kind}_token_id"
            token = self.file.metadata.get(name, _NO_TOKEN)
            if token == _NO_TOKEN or token in ids:
                continue
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < _LIMIT:
                raise ConfigError(f"{self.file.path}: {name} is {token!r}; expected a token id")
            ids.append(token)
        return ids
