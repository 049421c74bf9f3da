"""The engine against transformers on the same weights: logits, greedy tokens, and what bfloat16 and an int8 KV cache
cost."""

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

from engines import ISAS, Run, random_tokens, reference, reference_logits

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
def greedy_reference(path: Path) -> tuple[np.ndarray, np.ndarray]:
    """transformers in float32, with its KV cache: token ids [prompts, NEW_TOKENS], and the logits [prompts,
    tokens, vocab] of every position of prompts and answers; row i speaks of token i + 1."""
    logits, chosen = [], []
    with torch.inference_mode():
        ids, cache = torch.tensor(prompts(path)), None
        for _ in range(NEW_TOKENS):
            out = reference(path)(ids, past_key_values=cache, use_cache=True)
            cache, ids = out.past_key_values, out.logits[:, -1:].argmax(-1)
            logits.append(out.logits)
            chosen.append(ids)
    return torch.cat(chosen, 1).numpy(), torch.cat(logits, 1).numpy()


@every_isa
def test_greedy_tokens_and_logits_of_smollm2(smollm2: Path, isa: str) -> None:
    count, new = len(PROMPTS), NEW_TOKENS
    tokens, logits = greedy_reference(smollm2)
    run = Run(smollm2, capture=True, isa=isa, threads=2, token_budget=64)
    for id, prompt in enumerate(prompts(smollm2)[:count]):
        run.put(id, prompt, max_tokens=new, ignore_eos=True, prompt_logprobs=0)
    run.finish_all()
    assert [run.tokens[id] for id in range(count)] == tokens[:count, :new].tolist()
    for id in range(count):
        positions = sorted(run.logits[id])
        assert positions == list(range(1, len(prompts(smollm2)[id]) + new))
        ours = np.stack([run.logits[id][position] for position in positions])
        assert worst(ours, logits[id, : len(positions)]) <= RELATIVE


# ---- bfloat16

WINDOW, WINDOWS = 250, 8


@functools.cache
def text_windows(path: Path) -> list[list[int]]:
    """2,000 tokens of English, in windows that start at different places."""
    text = "\n".join(topics.topics[name] for name in sorted(topics.topics))
    ids = AutoTokenizer.from_pretrained(path)(text[:60000])["input_ids"]
    stride = len(ids) // WINDOWS
    return [ids[i * stride : i * stride + WINDOW] for i in range(WINDOWS)]


@functools.cache
def log_probabilities(path: Path, window: int) -> torch.Tensor:
    """[WINDOW, vocab], by transformers in float32."""
    return torch.log_softmax(torch.from_numpy(reference_logits(path, text_windows(path)[window])), -1)


def divergence(path: Path, window: int, logits: np.ndarray) -> np.ndarray:
    """Kullback-Leibler divergence from the truth, in nats, of each of the window's first positions."""
    truth = log_probabilities(path, window)[: len(logits)].double()
    other = torch.log_softmax(torch.from_numpy(logits).double(), -1)
    return (truth.exp() * (truth - other)).sum(-1).numpy()


@functools.cache
def their_divergence(path: Path, window: int) -> np.ndarray:
    """Of transformers' own bfloat16."""
    return divergence(path, window, reference_logits(path, text_windows(path)[window], "bfloat16"))


@every_isa
def test_bfloat16_is_as_near_to_the_truth_as_transformers(smollm2: Path, isa: str) -> None:
    windows, length = WINDOWS, WINDOW
    ours, theirs = [], []
    for window in range(windows):
        tokens = text_windows(smollm2)[window][:length]
        logits = all_logits(smollm2, tokens, isa=isa, dtype="bfloat16", threads=2, token_budget=256)
        ours += divergence(smollm2, window, logits).tolist()
        theirs += their_divergence(smollm2, window)[:length].tolist()
    assert len(ours) == windows * length
    assert np.mean(theirs) > 0
    assert np.mean(ours) <= 1.1 * np.mean(theirs)


# ---- int8 keys and values

LICENSE = Path(__file__).resolve().parent.parent / "LICENSE"


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_int8_keys_and_values_cost_less_than_half_a_percent_of_perplexity(smollm2: Path, dtype: str) -> None:
    tokens = AutoTokenizer.from_pretrained(smollm2)(LICENSE.read_text())["input_ids"][:1000]
    nats = {}
    for kv_dtype in ("auto", "int8"):
        run = Run(smollm2, dtype=dtype, kv_dtype=kv_dtype, threads=2, token_budget=256)
        run.put(0, tokens, max_tokens=1, prompt_logprobs=0)
        run.finish_all()
        assert len(run.prompt[0]) == len(tokens) - 1
        nats[kv_dtype] = -np.mean([row.logprob for row in run.prompt[0]])
    assert 1 < nats["auto"] < 5  # these are log-probabilities of something
    assert 0 < abs(nats["int8"] - nats["auto"]) < np.log(1.005)
