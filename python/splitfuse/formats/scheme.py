"""Quantised matrices as tensors like any other."""

from __future__ import annotations

from collections.abc import Callable, Container, Iterable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .._core import CheckpointError
from ..gguf_blocks import Integers
from ..models.family import Array
from ..tensors import Listed, Tensors

Parts = Mapping[str, Array]
# Scales of an 8-bit KV cache that a writer suggests; ours finds its own.
_OF_THE_CACHE = (".k_scale", ".v_scale", ".q_scale", ".output_scale", ".prob_output_scale")
Floats = npt.NDArray[np.float32]
Shapes = Mapping[str, tuple[int, ...]]  # as stored, by ending


@dataclass(frozen=True)
class Scheme:
    """One way to quantise. The matrix X.weight is stored as X + `codes` and tensors X + each of `others`, of which
    those in `optional` may be missing.

    `shape`: of the matrix, from the stored shapes by ending; a ValueError where they don't fit each other. `floats`:
    the matrix [n, k], from the tensors by ending. `integers`: the same as the engine's integers of `format`, for
    matrices that `keeps` tells have such a form, from the stored shapes and the tensors whose endings `looks_at` has.
    """

    kind: str
    codes: str
    others: tuple[str, ...]
    shape: Callable[[Mapping[str, tuple[int, ...]]], tuple[int, ...]]
    floats: Callable[[Parts], npt.NDArray[Any]]
    optional: tuple[str, ...] = ()
    dtype: str | None = None  # of the codes, where a dense matrix may have the same name
    weight: str = ".weight"
    format: str = "dense"
    reused: int = 0  # how many matrices to keep, where one holds what is asked for in many parts
    integers: Callable[[Parts], Integers] | None = None
    keeps: Callable[[Mapping[str, tuple[int, ...]], Parts], bool] = lambda stored, parts: True
    looks_at: tuple[str, ...] = ()


class Quantised:
    """The tensors of a checkpoint with a matrix in the place of those that make it."""

    def __init__(self, tensors: Tensors, scheme: Scheme) -> None:
        self.where = tensors.where
        self.scheme = scheme
        self._tensors = tensors
        found = {listed.name: listed for listed in tensors.listing()}
        self._stored: dict[str, dict[str, str]] = {}
        self._shapes: dict[str, dict[str, tuple[int, ...]]] = {}
        self._kept: dict[str, Array] = {}
        self._listing: dict[str, Listed] = {}
        used: set[str] = set()
        for name, listed in found.items():
            if not name.endswith(scheme.codes) or scheme.dtype not in (None, listed.dtype):
                continue
            stem = name.removesuffix(scheme.codes)
            parts = {end: stem + end for end in (scheme.codes, *scheme.others) if stem + end in found}
            missing = [end for end in scheme.others if end not in parts and end not in scheme.optional]
            if stem + scheme.weight in found and scheme.weight != scheme.codes:
                raise CheckpointError(
                    f"{self.where}: {stem + scheme.weight!r} is there twice: as it is, and as {scheme.kind}"
                )
            if missing:
                raise CheckpointError(
                    f"{self.where}: tensor {stem + missing[0]!r} is missing ({scheme.kind})"
                )
            matrix = stem + scheme.weight
            self._stored[matrix] = parts
            self._shapes[matrix] = {end: found[part].shape for end, part in parts.items()}
            try:
                shape = scheme.shape(self._shapes[matrix])
            except (ValueError, IndexError, ZeroDivisionError):
                raise CheckpointError(
                    f"{self.where}: the tensors of {stem!r} have shapes that don't fit each other ({scheme.kind})"
                ) from None
            self._listing[matrix] = Listed(matrix, "F32", shape)
            used |= set(parts.values())
        self._dense = [
            listed for name, listed in found.items() if name not in used and not name.endswith(_OF_THE_CACHE)
        ]
        if not self._stored:
            raise CheckpointError(
                f"{self.where}: holds no matrix as {scheme.kind}, which the configuration names"
            )

    def listing(self) -> Iterable[Listed]:
        return [*self._listing.values(), *self._dense]

    @property
    def count(self) -> int:
        return len(self._stored)

    def read(self, name: str) -> Array:
        if name not in self._stored:
            return self._tensors.read(name)
        if name in self._kept:
            return self._kept[name]
        matrix: Array = self._made(name, self.scheme.floats)
        if self.scheme.reused:
            if len(self._kept) == self.scheme.reused:
                del self._kept[next(iter(self._kept))]
            self._kept[name] = matrix
        return matrix

    def keeps(self, name: str) -> bool:
        """Whether the engine has a form for the matrix as it is."""
        if name not in self._stored or self.scheme.integers is None:
            return False
        return self.scheme.keeps(self._shapes[name], self._parts(name, self.scheme.looks_at))

    def read_integers(self, name: str) -> Integers | None:
        """The matrix in the engine's form; None for what is not quantised."""
        if name not in self._stored or self.scheme.integers is None:
            return None
        integers: Integers = self._made(name, self.scheme.integers)
        return integers

    def forget_zero_biases(self, needed: Container[str]) -> None:
        """Some writers give every quantised layer a bias, of zeros where the model has none."""

        def is_nothing(name: str) -> bool:
            layer = name.removesuffix(".bias") + self.scheme.weight
            if name in needed or not name.endswith(".bias") or layer not in self._stored:
                return False
            return not self._tensors.read(name).any()

        self._dense = [listed for listed in self._dense if not is_nothing(listed.name)]

    def _made(self, name: str, make: Callable[[Parts], Any]) -> Any:
        try:
            return make(self._parts(name))
        except (ValueError, IndexError) as error:
            raise CheckpointError(
                f"{self.where}: {name!r} can't be read as {self.scheme.kind}: {error}"
            ) from error

    def _parts(self, name: str, only: Container[str] | None = None) -> dict[str, Array]:
        # Each is valid until the next is read.
        return {
            end: np.array(self._tensors.read(part))
            for end, part in self._stored[name].items()
            if only is None or end in only
        }
