"""The GGUF container: its metadata and where its tensors lie. Format: GGUF versions 2 and 3, little-endian,
as described in ggml's docs/gguf.md. The `gguf` package reads it too, but takes seconds over a large
vocabulary."""

from __future__ import annotations

import math
import mmap
import struct
from dataclasses import dataclass
from functools import cache
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._core import CheckpointError

_SCALARS = {0: "B", 1: "b", 2: "H", 3: "h", 4: "I", 5: "i", 6: "f", 7: "?", 10: "Q", 11: "q", 12: "d"}
_STRING, _ARRAY = 8, 9
_FLOATS: dict[str, npt.DTypeLike] = {"F32": np.float32, "F16": np.float16, "BF16": np.uint16}
_MAX_DIMENSIONS = 4
_AT_ONCE = 1 << 18  # values dequantised at once: they stay in the cache


@dataclass(frozen=True)
class GgufTensor:
    """`shape` is row-major, the reverse of what the file says. `kind`: the name of its ggml type. `offset`:
    bytes from the start of the file."""

    name: str
    shape: tuple[int, ...]
    kind: str
    offset: int
    nbytes: int


class GgufFile:
    """A GGUF file, mapped. Raises CheckpointError if it is corrupt, truncated or of an unknown version."""

    def __init__(self, path: str | Path) -> None:
        self.path = Path(path)
        try:
            with open(self.path, "rb") as file:
                self._map = mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ)
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{self.path}: can't be read: {error}") from error
        header = _Header(self._map, self.path)
        self.metadata, self.tensors = header.read()

    def raw(self, tensor: GgufTensor) -> npt.NDArray[np.uint8]:
        """The tensor's bytes, as they lie in the file: its shape, with the bytes of a row for the last dimension."""
        data = np.frombuffer(self._map, dtype=np.uint8, count=tensor.nbytes, offset=tensor.offset)
        return data.reshape(*tensor.shape[:-1], tensor.nbytes // math.prod(tensor.shape[:-1]))

    def read(self, tensor: GgufTensor) -> npt.NDArray[Any]:
        """The tensor in its shape: float32, float16 or the bits of bfloat16 (uint16) as stored, a quantised
        one dequantised to float32."""
        raw = self.raw(tensor)
        if tensor.kind in _FLOATS:
            return raw.view(_FLOATS[tensor.kind])
        return self.decode(tensor, raw.reshape(-1, raw.shape[-1])).reshape(tensor.shape)

    def decode(self, tensor: GgufTensor, rows: npt.NDArray[np.uint8]) -> npt.NDArray[np.float32]:
        """Rows [n, bytes of a row] of a quantised tensor as float32."""
        from gguf import GGMLQuantizationType
        from gguf.quants import dequantize

        if not readable(tensor.kind):
            raise CheckpointError(
                f"{self.path}: tensor {tensor.name!r} is {tensor.kind}, "
                "which the gguf package can't dequantise"
            )
        kind = GGMLQuantizationType[tensor.kind]
        values = np.empty((rows.shape[0], tensor.shape[-1]), dtype=np.float32)
        step = max(1, _AT_ONCE // tensor.shape[-1])
        for row in range(0, rows.shape[0], step):  # the package needs twice the memory of what it is given
            values[row : row + step] = dequantize(rows[row : row + step], kind)
        return values


@cache
def readable(kind: str) -> bool:
    """Whether the gguf package can dequantise tensors of this type."""
    from gguf import GGML_QUANT_SIZES, GGMLQuantizationType
    from gguf.quants import dequantize

    block, size = GGML_QUANT_SIZES[GGMLQuantizationType[kind]]
    try:
        dequantize(np.zeros((1, size), dtype=np.uint8), GGMLQuantizationType[kind])
    except NotImplementedError:
        return False
    return block > 1


class _Header:
    """One pass over the part of the file that is not tensor data."""

    def __init__(self, data: mmap.mmap, path: Path) -> None:
        self._data = data
        self._size = len(data)
        self._path = path
        self._position = 0

    def read(self) -> tuple[dict[str, Any], dict[str, GgufTensor]]:
        try:
            self._check_magic()
            tensor_count, key_count = self._scalar("Q"), self._scalar("Q")
            metadata: dict[str, Any] = {}
            for _ in range(key_count):
                key = self._string()
                if key in metadata:
                    raise self._error(f"metadata key {key!r} comes twice")
                metadata[key] = self._value(self._scalar("I"))
            return metadata, self._tensors(tensor_count, metadata)
        except struct.error:
            raise self._error(f"truncated: the header goes beyond the end at {self._size} bytes") from None
        except UnicodeDecodeError as error:
            raise self._error(f"a text in the header is not UTF-8: {error}") from None

    def _check_magic(self) -> None:
        if self._data[:4] != b"GGUF":
            raise self._error("not a GGUF file: it does not begin with 'GGUF'")
        self._position = 4
        version = self._scalar("I")
        if version not in (2, 3):
            raise self._error(f"GGUF version {version} is not supported; expected 2 or 3, little-endian")

    def _scalar(self, code: str) -> Any:
        (value,) = struct.unpack_from("<" + code, self._data, self._position)
        self._position += struct.calcsize("<" + code)
        return value

    def _string(self) -> str:
        return self._strings(1)[0]

    def _strings(self, count: int) -> list[str]:
        unpack, data, position, size = struct.Struct("<Q").unpack_from, self._data, self._position, self._size
        texts = []
        for _ in range(count):
            start = position + 8
            position = start + unpack(data, position)[0]
            if position > size:
                raise self._error(f"truncated: a text goes beyond the end at {size} bytes")
            texts.append(data[start:position].decode("utf-8"))
        self._position = position
        return texts

    def _value(self, kind: int) -> Any:
        if kind in _SCALARS:
            return self._scalar(_SCALARS[kind])
        if kind == _STRING:
            return self._string()
        if kind != _ARRAY:
            raise self._error(f"unknown metadata type {kind}")
        item, count = self._scalar("I"), self._scalar("Q")
        if item == _STRING:
            return self._strings(count)
        if item not in _SCALARS:
            raise self._error(f"a metadata array holds type {item}; expected numbers or texts")
        layout = np.dtype("<" + _SCALARS[item])
        start, self._position = self._position, self._position + count * layout.itemsize
        if self._position > self._size:
            raise self._error(f"truncated: a metadata array goes beyond the end at {self._size} bytes")
        return np.frombuffer(self._data, dtype=layout, count=count, offset=start).tolist()

    def _tensors(self, count: int, metadata: dict[str, Any]) -> dict[str, GgufTensor]:
        from gguf.constants import GGML_QUANT_SIZES, GGMLQuantizationType

        entries = []
        for _ in range(count):
            name, dimensions = self._string(), self._scalar("I")
            if not 1 <= dimensions <= _MAX_DIMENSIONS:
                raise self._error(
                    f"tensor {name!r} has {dimensions} dimensions; expected 1 to {_MAX_DIMENSIONS}"
                )
            shape = tuple(self._scalar("Q") for _ in range(dimensions))[::-1]
            entries.append((name, shape, self._scalar("I"), self._scalar("Q")))
        alignment = metadata.get("general.alignment", 32)
        if not isinstance(alignment, int) or alignment <= 0:
            raise self._error(f"general.alignment is {alignment!r}; expected a positive number")
        base = -(-self._position // alignment) * alignment
        tensors: dict[str, GgufTensor] = {}
        for name, shape, code, offset in entries:
            if name in tensors:
                raise self._error(f"tensor {name!r} comes twice")
            try:
                kind = GGMLQuantizationType(code)
            except ValueError:
                raise self._error(f"tensor {name!r} has the unknown type {code}") from None
            block, block_bytes = GGML_QUANT_SIZES[kind]
            if 0 in shape or shape[-1] % block != 0:
                raise self._error(
                    f"tensor {name!r} has shape {list(shape)}; rows of {kind.name} are multiples of {block}"
                )
            nbytes = math.prod(shape) // block * block_bytes
            if base + offset + nbytes > self._size:
                raise self._error(
                    f"truncated: tensor {name!r} ends at byte {base + offset + nbytes}, "
                    f"the file at {self._size}"
                )
            tensors[name] = GgufTensor(name, shape, kind.name, base + offset, nbytes)
        self._check_overlap(tensors)
        return tensors

    def _check_overlap(self, tensors: dict[str, GgufTensor]) -> None:
        in_order = sorted(tensors.values(), key=lambda tensor: tensor.offset)
        for first, second in pairwise(in_order):
            if first.offset + first.nbytes > second.offset:
                raise self._error(f"tensors {first.name!r} and {second.name!r} overlap")

    def _error(self, text: str) -> CheckpointError:
        return CheckpointError(f"{self._path}: {text}")
