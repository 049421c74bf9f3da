"""Rotary embeddings: from what configurations say to frequencies, step by step in float32 as transformers computes
them (`modeling_rope_utils.py`), so that both give the same angles at any position."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import numpy.typing as npt

from .._core import RopeConfig
from .family import Fields

Floats = npt.NDArray[np.float32]

_KIND_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LLAMA3 = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_YARN = {
    "factor",
    "attention_factor",
    "beta_fast",
    "beta_slow",
    "mscale",
    "mscale_all_dim",
    "truncate",
    "original_max_position_embeddings",
}
# What each kind may have beside _KIND_KEYS. What the plain kind has was left over when a scaling was switched off.
_ALLOWED = {
    "default": _LLAMA3 | _YARN,
    "linear": {"factor", "original_max_position_embeddings"},
    "dynamic": {"factor", "original_max_position_embeddings"},
    "llama3": _LLAMA3,
    "yarn": _YARN | {"finetuned"},
    "longrope": {
        "factor",
        "attention_factor",
        "short_factor",
        "long_factor",
        "original_max_position_embeddings",
    },
}
_REQUIRED = {
    "default": set[str](),
    "linear": {"factor"},
    "dynamic": {"factor"},
    "llama3": {"factor", "low_freq_factor", "high_freq_factor"},
    "yarn": {"factor"},
    "longrope": {"short_factor", "long_factor"},
}
_SAME = {"none": "default", "su": "longrope"}
# Between them all products stay within float32.
_LEAST, _MOST = 1e-6, 1e18
_MOST_DIMS = 1024  # of a head, as ModelConfig.validate() has it; here before any are computed


def rope(
    fields: Fields,
    head_dim: int,
    values: Mapping[str, Any] | None = None,
    *,
    theta: float = 10000.0,
    partial: float | None = None,
    trained: int | None = None,
) -> RopeConfig:
    """The rotary embedding that `values` describe; without them, transformers 5's `rope_parameters` or the older
    `rope_theta` and `rope_scaling`. `theta`, and `partial`, the part of a head that is rotated: where nothing else is
    said; without `partial` nothing but the whole head is taken. `trained`:
    `original_max_position_embeddings` where the file leaves it out. Raises ConfigError, naming the field, on what is
    not supported."""
    given = fields.part(_merged(fields) if values is None else values)
    kind = _kind(given)
    if unknown := sorted(given.names() - _KIND_KEYS - _ALLOWED[kind]):
        raise given.error(f"RoPE field {unknown[0]} is not supported with scaling {kind!r}")
    if missing := sorted(_REQUIRED[kind] - given.names()):
        raise given.error(f"RoPE scaling {kind!r} lacks {', '.join(missing)}")
    base = _number(given, "rope_theta", theta)
    if base <= 1:
        raise given.error(f"rope_theta is {base}; expected a number above 1")
    return _SCALINGS[kind](_Rope(fields, given, base, _dims(given, head_dim, partial), trained))


@dataclass(frozen=True)
class _Rope:
    """What scalings start from: the model's fields, those of the embedding, its base, how many dimensions turn, and
    rope()'s `trained`."""

    model: Fields
    given: Fields
    theta: float
    dims: int
    trained: int | None

    def powers(self) -> Floats:
        """theta^(2i / dims), rounded once."""
        exponents = np.arange(0, self.dims, 2, dtype=np.float32) / np.float32(self.dims)
        return (np.float64(np.float32(self.theta)) ** exponents).astype(np.float32)

    def plain(self) -> Floats:
        return np.float32(1) / self.powers()

    def factor(self) -> float:
        return _number(self.given, "factor")

    def trained_length(self) -> int:
        """Tokens of a sequence before the model was stretched. Beside the embedding it outweighs what is within."""
        name = "original_max_position_embeddings"
        if name in self.model or self.trained is not None:
            length = self.model.integer(name, self.trained)
        elif name in self.given:
            length = self.given.integer(name)
        else:
            length = self.model.integer("max_position_embeddings")
        if length < 2:
            raise self.given.error(f"{name} is {length}; expected an integer above 1")
        return length


def _merged(fields: Fields) -> dict[str, Any]:
    values = {name: fields.get(name) for name in ("rope_theta", "partial_rotary_factor")}
    older, newer = (fields.part(fields.object(name)) for name in ("rope_scaling", "rope_parameters"))
    for key in sorted((older.names() & newer.names()) - {"rope_theta"}):
        if older.get(key) != newer.get(key):
            raise fields.error(f"rope_scaling and rope_parameters give different values of {key}")
    for given in (older, newer):
        values |= {key: given.get(key) for key in given.names()}
    return values


def _kind(given: Fields) -> str:
    named = {str(given.get(key)) for key in ("rope_type", "type") if key in given}
    kinds = {_SAME.get(name, name) for name in named} or {"default"}
    if len(kinds) > 1 or not kinds <= set(_ALLOWED):
        raise given.error(
            f"RoPE scaling {', '.join(sorted(kinds))} is not supported; supported: {', '.join(_ALLOWED)}"
        )
    return kinds.pop()


def _dims(given: Fields, head_dim: int, partial: float | None) -> int:
    share = _number(given, "partial_rotary_factor", 1.0 if partial is None else partial)
    if partial is None and share != 1:
        raise given.error(f"partial_rotary_factor is {share}; only 1 is supported")
    if head_dim > _MOST_DIMS:
        raise given.error(f"head_dim is {head_dim}; expected at most {_MOST_DIMS}")
    dims = int(head_dim * share)
    if not 0 < dims <= head_dim or dims % 2:
        raise given.error(
            f"partial_rotary_factor is {share}, {dims} of {head_dim} dimensions; expected an even number of them"
        )
    return dims


def _number(given: Fields, name: str, default: float | None = None) -> float:
    value = given.number(name, default)
    if not _LEAST <= value <= _MOST:
        raise given.error(f"{name} is {value}; expected a number from {_LEAST} to {_MOST}")
    return value


def _number_or(given: Fields, name: str, default: float) -> float:
    """As _number; 0 says nothing."""
    return _number(given, name) if given.number(name, 0) != 0 else default


def _config(frequencies: Floats, magnitude: float = 1.0) -> RopeConfig:
    return RopeConfig(inv_freq=frequencies.tolist(), magnitude=magnitude)


def _default(rope: _Rope) -> RopeConfig:
    return _config(rope.plain())


def _linear(rope: _Rope) -> RopeConfig:
    return _config(rope.plain() / np.float32(rope.factor()))


def _dynamic(rope: _Rope) -> RopeConfig:
    """NTK by a sequence's length: other than plain only beyond `max_position_embeddings`, where no engine goes."""
    rope.factor()
    return _config(rope.plain())


def _llama3(rope: _Rope) -> RopeConfig:
    """Llama 3.1: low frequencies are divided, a middle band is blended."""
    factor, original = np.float32(rope.factor()), rope.trained_length()
    low, high = _number(rope.given, "low_freq_factor"), _number(rope.given, "high_freq_factor")
    if low >= high:
        raise rope.given.error(f"low_freq_factor is {low}; expected less than high_freq_factor, {high}")
    plain = rope.plain()
    wavelength = np.float32(1) / plain * np.float32(2 * math.pi)
    turns = np.float32(1) / wavelength * np.float32(original)
    smooth = (turns - np.float32(low)) / np.float32(high - low)
    blended = (1 - smooth) * plain / factor + smooth * plain
    short, long = wavelength < original / high, wavelength > original / low
    return _config(np.where(long, plain / factor, np.where(short, plain, blended)))


def _yarn(rope: _Rope) -> RopeConfig:
    """YaRN (arXiv:2309.00071): by how often a dimension turns in the original length, it is divided, kept or
    blended."""
    given, dims, factor, original = rope.given, rope.dims, rope.factor(), rope.trained_length()
    fast, slow = _number_or(given, "beta_fast", 32), _number_or(given, "beta_slow", 1)
    if fast < slow:
        raise given.error(f"beta_fast is {fast}; expected no less than beta_slow, {slow}")

    def dimension(turns: float) -> float:
        return dims * math.log(original / (turns * 2 * math.pi)) / (2 * math.log(rope.theta))

    low, high = dimension(fast), dimension(slow)
    if given.flag("truncate", True):
        low, high = math.floor(low), math.ceil(high)
    low, high = max(low, 0), min(high, dims - 1)
    if low == high:
        high += 0.001
    ramp = (np.arange(dims // 2, dtype=np.float32) - np.float32(low)) / np.float32(high - low)
    kept = 1 - np.clip(ramp, 0, 1)
    powers = rope.powers()
    divided = np.float32(1) / (np.float32(factor) * powers)
    return _config(divided * (1 - kept) + np.float32(1) / powers * kept, _yarn_magnitude(given, factor))


def _yarn_magnitude(given: Fields, factor: float) -> float:
    if "attention_factor" in given:
        return _number(given, "attention_factor")

    def magnitude(by: float) -> float:
        return 0.1 * by * math.log(factor) + 1.0 if factor > 1 else 1.0

    by, by_all = _number_or(given, "mscale", 0), _number_or(given, "mscale_all_dim", 0)
    return magnitude(by) / magnitude(by_all) if by and by_all else magnitude(1)


def _longrope(rope: _Rope) -> RopeConfig:
    """LongRoPE (arXiv:2402.13753): a divisor for each frequency, others where sequences are longer than the original
    length."""
    given, original = rope.given, rope.trained_length()
    longest = rope.model.integer("max_position_embeddings")
    factor = _number(given, "factor", longest / original)
    if "attention_factor" in given:
        magnitude = _number(given, "attention_factor")
    else:
        magnitude = math.sqrt(1 + math.log(factor) / math.log(original)) if factor > 1 else 1.0
    powers = rope.powers()

    def divided(name: str) -> Floats:
        return np.float32(1) / (_divisors(given, name, len(powers)) * powers)

    config, long = _config(divided("short_factor"), magnitude), divided("long_factor")
    if longest > original:
        config.long_from = original
        config.long_inv_freq = long.tolist()
        config.long_magnitude = magnitude
    return config


def _divisors(given: Fields, name: str, count: int) -> Floats:
    values = given.get(name)
    if not isinstance(values, list) or len(values) != count:
        raise given.error(f"{name}: expected a list of {count} numbers")
    items = given.part({f"{name}[{index}]": value for index, value in enumerate(values)})
    return np.array([_number(items, f"{name}[{index}]") for index in range(count)], dtype=np.float32)


_SCALINGS: Mapping[str, Callable[[_Rope], RopeConfig]] = {
    "default": _default,
    "linear": _linear,
    "dynamic": _dynamic,
    "llama3": _llama3,
    "yarn": _yarn,
    "longrope": _longrope,
}
