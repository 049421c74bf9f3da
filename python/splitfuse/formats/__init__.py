"""Checkpoints whose matrices are quantised: what `quantization_config` says, and the matrices that its tensors make."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .. import _core
from .._core import ModelConfig
from ..models.family import Family, Fields
from . import awq, compressed, fp8, gptq, mxfp4
from .scheme import Quantised, Scheme

_METHODS = {
    "fp8": fp8.scheme,
    "fbgemm_fp8": fp8.fbgemm,
    "gptq": gptq.scheme,
    "awq": awq.scheme,
    "compressed-tensors": compressed.scheme,
    "mxfp4": mxfp4.scheme,
}

_DENSE = (".router.weight", ".shared_gate.weight")  # in every engine

__all__ = ["Quantised", "Scheme", "native_format", "scheme_of"]


def scheme_of(fields: Fields) -> Scheme | None:
    """How the matrices of a checkpoint are quantised; None: they are not. Raises ConfigError, naming what is not
    supported and listing what is."""
    given = fields.get("quantization_config")
    if given is None:
        given = fields.get("compression_config")
    if given is None:
        return None
    if not isinstance(given, Mapping):
        raise fields.error("quantization_config: expected an object")
    inner = fields.part(given)
    method: Any = inner.get("quant_method")
    if not isinstance(method, str) or method not in _METHODS:
        raise inner.error(
            f"quant_method is {method!r}, which is not supported; supported: {', '.join(_METHODS)}"
        )
    return _METHODS[method](inner)


def native_format(family: Family, config: ModelConfig, tensors: Quantised) -> str:
    """The engine's format that holds the matrices as they are; "dense" where it has none for some of them: these would
    lose by it."""
    sources = family.sources(config, [listed.name for listed in tensors.listing()])
    matrices = [
        name
        for canonical, shape in _core.canonical_names(config)
        if canonical.startswith("layers.") and len(shape) == 2 and not canonical.endswith(_DENSE)
        for name in sources[canonical].names
    ]
    return tensors.scheme.format if all(tensors.keeps(name) for name in matrices) else "dense"
