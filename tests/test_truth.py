"""The engine against transformers on the same weights: logits, greedy tokens, and what bfloat16 costs."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from pydoc_data import topics
from typing import Any

import numpy as np
import pytest
import torch
from transformers import AutoTokenizer

from engines import ISAS, Run, log_softmax, random_tokens, reference, reference_logits

pytestmark = pytest.mark.machine_independent  # each test names its instruction set
every_isa = pytest.mark.parametrize("isa", ISAS)

RELATIVE = 2e-5  # of the largest logit of the position
NEW_TOKENS = 128
PROMPTS = [
    "The capital of France is a city on the river Seine, known for its museums, its food and the tower that",
    "def fibonacci(n):\n    '''Return the n-th number.'''\n    if n < 2:\n        return n\n    return",
    "Water boils at one hundred degrees Celsius at sea level. On a high mountain it boils at a lower temperature because",  # noqa: E501
    "Once upon a time, in a village at the edge of a dark forest, there lived an old clockmaker who",
    "To make bread you need flour, water, salt and yeast. First, dissolve the yeast in warm water, and then",
    "The three laws of motion were stated by Isaac Newton. The first of them says that a body at rest",
    "Dear Sir or Madam,\n\nI am writing to you about the order that I placed on the fourth of March. The parcel",
    "Question: If a train travels 60 kilometres in 45 minutes, what is its average speed?\nAnswer: The speed is",
]


def all_logits(path: Path, tokens: list[int], **config: Any) -> np.ndarray:
    """[len(tokens), vocab]: row i speaks of token i + 1."""
    run = Run(path, capture=True, **config)
    run.put(0, tokens, max_tokens=1, prompt_logprobs=0)
    run.finish_all()
    return np.stack([run.logits[0][position] for position in range(1, len(tokens) + 1)])


def worst(ours: np.ndarray, theirs: np.ndarray) -> float:
    """The largest error of any position, relative to its largest logit."""
    return float((np.abs(ours - theirs).max(-1) / np.abs(theirs).max(-1)).max())


# ---- Every shape the family may have

LLAMA3 = {
    "rope_type": "llama3",
    "rope_theta": 500000.0,
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 64,
}


def heads(query: int, kv: int, **fields: Any) -> dict[str, Any]:
    return {"num_attention_heads": query, "num_key_value_heads": kv, **fields}


SHAPES: dict[str, tuple[int, dict[str, Any]]] = {  # tokens, LlamaConfig fields
    "plain": (150, {}),
    "head_dim 8, a head a group": (70, heads(5, 5, head_dim=8, hidden_size=85)),
    "head_dim 40, 9 heads on 3": (70, heads(9, 3, head_dim=40, hidden_size=63)),
    "head_dim 72, 8 heads on 1": (70, heads(8, 1, head_dim=72)),
    "head_dim 128, 6 heads on 2": (70, heads(6, 2, head_dim=128, hidden_size=78)),
    "odd vocabulary and widths": (60, heads(3, 3, vocab_size=1009, hidden_size=69, intermediate_size=131)),
    "narrow": (40, heads(3, 1, hidden_size=9, intermediate_size=5, num_hidden_layers=1)),
    "tied": (60, {"tie_word_embeddings": True}),
    "attention bias": (60, {"attention_bias": True}),
    "mlp bias": (60, {"mlp_bias": True}),
    "every bias, tied": (60, {"attention_bias": True, "mlp_bias": True, "tie_word_embeddings": True}),
    "norm_eps": (60, {"rms_norm_eps": 0.3}),
    "rope theta": (300, {"rope_parameters": {"rope_type": "default", "rope_theta": 1e6}}),
    "rope linear": (300, {"rope_parameters": {"rope_type": "linear", "rope_theta": 1e4, "factor": 4.0}}),
    "rope llama3": (400, {"rope_parameters": LLAMA3, "head_dim": 64}),
    "far positions": (3000, {"max_position_embeddings": 4096, "num_hidden_layers": 2}),
    "far positions, llama3": (
        2100,
        {"rope_parameters": LLAMA3, "max_position_embeddings": 4096, "num_hidden_layers": 2, "head_dim": 32},
    ),
}


@every_isa
@pytest.mark.parametrize("shape", SHAPES)
def test_every_position_of_random_models(tiny_llama: Callable[..., Path], shape: str, isa: str) -> None:
    count, fields = SHAPES[shape]
    path = tiny_llama(seed=3, **fields)
    tokens = random_tokens(5, count)
    ours = all_logits(path, tokens, isa=isa, threads=2, token_budget=512)
    assert worst(ours, reference_logits(path, tokens)) <= RELATIVE


# ---- SmolLM2


@functools.cache
def prompts(path: Path) -> list[list[int]]:
    """All of one length, so that transformers needs no padding."""
    tokenizer = AutoTokenizer.from_pretrained(path)
    ids = [tokenizer(text)["input_ids"] for text in PROMPTS]
    return [each[: min(map(len, ids))] for each in ids]


@functools.cache
def greedy_reference(path: Path) -> np.ndarray:
    """[prompts, NEW_TOKENS] token ids, by transformers in float32 with its KV cache."""
    with torch.inference_mode():
        ids = torch.tensor(prompts(path))
        cache, chosen = None, []
        for _ in range(NEW_TOKENS):
            out = reference(path)(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            chosen.append(ids)
    return torch.cat(chosen, 1).numpy()


@every_isa
def test_greedy_tokens_of_smollm2(smollm2: Path, isa: str) -> None:
    count, new = (8, NEW_TOKENS) if isa != "ref" else (2, 16)  # the scalar kernels are there to be read
    run = Run(smollm2, isa=isa, threads=2, token_budget=64)
    for id, prompt in enumerate(prompts(smollm2)[:count]):
        run.put(id, prompt, max_tokens=new, ignore_eos=True)
    run.finish_all()
    assert [run.tokens[id] for id in range(count)] == greedy_reference(smollm2)[:count, :new].tolist()


@every_isa
def test_logits_of_smollm2(smollm2: Path, isa: str) -> None:
    """At every position of the prompts and of what was made of them."""
    count, new = (8, NEW_TOKENS) if isa != "ref" else (1, 16)
    for prompt, answer in zip(prompts(smollm2)[:count], greedy_reference(smollm2), strict=False):
        tokens = [*prompt, *answer[:new].tolist()]
        ours = all_logits(smollm2, tokens, isa=isa, threads=2, token_budget=512)
        assert worst(ours, reference_logits(smollm2, tokens)) <= RELATIVE


# ---- bfloat16

WINDOW, WINDOWS = 250, 8


@functools.cache
def text_windows(path: Path) -> list[list[int]]:
    """2,000 tokens of English, in windows that start at different places."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = AutoTokenizer.from_pretrained(path)(text[:60000])["input_ids"]
    stride = len(ids) // WINDOWS
    return [ids[i * stride : i * stride + WINDOW] for i in range(WINDOWS)]


def divergence(truth: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence of each position, in nats."""
    p, q = log_softmax(truth), log_softmax(other)
    return (np.exp(p) * (p - q)).sum(-1)


@functools.cache
def divergences(path: Path) -> list[np.ndarray]:
    """Of transformers' own bfloat16 from float32, a window each."""
    return [
        divergence(reference_logits(path, window), reference_logits(path, window, "bfloat16"))
        for window in text_windows(path)
    ]


@every_isa
def test_bfloat16_is_as_near_to_the_truth_as_transformers(smollm2: Path, isa: str) -> None:
    windows, length = (WINDOWS, WINDOW) if isa != "ref" else (2, 60)
    ours, theirs = [], []
    for window, their_divergence in zip(text_windows(smollm2)[:windows], divergences(smollm2), strict=False):
        tokens = window[:length]
        logits = all_logits(smollm2, tokens, isa=isa, dtype="bfloat16", threads=2, token_budget=256)
        ours.append(divergence(reference_logits(smollm2, tokens), logits))
        theirs.append(their_divergence[:length])
    assert sum(map(len, ours)) == windows * length
    assert np.mean(np.concatenate(theirs)) > 0
    assert np.mean(np.concatenate(ours)) <= 1.1 * np.mean(np.concatenate(theirs))
