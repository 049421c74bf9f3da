"""Architectures of GGUF files: the model family of each, how its queries and keys are rotated, and what its metadata
mean, in the words of a config.json. What llama.cpp fixes in its code stands here too."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import Any

from . import gguf_rope
from .gguf_keys import Keys
from .models.bloom import BLOOM
from .models.cohere import COHERE, COHERE2
from .models.exaone4 import EXAONE4
from .models.falcon import FALCON
from .models.family import Family
from .models.gemma import GEMMA, GEMMA2, GEMMA3
from .models.glm import GLM, GLM4
from .models.gpt2 import GPT2, GPT_BIGCODE
from .models.gpt_neox import GPT_NEOX
from .models.gpt_oss import GPT_OSS
from .models.gptj import GPTJ
from .models.granite import GRANITE, MINICPM
from .models.internlm2 import INTERNLM2
from .models.llama import LLAMA
from .models.mixtral import MIXTRAL
from .models.olmo2 import OLMO2
from .models.phi import PHI
from .models.phi3 import PHI3
from .models.qwen import QWEN, QWEN2, QWEN3
from .models.qwen_moe import QWEN2_MOE, QWEN3_MOE
from .models.smollm3 import SMOLLM3
from .models.stablelm import STABLELM
from .models.starcoder2 import STARCODER2

Values = dict[str, Any]
_SOFTMAX, _TOP_SOFTMAX = 1, 3  # values of expert_gating_func; 0: not said


@dataclass(frozen=True)
class Arch:
    """`pairs`: neighbours in a head are rotated together; their order is changed when weights are read.
    `partial`: of each head maybe a part. `more`: fields
    of the config.json beside those that all have. `names`: tensors that are not called as in other architectures."""

    family: Family
    more: Callable[[Keys, Values], None] = lambda keys, values: None
    pairs: bool = False
    rope: bool = True
    partial: bool = False
    rms: bool = True
    experts: bool = False
    names: Mapping[str, str] = field(default_factory=dict)


def config_json(arch: Arch, keys: Keys) -> Values:
    """The fields of the config.json that the file was made from, as far as they matter. Raises ConfigError, naming the
    key, on what is not supported."""
    hidden, heads = keys.integer("embedding_length"), keys.integer("attention.head_count")
    head_dim = keys.integer("attention.key_length", hidden // heads)
    keys.expect("attention.value_length", head_dim)
    keys.expect("attention.causal", True)
    kv_heads = keys.integer("attention.head_count_kv", heads)
    length = keys.integer("context_length")
    width = keys.integer("feed_forward_length")
    eps = keys.above_zero(f"attention.layer_norm_{'rms_' if arch.rms else ''}epsilon")
    values: Values = {
        "hidden_size": hidden,
        "num_hidden_layers": keys.integer("block_count"),
        "num_attention_heads": heads,
        **dict.fromkeys(("num_key_value_heads", "num_kv_heads"), kv_heads),
        **dict.fromkeys(("head_dim", "kv_channels"), head_dim),
        **dict.fromkeys(("intermediate_size", "n_inner", "ffn_hidden_size"), width),
        **dict.fromkeys(("max_position_embeddings", "seq_length"), length),
        **dict.fromkeys(("rms_norm_eps", "layer_norm_eps", "layer_norm_epsilon", "norm_epsilon"), eps),
        "eos_token_id": keys.eos_ids(),
    }
    if arch.rope:
        values["rope_parameters"] = gguf_rope.parameters(keys, head_dim, arch.partial)
    if not arch.experts:
        keys.expect("expert_count", 0)
        keys.expect("expert_used_count", 0)
    arch.more(keys, values)
    return values


def _experts(keys: Keys, values: Values, name: str, gating: int = _SOFTMAX) -> None:
    """`name`: of the number of experts."""
    values[name] = keys.integer("expert_count")
    values["num_experts_per_tok"] = keys.integer("expert_used_count")
    keys.expect("expert_gating_func", 0, gating)
    keys.expect("expert_weights_scale", 0.0, 1.0)


def _mixtral(keys: Keys, values: Values) -> None:
    _experts(keys, values, "num_local_experts")
    keys.expect("expert_weights_norm", True)
    keys.expect("expert_feed_forward_length", values["intermediate_size"])


def _qwen2moe(keys: Keys, values: Values) -> None:
    _experts(keys, values, "num_experts")
    values["moe_intermediate_size"] = keys.integer("expert_feed_forward_length")
    values["shared_expert_intermediate_size"] = keys.integer("expert_shared_feed_forward_length")
    values["norm_topk_prob"] = keys.flag("expert_weights_norm", False)


def _qwen3moe(keys: Keys, values: Values) -> None:
    _experts(keys, values, "num_experts")
    values["moe_intermediate_size"] = keys.integer("expert_feed_forward_length")
    values["norm_topk_prob"] = keys.flag("expert_weights_norm", True)


def _qwen(keys: Keys, values: Values) -> None:
    rope = values["rope_parameters"]
    keys.expect("rope.scaling.type", "none", "linear")
    keys.expect("rope.scaling.factor", 1.0)
    values |= {"rotary_emb_base": rope["rope_theta"], "rotary_pct": rope["partial_rotary_factor"]}


def _windows(period: int) -> Callable[[Keys, Values], None]:
    """All layers but each `period`-th have the window, unless the file says which."""

    def more(keys: Keys, values: Values) -> None:
        window = keys.integer("attention.sliding_window", 0, least=0)
        pattern = keys.layers("attention.sliding_window_pattern", period)
        count = values["num_hidden_layers"]
        if isinstance(pattern, int) and not isinstance(pattern, bool) and pattern > 0:
            pattern = [(i + 1) % pattern != 0 for i in range(count)]
        if not isinstance(pattern, list) or len(pattern) != count:
            raise keys.error(
                "attention.sliding_window_pattern",
                f"is {pattern!r}; expected a number, or one for each layer",
            )
        local = [bool(has) and window > 0 for has in pattern]
        values["sliding_window"] = window or None
        values["layer_types"] = ["sliding_attention" if has else "full_attention" for has in local]

    return more


def _phi3(keys: Keys, values: Values) -> None:
    values["sliding_window"] = keys.integer("attention.sliding_window", 0, least=0)


def _gemma_scale(keys: Keys, values: Values, largest: int) -> None:
    """The largest model of a series, known by its number of layers, scales scores by another width than its heads'."""
    width = values["hidden_size"] / values["num_attention_heads"]
    other = values["num_hidden_layers"] == largest
    scale = keys.above_zero("attention.scale", (width if other else values["head_dim"]) ** -0.5)
    values["query_pre_attn_scalar"] = scale**-2


def _gemma2(keys: Keys, values: Values) -> None:
    _windows(2)(keys, values)
    _gemma_scale(keys, values, largest=46)
    values["attn_logit_softcapping"] = keys.number("attn_logit_softcapping", 50.0)
    values["final_logit_softcapping"] = keys.number("final_logit_softcapping", 30.0)


def _gemma3(keys: Keys, values: Values) -> None:
    _windows(6)(keys, values)
    _gemma_scale(keys, values, largest=62)
    values["final_logit_softcapping"] = keys.number("final_logit_softcapping", 0.0)
    local = {"rope_theta": keys.number("rope.freq_base_swa", 10000.0)}
    values["rope_parameters"] = {"full_attention": values["rope_parameters"], "sliding_attention": local}


def _gpt_oss(keys: Keys, values: Values) -> None:
    _windows(2)(keys, values)
    _experts(keys, values, "num_local_experts", _TOP_SOFTMAX)
    values["intermediate_size"] = keys.integer("expert_feed_forward_length")
    if values["rope_parameters"].get("rope_type") == "yarn":
        values["rope_parameters"]["truncate"] = False


def _starcoder(keys: Keys, values: Values) -> None:
    values["multi_query"] = values["num_key_value_heads"] == 1


def _gptneox(keys: Keys, values: Values) -> None:
    values["use_parallel_residual"] = keys.flag("use_parallel_residual", True)


def _gptj(keys: Keys, values: Values) -> None:
    values["rotary_dim"] = keys.integer("rope.dimension_count", values["head_dim"])
    keys.expect("rope.freq_base", 10000.0)
    keys.expect("rope.scaling.type", "none", "linear")
    keys.expect("rope.scaling.factor", 1.0)


def _falcon(keys: Keys, values: Values) -> None:
    values["new_decoder_architecture"] = True
    values["num_ln_in_parallel_attn"] = 2 if keys.has("blk.0.attn_norm_2.weight") else 1


def _stablelm(keys: Keys, values: Values) -> None:
    keys.get("use_parallel_residual")  # converters write true in every file
    values["use_parallel_residual"] = not keys.has("blk.0.ffn_norm.weight")
    values["qk_layernorm"] = keys.has("blk.0.attn_q_norm.weight")


def _command_r(keys: Keys, values: Values) -> None:
    values["logit_scale"] = keys.number("logit_scale")
    values["use_qk_norm"] = keys.has("blk.0.attn_q_norm.weight")


def _cohere2(keys: Keys, values: Values) -> None:
    _windows(4)(keys, values)
    values["logit_scale"] = keys.number("logit_scale")


def _granite(keys: Keys, values: Values) -> None:
    values["attention_multiplier"] = keys.above_zero("attention.scale", values["head_dim"] ** -0.5)
    values["embedding_multiplier"] = keys.number("embedding_scale", 1.0)
    values["residual_multiplier"] = keys.number("residual_scale", 1.0)
    values["logits_scaling"] = keys.above_zero("logit_scale", 1.0)


def _minicpm(keys: Keys, values: Values) -> None:
    """Older files leave the scales of MiniCPM 1B and 2B to the reader."""
    hidden, root = values["hidden_size"], math.sqrt(values["num_hidden_layers"])
    values["scale_emb"] = keys.number("embedding_scale", 12.0)
    values["scale_depth"] = keys.number("residual_scale", 1.4 / root) * root
    values["dim_model_base"] = hidden / keys.above_zero("logit_scale", hidden / 256)


ARCHS: Mapping[str, Arch] = {
    "bloom": Arch(BLOOM, rope=False, rms=False),
    "chatglm": Arch(GLM, partial=True, pairs=True),
    "cohere2": Arch(COHERE2, _cohere2, pairs=True, rms=False),
    "command-r": Arch(COHERE, _command_r, pairs=True, rms=False),
    "exaone4": Arch(EXAONE4, _windows(4)),
    "falcon": Arch(FALCON, _falcon, rms=False),
    "gemma": Arch(GEMMA),
    "gemma2": Arch(GEMMA2, _gemma2),
    "gemma3": Arch(GEMMA3, _gemma3),
    "glm4": Arch(GLM4, partial=True, pairs=True),
    "gpt-oss": Arch(GPT_OSS, _gpt_oss, experts=True, names={"mlp_norm": "post_attention_norm"}),
    "gpt2": Arch(GPT2, rope=False, rms=False),
    "gptj": Arch(GPTJ, _gptj, partial=True, pairs=True, rms=False),
    "gptneox": Arch(GPT_NEOX, _gptneox, partial=True, rms=False),
    "granite": Arch(GRANITE, _granite, pairs=True),
    "internlm2": Arch(INTERNLM2, pairs=True),
    "llama": Arch(LLAMA, pairs=True),
    "minicpm": Arch(MINICPM, _minicpm, pairs=True),
    "olmo2": Arch(OLMO2),
    "phi2": Arch(PHI, partial=True, rms=False),
    "phi3": Arch(PHI3, _phi3, partial=True),
    "qwen": Arch(QWEN, _qwen, partial=True),
    "qwen2": Arch(QWEN2),
    "qwen2moe": Arch(QWEN2_MOE, _qwen2moe, experts=True),
    "qwen3": Arch(QWEN3),
    "qwen3moe": Arch(QWEN3_MOE, _qwen3moe, experts=True),
    "smollm3": Arch(SMOLLM3, pairs=True),
    "stablelm": Arch(STABLELM, _stablelm, partial=True, rms=False),
    "starcoder": Arch(GPT_BIGCODE, _starcoder, rope=False, rms=False),
    "starcoder2": Arch(STARCODER2, rms=False),
}


def arch_of(keys: Keys) -> Arch:
    arch = ARCHS[keys.architecture]
    if keys.architecture == "llama" and keys.integer("expert_count", 0, least=0) > 0:
        return replace(arch, family=MIXTRAL, more=_mixtral, experts=True)
    if keys.architecture == "falcon" and keys.has("blk.0.attn_norm_2.weight"):
        return replace(arch, names={"attn_norm": "attn_norm_2", "mlp_norm": "attn_norm"})
    return arch
