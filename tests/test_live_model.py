"""Models of transformers that are in memory, run by the engine."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from engines import random_tokens
from splitfuse import LLM, ConfigError, SamplingParams
from tiny_models import Tiny, build

GREEDY = SamplingParams(temperature=0.0, max_tokens=20, ignore_eos=True)
MOE = {"num_experts": 5, "num_experts_per_tok": 2, "moe_intermediate_size": 44, "head_dim": 24}
# Experts lie in other tensors in memory than on disk.
KINDS = {
    "llama": Tiny("llama"),
    "qwen3_moe": Tiny("qwen3_moe", MOE),
    "mixtral": Tiny("mixtral", {"num_local_experts": 4}),
}


@pytest.mark.parametrize("kind", KINDS)
def test_it_answers_as_transformers(kind: str) -> None:
    model = build(KINDS[kind])
    tokens = random_tokens(5, 40)
    prompt = torch.tensor([tokens])
    with torch.inference_mode():
        out = model.generate(
            prompt,
            attention_mask=torch.ones_like(prompt),
            max_new_tokens=20,
            min_new_tokens=20,
            do_sample=False,
            eos_token_id=None,
            pad_token_id=0,
        )
    with LLM.from_model(model, dtype="float32", threads=1, token_budget=64, kv_memory="16MiB") as llm:
        del model
        assert llm.tokenizer is None
        assert llm.generate([tokens], GREEDY)[0].token_ids == out[0, 40:].tolist()


def test_its_tokenizer_comes_along(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama(dtype="bfloat16")
    options = {"threads": 1, "token_budget": 64, "kv_memory": "16MiB"}
    model = AutoModelForCausalLM.from_pretrained(path, dtype="auto")
    with (
        LLM.from_model(model, AutoTokenizer.from_pretrained(path), **options) as live,
        LLM(path, **options) as loaded,
    ):
        assert live.generate("the", GREEDY)[0].text == loaded.generate("the", GREEDY)[0].text
        assert live.engine.model_config.to_json() == loaded.engine.model_config.to_json()


def test_ids_that_end_an_answer_come_from_both_configurations() -> None:
    model = build(KINDS["llama"])
    model.generation_config.eos_token_id = [2, 5]
    with LLM.from_model(model, threads=1, token_budget=64, kv_memory="16MiB") as llm:
        assert sorted(llm.model_config.eos_token_ids) == [2, 5]


def test_what_is_no_model_is_refused() -> None:
    with pytest.raises(ConfigError, match="expected a model of transformers, not a Linear"):
        LLM.from_model(torch.nn.Linear(2, 2))
