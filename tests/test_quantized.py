"""Models whose matrices are int8 or int4: the engine's promises hold for them too, and what integers cost is known.

Each request's truth is the request alone, its prompt in one forward, on one thread.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable
from pathlib import Path
from pydoc_data.topics import topics
from typing import Any

import gguf
import numpy as np
import pytest

from engines import ISAS, Run, random_tokens, same_bits
from k_quants import K_QUANTS
from splitfuse import LLM, ConfigError, Engine, EngineConfig, SamplingParams, _core, loader
from splitfuse.gguf_blocks import INT4, INT8

# Tests of promises name their instruction sets. What integers cost is measured once: every kernel is held to the scalar
# one elsewhere, and the scalar one would take minutes.
pytestmark = pytest.mark.machine_independent
FORMATS = ["int8", "int4"]
SHARED = random_tokens(300, 400)
PROMPTS = [random_tokens(301, 1), random_tokens(302, 63), SHARED[:130], SHARED[:257], SHARED]
DECODED = 6
every_kernel = pytest.mark.parametrize(("isa", "quantize"), [(i, q) for i in ISAS for q in FORMATS])


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(max_position_embeddings=2048)


@functools.cache
def alone(model: Path, isa: str, quantize: str, dtype: str, prompt: int) -> Run:
    run = Run(
        model, capture=True, isa=isa, quantize=quantize, dtype=dtype, token_budget=1024, prefix_caching=False
    )
    run.put(0, PROMPTS[prompt], max_tokens=DECODED)
    run.finish_all()
    run.engine.close()
    return run


def assert_same(run: Run, model: Path, isa: str, quantize: str, dtype: str) -> None:
    for id in range(len(PROMPTS)):
        truth = alone(model, isa, quantize, dtype, id)
        assert run.tokens[id] == truth.tokens[0]
        for position, logits in truth.logits[0].items():
            assert same_bits(run.logits[id][position], logits), f"sequence {id}, position {position}"


@every_kernel
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
@pytest.mark.parametrize(("budget", "threads"), [(3, 2), (64, 1), (257, 3)])
def test_splitting_never_changes_the_answer(
    model: Path, isa: str, quantize: str, dtype: str, budget: int, threads: int
) -> None:
    run = Run(
        model, capture=True, isa=isa, quantize=quantize, dtype=dtype, token_budget=budget, threads=threads
    )
    for id, prompt in enumerate(PROMPTS):
        run.put(id, prompt, max_tokens=DECODED)
    run.finish_all()
    assert_same(run, model, isa, quantize, dtype)


@every_kernel
def test_preemption_and_prefix_hits_never_do_either(model: Path, isa: str, quantize: str) -> None:
    blocks = -(-(len(SHARED) + DECODED) // 16) + 3
    run = Run(
        model, capture=True, isa=isa, quantize=quantize, dtype="bfloat16", blocks=blocks, max_model_len=416
    )
    for id in (4, 0, 1, 2, 3):
        run.put(id, PROMPTS[id], max_tokens=DECODED)
    run.finish_all()
    assert run.preempted or run.cached
    assert_same(run, model, isa, quantize, "bfloat16")


def test_matrices_take_the_memory_of_their_format() -> None:
    config = loader.load("demo").config
    plans = {q: _core.plan_memory(config, EngineConfig(quantize=q)) for q in ("dense", *FORMATS)}
    dense = plans["dense"].weights
    assert plans["int8"].weights == pytest.approx(dense * 17 / 32, rel=0.02)
    assert plans["int4"].weights == pytest.approx(dense * (106 * 5 / 8 + 28 * 17 / 16) / (134 * 2), rel=0.02)
    assert plans["int8"].workspace > plans["dense"].workspace  # rows as integers


def test_the_option_reaches_the_engine_and_others_are_refused(model: Path) -> None:
    with LLM(model, quantize="int4", token_budget=64) as llm:
        assert "int4 weights" in llm.engine.describe()
    with pytest.raises(ConfigError, match=r"quantize.*int3.*int8"):
        LLM(model, quantize="int3")


# ---- What integers cost, on the real model

WINDOW, WINDOWS = 512, 10


@functools.cache
def text() -> list[list[int]]:
    """Pieces of Python's own help, as tokens."""
    tokenizer = loader.load("demo").tokenizer
    assert tokenizer is not None
    ids = tokenizer.encode("\n\n".join(topics[name] for name in sorted(topics)))
    return [list(ids[2400 * i : 2400 * i + WINDOW]) for i in range(WINDOWS)]


def perplexity(weights: _core.WeightSource, **config: Any) -> float:
    engine = Engine(loader.load("demo").config, weights, EngineConfig(token_budget=WINDOW, **config))
    total = count = 0.0
    for id, window in enumerate(text()):
        engine.put(id, window, _core.SamplingParams(max_tokens=1, temperature=0.0, prompt_logprobs=0))
        while engine.has_work():
            for row in engine.step().prompt:
                total -= row.logprob
                count += 1
    engine.close()
    return math.exp(total / count)


def dequantized(quantize: str) -> _core.WeightSource:
    """The demo's weights as they are in the format, in float32."""
    source = loader.load("demo").weights
    ops = {f: _core.testing.Ops(dtype="float32", isa="auto", threads=2, format=f) for f in FORMATS}

    def read(name: str) -> np.ndarray:
        weight = source.read(name)
        if weight.ndim != 2:
            return weight
        run = ops["int8" if name == "embed.weight" else quantize]
        parts = np.array_split(weight, -(-len(weight) // 1000))
        return np.concatenate([run.embed(part, list(range(len(part)))) for part in parts])

    return _core.callback_source(
        [name for name, _ in _core.canonical_names(loader.load("demo").config)], read
    )


@pytest.mark.parametrize("quantize", FORMATS)
def test_rows_as_integers_cost_little(quantize: str, record_property: Callable[[str, object], None]) -> None:
    """Beyond what the format itself implies: its weights in float32, activations exact."""
    implied = perplexity(dequantized(quantize), dtype="float32")
    got = perplexity(loader.load("demo").weights, quantize=quantize)
    record_property("perplexity", f"{got:.4f}, implied by the format {implied:.4f}")
    assert got == pytest.approx(implied, rel=5e-3)


# A GGUF type for rows of whole 256, the one for others, and what is run. (llama.cpp falls back likewise: this model's
# rows are 576 and 1536 long.)
@pytest.mark.parametrize(
    ("kind", "other", "quantize"),
    [
        ("Q4_0", "Q4_0", "int4"),
        ("Q4_1", "Q4_1", "int4"),
        ("Q4_K", "Q4_1", "int4"),
        ("Q5_0", "Q5_0", "int8"),
        ("Q5_1", "Q5_1", "int8"),
        ("Q6_K", "Q8_0", "int8"),
        ("Q8_0", "Q8_0", "int8"),
    ],
)
def test_gguf_types_as_integers_cost_little(
    kind: str, other: str, quantize: str, record_property: Callable[[str, object], None]
) -> None:
    """Beside the same file's weights in float32."""
    demo = loader.load("demo")
    matrices: dict[str, Any] = {}
    floats = {}
    for name in demo.weights.names():
        weight = demo.weights.read(name).copy()
        if weight.ndim == 2:
            chosen = kind if weight.shape[1] % 256 == 0 else other
            raw = gguf_rows(weight, chosen)
            weight = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[chosen])
            matrices[name] = {**INT4, **INT8}.get(chosen, lambda _, same=weight: same)(raw)
        floats[name] = weight
    names = demo.weights.names()
    implied = perplexity(_core.callback_source(names, floats.__getitem__), dtype="float32")
    got = perplexity(_core.callback_source(names, lambda n: matrices.get(n, floats[n])), quantize=quantize)
    record_property("perplexity", f"{kind} as {quantize}: {got:.4f}, in float32 {implied:.4f}")
    assert got < implied * 1.005


# llama.cpp's Q4_K_M: 4 bits, but 6 for attention's values and for down in the layers where they matter most.
def more_bits(layer: int, layers: int) -> bool:
    eighth = layers // 8
    return layer < eighth or layer >= 7 * layers // 8 or (layer - eighth) % 3 == 2


@pytest.mark.parametrize(("quantize", "cost"), [("int4", 1.005), ("int8", 1.005)])
def test_a_file_of_mixed_types_costs_what_the_fit_of_the_others_does(
    quantize: str, cost: float, record_property: Callable[[str, object], None]
) -> None:
    """As most of the weights are: 4 bits. Those of 6 are fitted anew."""
    demo = loader.load("demo")
    floats, given = {}, {}
    for name in demo.weights.names():
        weight = given[name] = demo.weights.read(name).copy()
        if weight.ndim == 2:
            picked = name.endswith(("attn.v.weight", "mlp.down.weight")) or name == "embed.weight"
            fine = picked and (name == "embed.weight" or more_bits(int(name.split(".")[1]), 30))
            wide, other = ("Q6_K", "Q8_0") if fine else ("Q4_K", "Q4_1")
            kind = wide if weight.shape[1] % 256 == 0 else other
            raw = gguf_rows(weight, kind)
            weight = gguf.quants.dequantize(raw, gguf.GGMLQuantizationType[kind])
            given[name] = {**INT4, **INT8}.get(kind, lambda _, same=weight: same)(raw)
        floats[name] = weight
    implied = perplexity(_core.callback_source(list(floats), floats.__getitem__), dtype="float32")
    got = perplexity(_core.callback_source(list(given), given.__getitem__), quantize=quantize)
    record_property("perplexity", f"Q4_K_M as {quantize}: {got:.4f}, in float32 {implied:.4f}")
    assert got < implied * cost


def gguf_rows(weight: np.ndarray, kind: str) -> np.ndarray:
    if kind in K_QUANTS:
        return K_QUANTS[kind](weight)
    return gguf.quants.quantize(weight, gguf.GGMLQuantizationType[kind])


@pytest.mark.parametrize("quantize", FORMATS)
def test_greedy_answers_stay_sensible(quantize: str) -> None:
    with LLM("demo", quantize=quantize, kv_memory="64MiB") as llm:
        chat = [{"role": "user", "content": "How many days are in a week?"}]
        answer = llm.chat(chat, SamplingParams(max_tokens=12, temperature=0.0))[0]
    assert "7 days" in answer.text
