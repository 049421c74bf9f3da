"""LoRA adapters (arXiv:2106.09685) as PEFT writes them, merged into the matrices when these are read."""

from __future__ import annotations

import math
import re
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import numpy as np
import numpy.typing as npt

from ._core import CheckpointError, ModelConfig
from .models.family import Array, Family, Fields
from .models.parts import as_float32
from .tensors import WEIGHTS, Listed, SafetensorFiles, Tensors
from .tokenizer import read_json

_PREFIX = "base_model.model."
# Fields of adapter_config.json that alter what is merged, and the values under which they don't.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alora_invocation_tokens": (),
    "bias": ("none",),
    "fan_in_fan_out": (False,),
    # Others change the base when the adapter is made.
    "init_lora_weights": (True, False, "gaussian", "eva", "orthogonal"),
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

    def __init__(self, tensors: Tensors, adapter: Path, family: Family, config: ModelConfig) -> None:
        """Raises CheckpointError or ConfigError, naming file and field or tensor, for what can't be merged."""
        self.where = tensors.where
        self._tensors = tensors
        file = adapter / "adapter_config.json"
        self._fields = Fields(read_json(file, "the adapter's configuration"), str(file))
        self._fields.expect("peft_type", "LORA")
        for name, values in _NEUTRAL.items():
            self._fields.expect(name, *values)
        self._adapter = _open(adapter)
        for listed in self._adapter.listing():
            if listed.dtype not in WEIGHTS:
                raise CheckpointError(
                    f"{self._adapter.where}: tensor {listed.name!r} is {listed.dtype}; "
                    f"supported: {', '.join(WEIGHTS)}"
                )
        names = [listed.name for listed in tensors.listing()]
        needed = {name for source in family.sources(config, names).values() for name in source.names}
        found = {listed.name: listed for listed in tensors.listing() if listed.name in needed}
        # Adapters name the base's parts in full, where its files may leave the beginning out.
        in_full = {family.base + name: listed for name, listed in found.items()}
        self._scales, self._stems = self._find({**in_full, **found})

    def listing(self) -> Iterable[Listed]:
        return self._tensors.listing()

    def read(self, name: str) -> Array:
        scale = self._scales.get(name)
        if scale is None:
            return self._tensors.read(name)
        stem = self._stems[name]
        down, up = (
            np.array(as_float32(self._adapter.read(f"{_PREFIX}{stem}.lora_{half}.weight"))) for half in "AB"
        )
        product: npt.NDArray[np.float32] = up @ down
        product *= np.float32(scale)
        product += as_float32(self._tensors.read(name))
        return product

    def _find(self, found: dict[str, Listed]) -> tuple[dict[str, float], dict[str, str]]:
        """The factor of each matrix that the adapter changes, and how the adapter calls it."""
        halves = {listed.name: listed.shape for listed in self._adapter.listing()}
        scales: dict[str, float] = {}
        stems: dict[str, str] = {}
        for name, shape in halves.items():
            stem, _, half = name.removeprefix(_PREFIX).rpartition(".lora_")
            if not name.startswith(_PREFIX) or half not in ("A.weight", "B.weight"):
                raise CheckpointError(f"{self._adapter.where}: tensor {name!r} is not one of a LoRA adapter")
            matrix = found.get(f"{stem}.weight")
            if matrix is None:
                raise CheckpointError(
                    f"{self._adapter.where}: {name!r} changes a matrix that the model lacks, or ties to another"
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
            stems[matrix.name] = stem
        if not scales:
            raise CheckpointError(f"{self._adapter.where}: holds no tensors")
        return scales, stems

    def _scale(self, stem: str, rank: int) -> float:
        """Keys of alpha_pattern are regular expressions for the end of a layer's name."""
        patterns = self._fields.get("alpha_pattern", {})
        if not isinstance(patterns, dict):
            raise self._fields.error(f"alpha_pattern is {patterns!r}; expected an object")
        alpha = self._fields.number("lora_alpha", 8)
        for key, value in patterns.items():
            try:
                if re.fullmatch(rf"(.*\.)?({key})", stem):
                    alpha = value
                    break
            except re.error as error:
                raise self._fields.error(
                    f"alpha_pattern: {key!r} is no regular expression: {error}"
                ) from error
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
