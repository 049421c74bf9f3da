"""Tensors by the names that a checkpoint gives them, and canonical weights made of them."""

from __future__ import annotations

import hashlib
import mmap
from collections.abc import Callable, Iterable, Mapping, Sequence
from pathlib import Path
from typing import NamedTuple, Protocol

import numpy as np

from . import _core
from ._core import CheckpointError, ModelConfig
from .gguf_blocks import Integers
from .models.family import Array, Family, Source

# Words of safetensors, and what numpy holds them in: bfloat16 and float8 are their bits.
_NUMPY = {
    "F64": np.float64,
    "F32": np.float32,
    "F16": np.float16,
    "BF16": np.uint16,
    "F8_E4M3": np.uint8,
    "F8_E5M2": np.uint8,
    "I64": np.int64,
    "I32": np.int32,
    "I16": np.int16,
    "I8": np.int8,
    "U8": np.uint8,
    "BOOL": np.bool_,
}
WEIGHTS = ("F32", "F16", "BF16")
_NAMED_AT_MOST = 5


class Listed(NamedTuple):
    name: str
    dtype: str  # as safetensors writes it
    shape: tuple[int, ...]


class Tensors(Protocol):
    """What a checkpoint holds."""

    where: str

    def listing(self) -> Iterable[Listed]: ...

    def read(self, name: str) -> Array:
        """In C order; bfloat16 as uint16, float8 as uint8. Valid until the next call."""


class SafetensorFiles:
    """The tensors of mapped files. Raises CheckpointError, as the native reader does, on a damaged one."""

    def __init__(self, files: Sequence[Path], where: str) -> None:
        self.where = where
        self.files = list(files)
        self._places: dict[str, tuple[int, Listed, int]] = {}
        self._maps: list[mmap.mmap | None] = [None] * len(self.files)
        self._used: tuple[mmap.mmap, int, int] | None = None
        for index, file in enumerate(self.files):
            for name, dtype, shape, begin in _core.read_safetensors_header(str(file))[0]:
                if name in self._places:
                    other = self.files[self._places[name][0]]
                    raise CheckpointError(f"{file}: tensor {name!r} is also in {other}")
                self._places[name] = (index, Listed(name, dtype, tuple(shape)), begin)

    def listing(self) -> Iterable[Listed]:
        return [listed for _, listed, _ in self._places.values()]

    def read(self, name: str) -> Array:
        self._drop()
        index, listed, begin = self._places[name]
        mapped = self._maps[index]
        if mapped is None:
            with self.files[index].open("rb") as file:
                mapped = self._maps[index] = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        if listed.dtype not in _NUMPY:
            raise CheckpointError(f"{self.where}: tensor {name!r} is {listed.dtype}, which can't be read")
        dtype = np.dtype(_NUMPY[listed.dtype])
        count = int(np.prod(listed.shape, dtype=np.int64))
        self._used = (mapped, begin, count * dtype.itemsize)
        return np.frombuffer(mapped, dtype, count, begin).reshape(listed.shape)

    def _drop(self) -> None:
        """Gives the pages of the last tensor back, so that memory never holds the files and the packed weights."""
        if self._used is not None:
            mapped, begin, size = self._used
            first = -(-begin // mmap.PAGESIZE) * mmap.PAGESIZE
            whole = (begin + size - first) // mmap.PAGESIZE * mmap.PAGESIZE
            if whole > 0:
                mapped.madvise(mmap.MADV_DONTNEED, first, whole)
            self._used = None


def open_weights(
    family: Family,
    config: ModelConfig,
    tensors: Tensors,
    integers: Callable[[str], Integers | None] | None = None,
    format: str = "dense",
) -> _core.WeightSource:
    """The canonical weights of a model. Raises CheckpointError, naming tensors, where one is missing, has no place,
    or has another shape or dtype than the configuration asks for. `integers` gives matrices that are kept as integers
    of `format`, None for others."""
    sources = family.sources(config, [listed.name for listed in tensors.listing()])
    check(family, config, tensors, sources)
    plain = all(source.make is None and len(source.names) == 1 for source in sources.values())
    if isinstance(tensors, SafetensorFiles) and plain:
        names = [(canonical, source.names[0]) for canonical, source in sources.items()]
        return _core.open_safetensors([str(file) for file in tensors.files], names)

    def read(canonical: str) -> Array | Integers:
        source = sources[canonical]
        if len(source.names) > 1:
            return _made(
                source, np.concatenate([tensors.read(name).copy() for name in source.names], casting="no")
            )
        parts = None if integers is None else integers(source.names[0])
        if parts is not None:
            return tuple(_made(source, part) for part in parts)
        return _made(source, tensors.read(source.names[0]))

    return _core.callback_source(list(sources), read, format)


def _made(source: Source, array: Array) -> Array:
    return np.ascontiguousarray(array if source.make is None else source.make(array))


def untie_what_differs(family: Family, config: ModelConfig, tensors: Tensors) -> None:
    """A model that says its head is the embedding table, and has a head of its own in its files, runs with that."""
    if not config.tie_embeddings:
        return
    table = family.sources(config, [listed.name for listed in tensors.listing()])["embed.weight"].names[0]
    head = family.head_name(config)
    found = {listed.name: listed for listed in tensors.listing()}
    if head in found and table in found and (_print_of(tensors, head) != _print_of(tensors, table)):
        config.tie_embeddings = False


def _print_of(tensors: Tensors, name: str) -> tuple[tuple[int, ...], bytes]:
    array = np.ascontiguousarray(tensors.read(name))
    return array.shape, hashlib.blake2b(array.data).digest()


def check(family: Family, config: ModelConfig, tensors: Tensors, sources: Mapping[str, Source]) -> None:
    """Raises CheckpointError, naming tensors, unless `tensors` are what `sources` asks for, and no others."""
    found = {listed.name: listed for listed in tensors.listing()}
    needed = dict.fromkeys(name for source in sources.values() for name in source.names)
    if missing := [name for name in needed if name not in found]:
        raise CheckpointError(f"{tensors.where}: {_named(missing, 'is', 'are')} missing")
    if wrong := [name for name in needed if found[name].dtype not in WEIGHTS]:
        raise CheckpointError(
            f"{tensors.where}: tensor {wrong[0]!r} is {found[wrong[0]].dtype}; supported: {', '.join(WEIGHTS)}"
        )
    for canonical, shape in _core.canonical_names(config):
        source = sources[canonical]
        listed = [found[name] for name in source.names]
        made = _shape_of(source, listed)
        if made != tuple(shape):
            plain = source.make is None and len(listed) == 1
            wanted = f"{list(shape)}" if plain else f"what gives {canonical} {list(shape)}"
            raise CheckpointError(
                f"{tensors.where}: tensor {listed[0].name!r} has shape {list(listed[0].shape)}; "
                f"the configuration asks for {wanted}"
            )
    if unknown := [name for name in found if name not in needed and not family.is_harmless(name, config)]:
        raise CheckpointError(f"{tensors.where}: {_named(unknown, 'has', 'have')} no place in this model")


def _shape_of(source: Source, listed: Sequence[Listed]) -> tuple[int, ...]:
    """What is made of tensors of those shapes, found without their memory: on arrays whose strides are 0."""
    try:
        arrays: list[Array] = [np.broadcast_to(np.zeros((), _NUMPY[one.dtype]), one.shape) for one in listed]
        array = arrays[0] if len(arrays) == 1 else np.concatenate(arrays, casting="no")
        return array.shape if source.make is None else source.make(array).shape
    except (TypeError, ValueError, IndexError):
        return ()


def _named(names: list[str], one: str, many: str) -> str:
    shown = ", ".join(repr(name) for name in names[:_NAMED_AT_MOST])
    more = f" and {len(names) - _NAMED_AT_MOST} more" if len(names) > _NAMED_AT_MOST else ""
    return f"tensor {shown} {one}" if len(names) == 1 else f"tensors {shown}{more} {many}"
