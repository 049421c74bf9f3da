"""A model in a GGUF file: its configuration and weights. Names and layout are those of llama.cpp."""

from __future__ import annotations

import math
from collections import Counter
from dataclasses import replace
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core, gguf_rope
from ._core import CheckpointError, ModelConfig
from .gguf_archs import ARCHS, Arch, arch_of, config_json
from .gguf_blocks import INT4, INT8, Integers
from .gguf_file import GgufFile, GgufTensor, readable
from .gguf_keys import Keys
from .models.family import Array, Family, Fields, Names, Part
from .models.parts import gate_rows, half_split, k_rows, of_expert, q_rows, up_rows, v_rows
from .tensors import WEIGHTS, Listed, check

_INT4_BITS, _FLOAT_BITS = 5.0, 16  # bits a weight of Q4_1, the widest of the 4-bit types, and of float16
_DENSE = (".router.weight", ".shared_gate.weight")  # in every engine
_ROPE_TABLES = (gguf_rope.FREQUENCY_FACTORS, gguf_rope.LONG_FACTORS, gguf_rope.SHORT_FACTORS)


def _norm_of(queries: bool) -> Part:
    """A norm of each head, of all heads one after another, or one that they share."""

    def make(a: Array, c: ModelConfig, e: int = 0) -> Array:
        heads = c.num_heads if queries else c.num_kv_heads
        return np.tile(a, heads) if a.shape == (c.head_dim,) else a.reshape(-1)

    return Part("attn_q_norm" if queries else "attn_k_norm", make)


def _one_row(a: Array, c: ModelConfig, e: int = 0) -> Array:
    return a.reshape(1, -1)


_NAMES: Names = {
    "embed": "token_embd",
    "embed_norm": "token_embd_norm",
    "embed_positions": "position_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.q_norm": _norm_of(queries=True),
    "attn.k_norm": _norm_of(queries=False),
    "attn.sinks": "attn_sinks",
    "attn.o": "attn_output",
    "attn_post_norm": "post_attention_norm",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
    "mlp_post_norm": "post_ffw_norm",
    "moe.router": "ffn_gate_inp",
    "moe.expert.gate": Part("ffn_gate_exps", of_expert()),
    "moe.expert.up": Part("ffn_up_exps", of_expert()),
    "moe.expert.down": Part("ffn_down_exps", of_expert()),
    "moe.shared_gate": Part("ffn_gate_inp_shexp", _one_row),
    "moe.shared.gate": "ffn_gate_shexp",
    "moe.shared.up": "ffn_up_shexp",
    "moe.shared.down": "ffn_down_shexp",
}
# Matrices that some files have in one.
_QKV: Names = {
    "attn.q": Part("attn_qkv", q_rows),
    "attn.k": Part("attn_qkv", k_rows),
    "attn.v": Part("attn_qkv", v_rows),
}
_GATE_UP: Names = {"mlp.gate": Part("ffn_up", gate_rows), "mlp.up": Part("ffn_up", up_rows)}
_ROTATED = ("attn.q", "attn.k", "attn.q_norm", "attn.k_norm")


class GgufModel:
    """Raises ConfigError, naming the key, on what splitfuse does not run, and CheckpointError, naming tensors, if the
    file does not have exactly what its configuration needs. Weights are read later."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        keys = Keys(file, ARCHS)
        arch = arch_of(keys)
        family = replace(
            arch.family,
            tensors=lambda config: _names(file, arch, config),
            layer_prefix="blk.{}.",
            harmless=_ROPE_TABLES if arch.rope else (),
            base="",
        )
        self.config = _config(keys, arch, family)
        self._sources = family.sources(self.config)
        check(family, self.config, _Listing(file), self._sources)

    def weights(self) -> _core.WeightSource:
        """The canonical weights, each read when it is asked for: as integers where the engine has such a form, any
        other quantised type dequantised."""
        shapes = dict(_core.canonical_names(self.config))

        def read(canonical: str) -> npt.NDArray[Any] | Integers:
            source = self._sources[canonical]
            tensor = self._file.tensors[source.names[0]]
            if len(shapes[canonical]) != 2 or tensor.kind in WEIGHTS:
                values = self._file.read(tensor)
                return np.ascontiguousarray(values if source.make is None else source.make(values))
            # Rows are picked as they lie in the file, so that of many experts only one is decoded.
            raw = self._file.raw(tensor)
            raw = np.ascontiguousarray(raw if source.make is None else source.make(raw))
            as_integers = {**INT4, **INT8}.get(tensor.kind)
            return self._file.decode(tensor, raw) if as_integers is None else as_integers(raw)

        return _core.callback_source(list(shapes), read, format=self._format())

    def kinds(self) -> Counter[str]:
        """How many matrices of the linear layers are of which type."""
        return Counter(tensor.kind for tensor, _ in self._matrices())

    def _matrices(self) -> list[tuple[GgufTensor, int]]:
        """Those of the linear layers: where each lies, and its number of weights."""
        return [
            (self._file.tensors[self._sources[name].names[0]], math.prod(shape))
            for name, shape in _core.canonical_names(self.config)
            if name.startswith("layers.") and len(shape) == 2 and not name.endswith(_DENSE)
        ]

    def _format(self) -> str:
        """As most of the weights of the linear layers are."""
        formats: Counter[str] = Counter()
        for tensor, weights in self._matrices():
            bits = 8 * tensor.nbytes / math.prod(tensor.shape)
            formats["int4" if bits <= _INT4_BITS else "int8" if bits < _FLOAT_BITS else "dense"] += weights
        return formats.most_common(1)[0][0]


def _config(keys: Keys, arch: Arch, family: Family) -> ModelConfig:
    file = keys.file
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing")
    # Rows of the table, which may be padded beyond the tokens that the tokenizer has.
    values = {**config_json(arch, keys), "vocab_size": table.shape[0]}
    keys.check_rest()
    config = family.read(Fields(values, f"{file.path}, as a config.json"))
    gguf_rope.divide(file, config)
    config.tie_embeddings = "output.weight" not in file.tensors
    config.lm_head_bias = "output.bias" in file.tensors
    config.norm_bias = "output_norm.bias" in file.tensors
    config.qkv_bias = keys.has("blk.0.attn_q.bias") or keys.has("blk.0.attn_qkv.bias")
    config.o_bias = keys.has("blk.0.attn_output.bias")
    config.mlp_bias = keys.has("blk.0.ffn_up.bias")
    config.validate()
    return config


def _names(file: GgufFile, arch: Arch, config: ModelConfig) -> Names:
    names = {**_NAMES, **arch.names}
    if "blk.0.attn_qkv.weight" in file.tensors:
        names |= _QKV
    if config.gated and "blk.0.ffn_gate.weight" not in file.tensors:
        names |= _GATE_UP
    if arch.pairs:
        for name in _ROTATED:
            given = names[name]
            part = Part(given) if isinstance(given, str) else given
            names[name] = part._replace(make=half_split(part.make))
    return names


class _Listing:
    """The tensors of a file, a quantised one as the floats that are made of it."""

    def __init__(self, file: GgufFile) -> None:
        self.where = str(file.path)
        self._file = file

    def listing(self) -> list[Listed]:
        return [
            Listed(tensor.name, "F32" if readable(tensor.kind) else tensor.kind, tensor.shape)
            if tensor.kind not in WEIGHTS
            else Listed(tensor.name, tensor.kind, tensor.shape)
            for tensor in self._file.tensors.values()
        ]

    def read(self, name: str) -> Array:
        return self._file.read(self._file.tensors[name])
