"""A Llama model in a GGUF file: its configuration and weights. Names and layout are those of llama.cpp."""

from __future__ import annotations

import math
from collections import Counter
from typing import Any

import numpy as np
import numpy.typing as npt

from . import _core
from ._core import CheckpointError, ConfigError
from .gguf_blocks import INT4, INT8, Integers
from .gguf_file import GgufFile, GgufTensor

_TENSORS = {
    "embed": "token_embd",
    "final_norm": "output_norm",
    "lm_head": "output",
    "attn_norm": "attn_norm",
    "attn.q": "attn_q",
    "attn.k": "attn_k",
    "attn.v": "attn_v",
    "attn.o": "attn_output",
    "mlp_norm": "ffn_norm",
    "mlp.gate": "ffn_gate",
    "mlp.up": "ffn_up",
    "mlp.down": "ffn_down",
}
# Keys under "llama." that say nothing which the result depends on.
_HARMLESS = (
    "vocab_size",
    "tensor_data_layout",
    "rope.scaling.finetuned",
    "rope.scaling.original_context_length",
)
_LIMIT = 2**31
_INT4_BITS, _FLOAT_BITS = 5.0, 16  # bits a weight of Q4_1, the widest of the 4-bit types, and of float16
_NO_TOKEN = 2**32 - 1
_FREQUENCY_FACTORS = "rope_freqs.weight"


def tensor_name(canonical: str) -> str:
    """The name in the file of the tensor with this canonical name."""
    parts = canonical.split(".")
    if parts[0] == "layers":
        return f"blk.{parts[1]}.{_TENSORS['.'.join(parts[2:-1])]}.{parts[-1]}"
    return f"{_TENSORS['.'.join(parts[:-1])]}.{parts[-1]}"


def read_config(file: GgufFile) -> _core.ModelConfig:
    """Raises ConfigError, naming the key, on what splitfuse does not run."""
    fields = _Fields(file)
    heads = fields.integer("attention.head_count")
    head_dim = fields.integer("attention.key_length", fields.integer("embedding_length") // heads)
    fields.expect("attention.value_length", head_dim)
    fields.expect("rope.dimension_count", head_dim)
    fields.expect("expert_count", 0)
    fields.expect("expert_used_count", 0)
    config = _core.ModelConfig(
        family="llama",
        vocab_size=_vocab_size(file),
        hidden_size=fields.integer("embedding_length"),
        num_layers=fields.integer("block_count"),
        num_heads=heads,
        num_kv_heads=fields.integer("attention.head_count_kv", heads),
        head_dim=head_dim,
        intermediate_size=fields.integer("feed_forward_length"),
        max_position=fields.integer("context_length"),
        norm_eps=fields.number("attention.layer_norm_rms_epsilon"),
        tie_embeddings="output.weight" not in file.tensors,
        qkv_bias="blk.0.attn_q.bias" in file.tensors,
        o_bias="blk.0.attn_output.bias" in file.tensors,
        mlp_bias="blk.0.ffn_gate.bias" in file.tensors,
        ropes=[_rope(file, fields, head_dim)],
        eos_token_ids=_eos_ids(file),
    )
    fields.check_rest()
    config.validate()
    return config


def check_tensors(file: GgufFile, config: _core.ModelConfig) -> None:
    """Raises CheckpointError, naming the tensors, if the file does not have exactly what `config` needs."""
    from .tensors import check_names

    needed = {tensor_name(name): tuple(shape) for name, shape in _core.canonical_names(config)}
    found = {name: tensor.shape for name, tensor in file.tensors.items()}
    check_names(str(file.path), needed, found, harmless=lambda name: name == _FREQUENCY_FACTORS)


def weights(file: GgufFile, config: _core.ModelConfig) -> _core.WeightSource:
    """The tensors under their canonical names, each read when it is asked for: as integers where the engine has
    such a form, any other quantised type dequantised."""
    heads = {"q": config.num_heads, "k": config.num_kv_heads}

    def read(canonical: str) -> npt.NDArray[Any] | Integers:
        tensor = file.tensors[tensor_name(canonical)]
        which = canonical.split(".")[-2]

        def in_order(rows: npt.NDArray[Any]) -> npt.NDArray[Any]:
            return np.ascontiguousarray(_half_split(rows, heads[which]) if which in heads else rows)

        as_integers = {**INT4, **INT8}.get(tensor.kind)
        if as_integers is not None and len(tensor.shape) == 2:
            return tuple(in_order(part) for part in as_integers(file.raw(tensor)))
        return in_order(file.read(tensor))

    return _core.callback_source(
        [name for name, _ in _core.canonical_names(config)], read, format=_format(file, config)
    )


def matrix_tensors(file: GgufFile, config: _core.ModelConfig) -> list[GgufTensor]:
    """The matrices of the linear layers."""
    return [
        file.tensors[tensor_name(name)]
        for name, shape in _core.canonical_names(config)
        if name.startswith("layers.") and len(shape) == 2
    ]


def _format(file: GgufFile, config: _core.ModelConfig) -> str:
    """As most of the weights of the linear layers are."""
    formats: Counter[str] = Counter()
    for tensor in matrix_tensors(file, config):
        weights = math.prod(tensor.shape)
        bits = 8 * tensor.nbytes / weights
        formats["int4" if bits <= _INT4_BITS else "int8" if bits < _FLOAT_BITS else "dense"] += weights
    return formats.most_common(1)[0][0]


def _half_split(rows: npt.NDArray[Any], heads: int) -> npt.NDArray[Any]:
    """llama.cpp rotates neighbouring rows of a head as a pair; here row i pairs with row i + head_dim / 2."""
    pairs = rows.reshape(heads, rows.shape[0] // heads // 2, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)


class _Fields:
    """The keys of the architecture, each asked for once; those never asked for are reported."""

    def __init__(self, file: GgufFile) -> None:
        self._file = file
        architecture = file.metadata.get("general.architecture")
        if architecture != "llama":
            raise ConfigError(
                f"{file.path}: architecture {architecture!r} is not supported in a GGUF file; "
                "supported: llama"
            )
        if file.metadata.get("split.count", 1) > 1:
            raise ConfigError(
                f"{file.path}: one part of a split GGUF; merge the parts with llama.cpp's gguf-split first"
            )
        self._asked = set(_HARMLESS)

    def get(self, key: str, default: Any = None) -> Any:
        self._asked.add(key)
        value = self._file.metadata.get("llama." + key, default)
        if isinstance(value, list):  # one value per layer
            if len(set(value)) != 1:
                raise ConfigError(
                    f"{self._file.path}: llama.{key} differs from layer to layer, which is not supported"
                )
            return value[0]
        return value

    def number(self, key: str, default: float | None = None) -> float:
        value = self.get(key, default)
        if value is None:
            raise ConfigError(f"{self._file.path}: llama.{key} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)):
            raise ConfigError(f"{self._file.path}: llama.{key} is {value!r}; expected a number")
        return value

    def integer(self, key: str, default: int | None = None) -> int:
        value = self.number(key, default)
        if not isinstance(value, int) or not 0 < value < _LIMIT:
            raise ConfigError(f"{self._file.path}: llama.{key} is {value!r}; expected 1 to {_LIMIT - 1}")
        return value

    def expect(self, key: str, only: Any) -> None:
        if (value := self.get(key, only)) != only:
            raise ConfigError(f"{self._file.path}: llama.{key} is {value!r}; only {only!r} is supported")

    def check_rest(self) -> None:
        for key in self._file.metadata:
            if key.startswith("llama.") and key[len("llama.") :] not in self._asked:
                raise ConfigError(f"{self._file.path}: {key} is not supported")


def _vocab_size(file: GgufFile) -> int:
    """Rows of the embedding table, which may be padded beyond the tokens that the tokenizer has."""
    table = file.tensors.get("token_embd.weight")
    if table is None:
        raise CheckpointError(f"{file.path}: tensor 'token_embd.weight' is missing")
    return table.shape[0]


def _eos_ids(file: GgufFile) -> list[int]:
    ids: list[int] = []
    for key in ("eos", "eot", "eom"):  # end of sequence, of turn, of message
        name = f"tokenizer.ggml.{key}_token_id"
        token = file.metadata.get(name, _NO_TOKEN)
        if token == _NO_TOKEN or token in ids:
            continue
        if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < _LIMIT:
            raise ConfigError(f"{file.path}: {name} is {token!r}; expected a token id")
        ids.append(token)
    return ids


def _rope(file: GgufFile, fields: _Fields, head_dim: int) -> _core.RopeConfig:
    theta = fields.number("rope.freq_base", 10000.0)
    try:
        frequencies = np.array(_core.rope_frequencies(theta, head_dim), dtype=np.float32)
    except ConfigError as error:
        raise ConfigError(f"{file.path}: {error}") from error
    kind = fields.get("rope.scaling.type", "linear")
    factor = fields.number("rope.scaling.factor", fields.number("rope.scale_linear", 1.0))
    fields.expect("rope.scaling.attn_factor", 1.0)
    if kind not in ("none", "linear"):
        raise ConfigError(f"{file.path}: llama.rope.scaling.type is {kind!r}; supported: 'none', 'linear'")
    if kind == "linear":
        if not 0 < factor < math.inf:
            raise ConfigError(
                f"{file.path}: llama.rope.scaling.factor is {factor}; expected a number above 0"
            )
        frequencies /= np.float32(factor)
    if _FREQUENCY_FACTORS in file.tensors:  # each frequency's divisor, as Llama 3.1's rule gave them
        factors = file.read(file.tensors[_FREQUENCY_FACTORS]).astype(np.float32).reshape(-1)
        if len(factors) != len(frequencies) or not ((factors > 0) & np.isfinite(factors)).all():
            raise ConfigError(
                f"{file.path}: {_FREQUENCY_FACTORS} does not hold {len(frequencies)} numbers above 0"
            )
        frequencies /= factors
    return _core.RopeConfig(inv_freq=frequencies.tolist())
