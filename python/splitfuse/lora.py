"""LoRA adapters (arXiv:2106.09685) as PEFT writes them, merged into the matrices when these are read."""

from __future__ import annotations

import math
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._core import CheckpointError
from .models.family import Array, Fields
from .models.parts import as_float32
from .tensors import Listed, SafetensorFiles, Tensors
from .tokenizer import read_json

_PREFIX = "base_model.model."
# Fields of adapter_config.json that alter what is merged, and the values under which they don't.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    "layer_replication": ([],),
    "lora_bias": (False,),
    "megatron_config": (),
    "modules_to_save": ([],),
    "target_parameters": ([],),
    "trainable_token_indices": (),
    "use_dora": (False,),
    "use_qalora": (False,),
}


class Merged:
    """The tensors of a checkpoint with an adapter's products added: W + scale * B A."""

    def __init__(self, tensors: Tensors, adapter: Path) -> None:
        """Raises CheckpointError or ConfigError, naming file and field or tensor, for what can't be merged."""
        self.where = tensors.where
        self._tensors = tensors
        file = adapter / "adapter_config.json"
        self._fields = Fields(read_json(file, "the adapter's configuration"), str(file))
        self._fields.expect("peft_type", "LORA")
        for name, values in _NEUTRAL.items():
            self._fields.expect(name, *values)
        self._adapter = _open(adapter)
        self._scales = self._find({listed.name: listed for listed in tensors.listing()})

    def listing(self) -> Iterable[Listed]:
        return self._tensors.listing()

    def read(self, name: str) -> Array:
        scale = self._scales.get(name)
        if scale is None:
            return self._tensors.read(name)
        stem = name.removesuffix(".weight")
        down, up = (
            np.array(as_float32(self._adapter.read(f"{_PREFIX}{stem}.lora_{half}.weight"))) for half in "AB"
        )
        product: npt.NDArray[np.float32] = up @ down
        product *= np.float32(scale)
        product += as_float32(self._tensors.read(name))
        return product

    def _find(self, found: dict[str, Listed]) -> dict[str, float]:
        """The factor of each matrix that the adapter changes."""
        halves = {listed.name: listed.shape for listed in self._adapter.listing()}
        scales: dict[str, float] = {}
        for name, shape in halves.items():
            stem, _, half = name.removeprefix(_PREFIX).rpartition(".lora_")
            if not name.startswith(_PREFIX) or half not in ("A.weight", "B.weight"):
                raise CheckpointError(f"{self._adapter.where}: tensor {name!r} is not one of a LoRA adapter")
            matrix = found.get(f"{stem}.weight")
            if matrix is None:
                raise CheckpointError(
                    f"{self._adapter.where}: {name!r} changes a matrix that the model lacks"
                )
            rank = shape[0 if half[0] == "A" else -1] if len(shape) == 2 else 0
            n, k = matrix.shape if len(matrix.shape) == 2 else (0, 0)
            if shape != ((rank, k) if half[0] == "A" else (n, rank)) or rank < 1:
                raise CheckpointError(
                    f"{self._adapter.where}: tensor {name!r} has shape {list(shape)}; "
                    f"the matrix that it changes has {list(matrix.shape)}"
                )
            other = f"{_PREFIX}{stem}.lora_{'B' if half[0] == 'A' else 'A'}.weight"
            if other not in halves or rank not in (halves[other][0], halves[other][-1]):
                raise CheckpointError(f"{self._adapter.where}: {name!r} has no counterpart of rank {rank}")
            scales[matrix.name] = self._scale(stem, rank)
        if not scales:
            raise CheckpointError(f"{self._adapter.where}: holds no tensors")
        return scales

    def _scale(self, stem: str, rank: int) -> float:
        patterns = self._fields.get("alpha_pattern", {})
        alpha = next(
            (value for key, value in patterns.items() if stem == key or stem.endswith(f".{key}")),
            self._fields.number("lora_alpha", 8),
        )
        alpha = self._fields.part({"alpha_pattern": alpha}).number("alpha_pattern")
        return alpha / math.sqrt(rank) if self._fields.flag("use_rslora") else alpha / rank


def _open(adapter: Path) -> Tensors:
    file = adapter / "adapter_model.safetensors"
    if file.is_file():
        return SafetensorFiles([file], str(file))
    if (adapter / "adapter_model.bin").is_file():
        from .bin_file import BinFiles

        return BinFiles([adapter / "adapter_model.bin"], str(adapter / "adapter_model.bin"))
    raise CheckpointError(f"{adapter}: holds no adapter_model.safetensors and no adapter_model.bin")
