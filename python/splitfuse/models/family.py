"""What a family file states, and the reading of `config.json` fields that families share."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from .._core import ConfigError, ModelConfig, RopeConfig

# Hugging Face fields that alter the result in some family, with the values under which they don't. Fields
# that are in no list are ignored, as the reference implementation ignores them.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "layer_types": (),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "partial_rotary_factor": (1,),
    "pretraining_tp": (1,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "sliding_window": (),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
_INT_MAX = 2**31 - 1
_ROPE_KEYS = {"rope_type", "type", "rope_theta", "partial_rotary_factor"}
_LLAMA3_KEYS = {"factor", "low_freq_factor", "high_freq_factor", "original_max_position_embeddings"}
_SCALINGS = {"default": set(), "none": set(), "linear": {"factor"}, "llama3": _LLAMA3_KEYS}


@dataclass(frozen=True)
class Family:
    """A model family as data.

    `tensors`: canonical name -> name in the checkpoint, layers written as `layers.N.` and `{layer_prefix}N.`.
    `harmless`: endings of tensor names that a checkpoint may have and that are not weights.
    """

    name: str
    architectures: tuple[str, ...]
    config: Callable[[Fields], ModelConfig]
    tensors: Mapping[str, str]
    layer_prefix: str
    harmless: tuple[str, ...] = ()

    def tensor_name(self, canonical: str) -> str:
        stem, kind = canonical.rsplit(".", 1)
        if not stem.startswith("layers."):
            return f"{self.tensors[stem]}.{kind}"
        _, layer, rest = stem.split(".", 2)
        return f"{self.layer_prefix}{layer}.{self.tensors[rest]}.{kind}"


class Fields:
    """A `config.json`, read field by field. Every method raises ConfigError, naming file and field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{self._where}: {text}")

    def __contains__(self, name: str) -> bool:
        return self._values.get(name) is not None

    def get(self, name: str, default: Any = None) -> Any:
        """The value, or `default` where the field is missing or null."""
        value = self._values.get(name)
        return default if value is None else value

    def number(self, name: str, default: float | None = None) -> float:
        return self._number(name, self.get(name, default))

    def integer(self, name: str, default: int | None = None) -> int:
        return self._whole(name, {name: self.get(name, default)})

    def flag(self, name: str, default: bool = False) -> bool:
        value = self.get(name, default)
        if not isinstance(value, bool):
            raise self.error(f"{name} is {value!r}; expected true or false")
        return value

    def expect(self, name: str, *supported: Any) -> None:
        """The field is missing, null or one of `supported`."""
        value = self.get(name)
        if value is not None and value not in supported:
            only = " or ".join(repr(item) for item in supported) or "null"
            raise self.error(f"{name} is {_short(value)}, which is not supported; expected {only}")

    def expect_neutral(self) -> None:
        for name, values in _NEUTRAL.items():
            if name == "layer_types" and set(self.get(name, [])) <= {"full_attention"}:
                continue
            if name == "sliding_window" and self.get("use_sliding_window") is False:
                continue
            self.expect(name, *values)

    def rope(self) -> RopeConfig:
        """Rotary embedding, in transformers 5's spelling (`rope_parameters`) or the older one (`rope_theta`,
        `rope_scaling` with `rope_type` or `type`)."""
        values = {"rope_theta": self.get("rope_theta", 10000.0)}
        for field in ("rope_scaling", "rope_parameters"):
            given = self.get(field, {})
            if not isinstance(given, Mapping):
                raise self.error(f"{field} is {_short(given)}; expected an object")
            for key, value in given.items():
                if value is None:
                    continue
                if (
                    key in values
                    and field == "rope_parameters"
                    and key != "rope_theta"
                    and values[key] != value
                ):
                    raise self.error(f"rope_scaling and rope_parameters give different values of {key}")
                values[key] = value
        kinds = {
            values[key] for key in ("rope_type", "type") if key in values and isinstance(values[key], str)
        }
        kind = kinds.pop() if kinds else "default"
        if kinds or kind not in _SCALINGS:
            named, known = ", ".join(sorted([kind, *kinds])), ", ".join(_SCALINGS)
            raise self.error(f"RoPE scaling {named} is not supported; supported: {known}")
        return self._rope(kind, values)

    def eos_ids(self) -> list[int]:
        value = self.get("eos_token_id", [])
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _INT_MAX:
                raise self.error(f"eos_token_id is {_short(value)}; expected a token id or a list of them")
        return ids

    def _rope(self, kind: str, values: dict[str, Any]) -> RopeConfig:
        needed = _SCALINGS[kind]
        if kind in ("default", "none"):  # left over from a scaling that was switched off
            values = {key: value for key, value in values.items() if key not in _LLAMA3_KEYS}
        allowed = _ROPE_KEYS | needed | ({"original_max_position_embeddings"} if kind == "linear" else set())
        if unknown := sorted(set(values) - allowed):
            raise self.error(f"RoPE field {unknown[0]} is not supported with scaling {kind!r}")
        if missing := sorted(needed - set(values)):
            raise self.error(f"RoPE scaling {kind!r} lacks {', '.join(missing)}")
        numbers = {key: self._number(key, values[key]) for key in needed | {"rope_theta"}}
        if values.get("partial_rotary_factor", 1) != 1:
            raise self.error(
                f"partial_rotary_factor is {values['partial_rotary_factor']}; only 1 is supported"
            )
        theta = numbers["rope_theta"]
        if kind == "linear":
            return RopeConfig(scaling="linear", theta=theta, factor=numbers["factor"])
        if kind == "llama3":
            return RopeConfig(
                scaling="llama3",
                theta=theta,
                factor=numbers["factor"],
                low_freq_factor=numbers["low_freq_factor"],
                high_freq_factor=numbers["high_freq_factor"],
                original_max_position=self._whole("original_max_position_embeddings", values),
            )
        return RopeConfig(theta=theta)

    def _whole(self, name: str, values: Mapping[str, Any]) -> int:
        value = self._number(name, values[name])
        if not isinstance(value, int) or not 0 <= value <= _INT_MAX:
            raise self.error(f"{name} is {value!r}; expected an integer from 0 to {_INT_MAX}")
        return value

    def _number(self, name: str, value: Any) -> float:
        if value is None:
            raise self.error(f"{name} is missing")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise self.error(f"{name} is {_short(value)}; expected a number")
        return value


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
