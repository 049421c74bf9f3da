"""Engines on small models: making them, running them to the end, and what transformers says of the same weights."""

from __future__ import annotations

import functools
from collections import Counter, defaultdict
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from splitfuse import _core, loader

ISAS = _core.cpu_isas()
DTYPES = ["float32", "bfloat16"]


class Kernel(NamedTuple):
    """What decides which kernels an engine runs, as fields of its configuration."""

    isa: str
    dtype: str
    kv_dtype: str = "auto"


INT8_KV = [Kernel(ISAS[-1], "bfloat16", "int8")] + [Kernel(isa, "float32", "int8") for isa in ISAS[1:2]]
EVERY_KERNEL = [Kernel(isa, dtype) for isa in ISAS for dtype in DTYPES] + INT8_KV
every_kernel = pytest.mark.parametrize("kernel", EVERY_KERNEL, ids="-".join)


def random_tokens(seed: int, count: int, vocab_size: int = 250) -> list[int]:
    return np.random.default_rng(seed).integers(0, vocab_size, count).tolist()


@functools.cache
def _model_config(path: Path) -> _core.ModelConfig:
    return loader.load(path).config


def engine_config(path: Path, *, blocks: int | None = None, **fields: Any) -> _core.EngineConfig:
    """float32, one thread, 64 tokens a forward, room for a few thousand tokens; `blocks`: of the KV pool."""
    defaults = {"dtype": "float32", "threads": 1, "token_budget": 64, "max_sequences": 64, "block_size": 16}
    config = _core.EngineConfig(**{**defaults, **fields})
    plain = {key: value for key, value in {**defaults, **fields}.items() if key != "max_model_len"}
    per_token = _core.plan_memory(_model_config(path), _core.EngineConfig(**plain)).kv_bytes_per_token
    tokens = 8192 if blocks is None else blocks * config.block_size
    config.kv_bytes = tokens * per_token
    return config


class Run:
    """An engine and its probe, and what it has said of each sequence so far."""

    def __init__(self, path: Path, *, capture: bool = False, **config: Any) -> None:
        loaded = loader.load(path)
        self.engine, self.probe = _core.testing.probed_engine(
            loaded.config, loaded.weights, engine_config(path, **config)
        )
        self.probe.capture = capture
        self.tokens: dict[int, list[int]] = defaultdict(list)
        self.finish: dict[int, str] = {}
        self.sampled: dict[int, list[_core.Sampled]] = defaultdict(list)
        self.prompt: dict[int, list[_core.PromptLogprob]] = defaultdict(list)
        self.logits: dict[int, dict[int, np.ndarray]] = defaultdict(dict)  # [id][position they speak of]
        self.preempted = 0
        self.cached = 0
        self.steps = 0

    def put(
        self, id: int, prompt: Sequence[int], *, priority: int = 0, cache_salt: str = "", **params: Any
    ) -> None:
        """Greedy unless `params` says otherwise."""
        sampling = _core.SamplingParams(**{"temperature": 0.0, **params})
        self.engine.put(id, prompt, sampling, priority, cache_salt)

    def step(self, plan: _core.StepPlan | None = None) -> _core.StepOutput:
        out = self.engine.step(plan)
        self.steps += 1
        for row in out.sampled:
            if row.token >= 0:
                self.tokens[row.id].append(row.token)
            if row.finish:
                self.finish[row.id] = row.finish
            self.sampled[row.id].append(row)
        for row in out.prompt:
            self.prompt[row.id].append(row)
        self.preempted += len(out.preempted)
        self.cached += out.cached_tokens
        if self.probe.capture:
            self._keep_logits(out)
        assert _core.testing.check(self.engine) == ""
        return out

    def _keep_logits(self, out: _core.StepOutput) -> None:
        """Rows were captured in the order of the chunks."""
        rows = Counter(row.id for row in out.prompt) + Counter(row.id for row in out.sampled)
        captured = iter(self.probe.take())
        for id, _ in out.chunks:
            for _ in range(rows[id]):
                position, logits = next(captured)
                self.logits[id][position] = logits
        assert next(captured, None) is None

    def steps_to_end(self) -> Iterator[_core.StepOutput]:
        """Fails where the engine has work but does none."""
        idle = 0
        while self.engine.has_work():
            out = self.step()
            idle = 0 if out.chunks else idle + 1
            assert idle < 3, "the engine stands still"
            yield out

    def finish_all(self) -> Run:
        for _ in self.steps_to_end():
            pass
        return self

    def answer(self, id: int, prompt: Sequence[int], **params: Any) -> list[int]:
        """The tokens of this turn."""
        before = len(self.tokens[id])
        self.put(id, prompt, **params)
        self.finish_all()
        return self.tokens[id][before:]


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


# ---- The reference


@functools.lru_cache(maxsize=4)
def reference(path: Path, dtype: str = "float32") -> Any:
    """The model as transformers runs it."""
    model = AutoModelForCausalLM.from_pretrained(path, dtype=getattr(torch, dtype))
    return model.eval()


def reference_logits(path: Path, tokens: Sequence[int], dtype: str = "float32") -> np.ndarray:
    """[len(tokens), vocab]: row i speaks of token i + 1."""
    with torch.inference_mode():
        return reference(path, dtype)(torch.tensor([list(tokens)])).logits[0].float().numpy()


def log_softmax(logits: np.ndarray) -> np.ndarray:
    wide = logits.astype(np.float64)
    wide -= wide.max(-1, keepdims=True)
    return wide - np.log(np.exp(wide).sum(-1, keepdims=True))
