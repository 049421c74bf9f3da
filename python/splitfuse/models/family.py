"""What a family file states, and the reading of `config.json` fields that families share."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy.typing as npt

from .._core import ConfigError, ModelConfig, canonical_names

# Hugging Face fields that alter the result in some family, with the values under which they don't. A field
# that is neither here nor asked for is ignored, as the reference implementation ignores what its classes don't read.
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    "alibi": (False,),
    "attention_multiplier": (),
    "attn_logit_softcapping": (),
    "clip_qkv": (),
    "embedding_multiplier": (1,),
    "final_logit_softcapping": (),
    "full_attn_mod": (1,),
    "interpolate_factor": (1,),
    "kv_lora_rank": (),
    "layer_types": (),
    "lm_head_bias": (False,),
    "logit_scale": (1,),
    "logits_scaling": (1,),
    "n_routed_experts": (0,),
    "no_rope_layers": ([],),
    "num_experts": (0,),
    "num_local_experts": (0,),
    "quantization_config": (),
    "query_pre_attn_scalar": (),
    "residual_multiplier": (1,),
    "rope_interleaved": (False,),
    "rotary_pct": (1,),
    "sliding_window": (),
    "sparse_config": (),
    "use_qk_norm": (False,),
    "use_sliding_window": (False,),
}
_INT_MAX = 2**31 - 1
_MOST = 4096  # layers, heads: as ModelConfig.validate() has it, here before lists of that length are made
_FLOAT_MAX = sys.float_info.max
_ACTIVATIONS = {
    "silu": "silu",
    "swish": "silu",
    "gelu": "gelu",
    "gelu_python": "gelu",
    "gelu_accurate": "gelu_tanh",
    "gelu_new": "gelu_tanh",
    "gelu_fast": "gelu_tanh",
    "gelu_pytorch_tanh": "gelu_tanh",
    "relu": "relu",
}


Array = npt.NDArray[Any]
Make = Callable[[Array, ModelConfig, int], Array]


class Part(NamedTuple):
    """A canonical weight that is made of a tensor: `make(tensor, config, expert)`. `bare`: `name` is the tensor's whole
    name, without .weight or .bias behind it. `many`: it is made of so many tensors, one after another, `{}` in `name`
    being their numbers."""

    name: str
    make: Make | None = None
    bare: bool = False
    many: Callable[[ModelConfig], int] | None = None


class Source(NamedTuple):
    """The tensor that a canonical weight comes from, or several, one after another, and what is made of them; None:
    they are taken as they are."""

    names: tuple[str, ...]
    make: Callable[[Array], Array] | None


Names = Mapping[str, str | Part]


@dataclass(frozen=True)
class Family:
    """A model family as data.

    `tensors`: canonical name -> name in the checkpoint, without the layers' `layers.N.` and `layer_prefix` (with the
    layer for its `{}`), the endings .weight and .bias, and `moe.E.` for experts: `moe.expert.` stands for each of them,
    with `{}` for its number, `moe.shared.` for the one that all tokens have. An ending may be given, where weight and
    bias have names of their own. A function where the names depend on the configuration.
    `harmless`: endings of tensor names that a checkpoint may have and that are not weights.
    `base`: the beginning of names that checkpoints of the model without its head leave out.
    """

    name: str
    architectures: tuple[str, ...]
    config: Callable[[Fields], ModelConfig]
    tensors: Names | Callable[[ModelConfig], Names]
    layer_prefix: str = "model.layers.{}."
    harmless: tuple[str, ...] = ()
    base: str = ""

    def read(self, fields: Fields) -> ModelConfig:
        """What `config.json` means. Raises ConfigError, naming the field, where that is nothing that can be run."""
        try:
            config = self.config(fields)
        except (ArithmeticError, AttributeError, LookupError, TypeError) as error:
            raise fields.error(f"not a configuration of {self.name}: {error}") from error
        config.family = self.name
        config.eos_token_ids = fields.eos_ids()
        fields.expect_rest_neutral()
        return config

    def sources(self, config: ModelConfig, found: Iterable[str] = ()) -> dict[str, Source]:
        """Of every weight that a model needs, by canonical name. `found`: the names that the checkpoint has."""
        names = self.tensors(config) if callable(self.tensors) else self.tensors
        sources = {
            canonical: self._source(names, config, canonical) for canonical, _ in canonical_names(config)
        }
        if not self.base or any(name.startswith(self.base) for name in found):
            return sources
        return {
            canonical: Source(tuple(name.removeprefix(self.base) for name in source.names), source.make)
            for canonical, source in sources.items()
        }

    def _source(self, names: Names, config: ModelConfig, canonical: str) -> Source:
        stem, kind = canonical.rsplit(".", 1)
        prefix, expert = "", 0
        if stem.startswith("layers."):
            _, layer, stem = stem.split(".", 2)
            prefix = self.layer_prefix.format(layer)
        parts = stem.split(".")
        if parts[0] == "moe" and parts[1].isdigit():
            expert = int(parts[1])
            shared = config.moe.shared_intermediate_size > 0 and expert == config.moe.experts
            stem = f"moe.{'shared' if shared else 'expert'}.{parts[2]}"
        given = names.get(f"{stem}.{kind}") or names[stem]
        part = Part(given) if isinstance(given, str) else given
        numbers = [expert] if part.many is None else range(part.many(config))
        ending = "" if part.bare else f".{kind}"
        tensors = tuple(f"{prefix}{part.name.format(number)}{ending}" for number in numbers)
        make = part.make
        return Source(tensors, None if make is None else lambda array: make(array, config, expert))

    def is_harmless(self, name: str, config: ModelConfig) -> bool:
        if name.endswith(self.harmless):
            return True
        return config.tie_embeddings and name == self.head_name(config)

    def head_name(self, config: ModelConfig) -> str:
        """The tensor of an output head that is not tied."""
        names = self.tensors(config) if callable(self.tensors) else self.tensors
        return f"{names.get('lm_head')}.weight"


class Fields:
    """A `config.json`, read field by field. Every method raises ConfigError, naming file and field."""

    def __init__(self, values: Mapping[str, Any], where: str) -> None:
        self._values = values
        self._where = where
        self._asked: set[str] = set()

    def error(self, text: str) -> ConfigError:
        return ConfigError(f"{self._where}: {text}")

    def __contains__(self, name: str) -> bool:
        self._asked.add(name)
        return self._values.get(name) is not None

    def get(self, name: str, default: Any = None, *, missing: Any = None) -> Any:
        """The value, or `default` where the field is missing or null. `missing`: instead, where it is missing; files
        leave out what has their class's default, and null may mean something else."""
        self._asked.add(name)
        if missing is not None and name not in self._values:
            return missing
        value = self._values.get(name)
        return default if value is None else value

    def which(self, *names: str) -> str:
        """The first of `names`, which mean the same, that the file has; the first if it has none."""
        return next((name for name in names if name in self), names[0])

    def names(self) -> set[str]:
        """Of the fields that have a value."""
        return {name for name, value in self._values.items() if value is not None}

    def part(self, values: Mapping[str, Any]) -> Fields:
        """Fields that lie deeper in the file."""
        return Fields(values, self._where)

    def number(self, name: str, default: float | None = None, *, missing: float | None = None) -> float:
        value = self.get(name, default, missing=missing)
        if value is None:
            raise self.error(f"{name} is missing or null; expected a number")
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not abs(value) <= _FLOAT_MAX:
            raise self.error(f"{name} is {_short(value)}; expected a number")
        return value

    def positive(self, name: str, default: float | None = None) -> float:
        value = self.number(name, default)
        if not value > 0:
            raise self.error(f"{name} is {value}; expected a number above 0")
        return value

    def integer(
        self,
        name: str,
        default: int | None = None,
        *,
        missing: int | None = None,
        low: int = 0,
        high: int = _INT_MAX,
    ) -> int:
        value = self.number(name, default, missing=missing)
        if not isinstance(value, int) or not low <= value <= high:
            raise self.error(f"{name} is {_short(value)}; expected an integer from {low} to {high}")
        return value

    def layers(self, *names: str) -> int:
        """How many the model has, under the first of `names` that the file has."""
        return self.integer(self.which(*names or ("num_hidden_layers",)), low=1, high=_MOST)

    def heads(self, *names: str) -> int:
        """As layers(), of query heads."""
        return self.integer(self.which(*names or ("num_attention_heads",)), low=1, high=_MOST)

    def integers(self, name: str) -> list[int]:
        """A list of them, none below 0; empty if it is missing."""
        value = self.get(name, [])
        if not isinstance(value, list):
            raise self.error(f"{name} is {_short(value)}; expected a list of integers")
        items = self.part({f"{name}[{index}]": item for index, item in enumerate(value)})
        return [items.integer(f"{name}[{index}]") for index in range(len(value))]

    def words(self, name: str) -> list[str]:
        """A list of strings; empty if it is missing."""
        value = self.get(name, [])
        if not isinstance(value, list) or not all(isinstance(item, str) for item in value):
            raise self.error(f"{name} is {_short(value)}; expected a list of words")
        return value

    def activation(self, name: str = "hidden_act", default: str | None = None) -> str:
        """A ModelConfig.activation."""
        value = self.get(name, default)
        if not isinstance(value, str) or value not in _ACTIVATIONS:
            known = ", ".join(_ACTIVATIONS)
            raise self.error(f"{name} is {_short(value)}, which is not supported; supported: {known}")
        return _ACTIVATIONS[value]

    def head_dim(self, hidden: int, heads: int, name: str = "head_dim", *, missing: int | None = None) -> int:
        """As the file gives it, or hidden / heads. `missing`: as get()'s."""
        if self.get(name, missing=missing) is None and hidden % heads != 0:
            raise self.error(
                f"num_attention_heads is {heads}; expected a divisor of the hidden size, {hidden}"
            )
        return self.integer(name, hidden // heads, missing=missing)

    def flag(self, name: str, default: bool = False, *, missing: bool | None = None) -> bool:
        value = self.get(name, default, missing=missing)
        if not isinstance(value, bool):
            raise self.error(f"{name} is {_short(value)}; expected true or false")
        return value

    def object(self, name: str) -> Mapping[str, Any]:
        value = self.get(name, {})
        if not isinstance(value, Mapping):
            raise self.error(f"{name} is {_short(value)}; expected an object")
        return value

    def expect(self, name: str, *supported: Any) -> None:
        """The field is missing, null or one of `supported`."""
        value = self.get(name)
        if value is not None and value not in supported:
            only = " or ".join(repr(item) for item in supported) or "null"
            raise self.error(f"{name} is {_short(value)}, which is not supported; expected {only}")

    def expect_rest_neutral(self) -> None:
        """Of the fields that no one has asked for, none alters the result."""
        for name, values in _NEUTRAL.items():
            if name in self._asked:
                continue
            if name == "layer_types" and self._is_list_of(name, "full_attention"):
                continue
            if name == "sliding_window" and self._values.get("use_sliding_window") is False:
                continue
            self.expect(name, *values)

    def _is_list_of(self, name: str, item: str) -> bool:
        value = self.get(name)
        return isinstance(value, list) and all(found == item for found in value)

    def eos_ids(self) -> list[int]:
        value = self.get("eos_token_id", [])
        ids = value if isinstance(value, list) else [value]
        for token in ids:
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token <= _INT_MAX:
                raise self.error(f"eos_token_id is {_short(value)}; expected a token id or a list of them")
        return ids


def _short(value: Any) -> str:
    text = repr(value)
    return text if len(text) <= 60 else text[:57] + "..."
