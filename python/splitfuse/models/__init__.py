"""Model families. A family is one short file: what its Hugging Face `config.json` means, and how its tensors
are called. Its class name in `architectures` picks it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from .._core import ConfigError
from .bloom import BLOOM
from .cohere import COHERE, COHERE2
from .exaone4 import EXAONE4
from .falcon import FALCON
from .family import Family
from .gemma import GEMMA, GEMMA2, GEMMA3
from .glm import GLM, GLM4
from .gpt2 import GPT2, GPT_BIGCODE
from .gpt_neox import GPT_NEOX
from .gpt_oss import GPT_OSS
from .gptj import GPTJ
from .granite import GRANITE, MINICPM
from .internlm2 import INTERNLM2
from .llama import LLAMA, MISTRAL
from .mixtral import MIXTRAL
from .olmo2 import OLMO2
from .opt import OPT
from .phi import PHI
from .phi3 import PHI3
from .qwen import QWEN, QWEN2, QWEN3
from .qwen_moe import QWEN2_MOE, QWEN3_MOE
from .smollm3 import SMOLLM3
from .stablelm import STABLELM
from .starcoder2 import STARCODER2

FAMILIES: tuple[Family, ...] = (
    BLOOM,
    COHERE,
    COHERE2,
    EXAONE4,
    FALCON,
    GEMMA,
    GEMMA2,
    GEMMA3,
    GLM,
    GLM4,
    GPT2,
    GPTJ,
    GPT_BIGCODE,
    GPT_NEOX,
    GPT_OSS,
    GRANITE,
    INTERNLM2,
    LLAMA,
    MINICPM,
    MISTRAL,
    MIXTRAL,
    OLMO2,
    OPT,
    PHI,
    PHI3,
    QWEN,
    QWEN2,
    QWEN2_MOE,
    QWEN3,
    QWEN3_MOE,
    SMOLLM3,
    STABLELM,
    STARCODER2,
)

__all__ = ["FAMILIES", "Family", "family_of", "supported_architectures"]


def supported_architectures() -> list[str]:
    return sorted(name for family in FAMILIES for name in family.architectures)


def family_of(config: Mapping[str, Any], where: str) -> Family:
    """The family of a `config.json`. Raises ConfigError, listing what is supported, for any other."""
    names = config.get("architectures")
    named = names if isinstance(names, list) else []
    for family in FAMILIES:
        if any(name in family.architectures for name in named):
            return family
    raise ConfigError(
        f"{where}: architecture {', '.join(map(str, named)) or 'not named'} is not supported; "
        f"supported: {', '.join(supported_architectures())}"
    )
