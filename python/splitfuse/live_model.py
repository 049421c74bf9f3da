"""A transformers model that is in memory already, as a source of weights."""

from __future__ import annotations

from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import numpy as np

from ._core import ConfigError
from .models.family import Array
from .tensors import Listed

if TYPE_CHECKING:
    import torch

_DTYPES = {"torch.float32": "F32", "torch.float16": "F16", "torch.bfloat16": "BF16"}


class LiveTensors:
    """The state of a model, under the names that its checkpoint would have. Nothing is copied but what transformers
    itself rearranges to save it (experts)."""

    where = "the model in memory"

    def __init__(self, model: Any) -> None:
        from transformers.core_model_loading import revert_weight_conversion

        self._state: dict[str, torch.Tensor] = revert_weight_conversion(model, dict(model.state_dict()))

    def listing(self) -> Iterable[Listed]:
        return [
            Listed(name, _DTYPES.get(str(tensor.dtype), str(tensor.dtype)), tuple(tensor.shape))
            for name, tensor in self._state.items()
        ]

    def read(self, name: str) -> Array:
        import torch

        tensor = self._state[name].detach().cpu().contiguous()
        if tensor.dtype == torch.bfloat16:
            return tensor.view(torch.int16).numpy().view(np.uint16)
        return tensor.numpy()


def configuration(model: Any) -> dict[str, Any]:
    """What its config.json would hold. Raises ConfigError for what is not a model of transformers."""
    config = getattr(model, "config", None)
    if config is None or not hasattr(config, "to_dict") or not hasattr(model, "state_dict"):
        raise ConfigError(f"expected a model of transformers, not a {type(model).__name__}")
    return {**config.to_dict(), "architectures": [type(model).__name__]}
