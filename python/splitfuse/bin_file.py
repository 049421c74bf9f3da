"""Legacy `.bin` checkpoints (pickles). They are read through torch with weights_only, the one place that
needs it."""

from __future__ import annotations

import pickle
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np
import numpy.typing as npt

from ._core import CheckpointError
from .tensors import Listed

if TYPE_CHECKING:
    import torch


class BinFiles:
    """The tensors of one or several `.bin` files, mapped where the file allows it."""

    def __init__(self, files: Sequence[Path], where: str) -> None:
        self.where = where
        self._tensors: dict[str, torch.Tensor] = {}
        for file in files:
            for name, tensor in _load(file).items():
                if name in self._tensors:
                    raise CheckpointError(f"{file}: tensor {name!r} is in an earlier file too")
                self._tensors[name] = tensor

    def listing(self) -> list[Listed]:
        return [
            Listed(name, _dtype_name(tensor), tuple(tensor.shape)) for name, tensor in self._tensors.items()
        ]

    def read(self, name: str) -> npt.NDArray[Any]:
        """The tensor as float32, float16, or the bits of bfloat16 (uint16); C-contiguous."""
        tensor = self._tensors[name].contiguous()
        if _dtype_name(tensor) == "BF16":
            import torch

            return tensor.view(torch.int16).numpy().view(np.uint16)
        return tensor.numpy()


def _load(file: Path) -> Mapping[str, torch.Tensor]:
    try:
        import torch
    except ImportError:
        raise CheckpointError(
            f"{file}: a legacy .bin checkpoint needs torch to be read: pip install torch, "
            "or convert the model to safetensors"
        ) from None
    try:
        try:
            loaded = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
        except RuntimeError:  # files from before torch 1.6 can't be mapped
            loaded = torch.load(file, map_location="cpu", weights_only=True)
    except (OSError, RuntimeError, EOFError, ValueError, pickle.UnpicklingError) as error:
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{file}: not a checkpoint of plain tensors: {reason[0] if reason else error!r}"
        ) from error
    if not isinstance(loaded, Mapping) or not all(
        isinstance(tensor, torch.Tensor) for tensor in loaded.values()
    ):
        raise CheckpointError(f"{file}: expected a dictionary of tensors")
    return loaded


def _dtype_name(tensor: torch.Tensor) -> str:
    name = str(tensor.dtype).removeprefix("torch.")
    return {"float32": "F32", "float16": "F16", "bfloat16": "BF16"}.get(name, name)
