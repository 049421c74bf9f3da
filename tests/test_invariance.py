"""Splitting never changes the answer: logits are the same bits however a sequence was cut, batched, placed, preempted
or found in the prefix cache. Each request's truth is the request alone, its prompt in one forward, on one thread.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from engines import DTYPES, ISAS, Kernel, Run, every_kernel, random_tokens, same_bits
from splitfuse import _core

pytestmark = pytest.mark.machine_independent  # each test names its instruction set

BUDGETS = [1, 3, 16, 64, 257, 512]


@dataclass(frozen=True)
class Request:
    prompt: tuple[int, ...]
    params: tuple[tuple[str, Any], ...]
    salt: str = ""

    def put(self, run: Run, id: int) -> None:
        run.put(id, self.prompt, cache_salt=self.salt, **dict(self.params))


def request(prompt: list[int], salt: str = "", **params: Any) -> Request:
    return Request(tuple(prompt), tuple(params.items()), salt)


SHARED = random_tokens(100, 700)
SAMPLED = {"temperature": 0.9, "top_p": 0.95, "top_k": 50, "repetition_penalty": 1.1}
# With prompt_logprobs every position's logits are seen, but the prefix cache is not used; without, the reverse.
# Lengths lie around the borders of blocks (16 to 64), of attention's tiles (256) and of its segments (512).
CATALOGUE = [
    request(random_tokens(1, 1), max_tokens=12),
    request(random_tokens(2, 16), max_tokens=20, prompt_logprobs=0),
    request(random_tokens(3, 63), max_tokens=9, seed=5, **SAMPLED),
    request(random_tokens(4, 130), max_tokens=5, prompt_logprobs=0),
    request(SHARED[:257], max_tokens=8),
    request(SHARED[:257], max_tokens=8, seed=1, **SAMPLED),
    request(SHARED[:192] + random_tokens(5, 40), max_tokens=8, seed=9, min_p=0.05, temperature=1.2),
    request(SHARED[:300], "salted", max_tokens=4),
    request(SHARED[:512], max_tokens=6, prompt_logprobs=0),
    request(SHARED, max_tokens=6, presence_penalty=0.5, frequency_penalty=0.3),
    request(SHARED[:80] + random_tokens(6, 3), max_tokens=30, min_tokens=30, seed=2, **SAMPLED),
]
# Long enough that one chunk's attention is given to several threads in parts.
LONG = request(random_tokens(7, 1500), max_tokens=4)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(max_position_embeddings=2048)


@functools.cache
def alone(path: Path, kernel: Kernel, request: Request) -> Run:
    run = Run(path, capture=True, **kernel._asdict(), token_budget=2048, prefix_caching=False)
    request.put(run, 0)
    run.finish_all()
    run.engine.close()
    return run


def assert_same(run: Run, id: int, truth: Run) -> None:
    assert run.tokens[id] == truth.tokens[0]
    assert run.finish[id] == truth.finish[0]
    assert run.logits[id].keys() == truth.logits[0].keys()
    for position, logits in truth.logits[0].items():
        assert same_bits(run.logits[id][position], logits), f"sequence {id}, position {position}"
    assert [(row.position, row.token, row.logprob) for row in run.prompt[id]] == [
        (row.position, row.token, row.logprob) for row in truth.prompt[0]
    ]


def assert_all_same(run: Run, requests: list[Request], path: Path, kernel: Kernel) -> None:
    for id, one in enumerate(requests):
        assert_same(run, id, alone(path, kernel, one))


def together(path: Path, requests: list[Request], **config: Any) -> Run:
    run = Run(path, capture=True, **config)
    for id, one in enumerate(requests):
        one.put(run, id)
    return run.finish_all()


@every_kernel
@pytest.mark.parametrize("budget", BUDGETS)
def test_token_budgets(model: Path, kernel: Kernel, budget: int) -> None:
    requests = CATALOGUE if budget > 1 else CATALOGUE[:7]
    run = together(model, requests, **kernel._asdict(), token_budget=budget, threads=1 + budget % 2)
    assert_all_same(run, requests, model, kernel)


@every_kernel
@pytest.mark.parametrize("threads", [1, 2, 3])
def test_threads(model: Path, kernel: Kernel, threads: int) -> None:
    requests = [LONG, *CATALOGUE[2:6]]
    run = together(model, requests, **kernel._asdict(), threads=threads, token_budget=300)
    assert_all_same(run, requests, model, kernel)


@every_kernel
@pytest.mark.parametrize("block_size", [16, 32, 48, 64])
def test_block_sizes_and_prefix_hits(model: Path, kernel: Kernel, block_size: int) -> None:
    run = Run(model, capture=True, **kernel._asdict(), threads=2, token_budget=100, block_size=block_size)
    for id, one in enumerate(CATALOGUE):
        one.put(run, id)
        if id % 3 == 0:  # others arrive while it runs, or find its blocks afterwards
            run.finish_all()
    run.finish_all()
    assert_all_same(run, CATALOGUE, model, kernel)
    assert run.cached >= 2 * 192 // block_size * block_size
    cached = run.cached
    for id, one in enumerate(CATALOGUE):
        run.engine.flush(id)
        run.tokens[id].clear()
        run.prompt[id].clear()
        one.put(run, id)
    run.finish_all()
    assert_all_same(run, CATALOGUE, model, kernel)
    assert run.cached > cached + 1000


@every_kernel
@pytest.mark.parametrize("caching", [True, False])
def test_preemption(model: Path, kernel: Kernel, caching: bool) -> None:
    requests = [*CATALOGUE, *CATALOGUE[1:4], *CATALOGUE[5:7]]
    blocks = -(-max(len(one.prompt) + dict(one.params)["max_tokens"] for one in requests) // 16)
    config = {**kernel._asdict(), "threads": 2, "token_budget": 128, "prefix_caching": caching}
    run = together(model, requests, blocks=blocks, **config)
    assert run.preempted > 0
    assert_all_same(run, requests, model, kernel)


def random_plan(run: Run, rng: random.Random) -> _core.StepPlan:
    """Some chunks, and some preemptions, but not so many that nobody ends. It need not be servable."""
    views, limits = run.engine.view()
    chunks, preempt, left = [], [], limits.max_tokens
    for view in rng.sample(views, len(views)):
        if view.blocks and run.preempted < 30 and rng.random() < 0.05:
            preempt.append(view.id)
        elif view.known > view.computed and rng.random() < 0.7 and left:
            tokens = min(left, rng.randint(1, view.known - view.computed))
            chunks.append((view.id, tokens))
            left -= tokens
    return _core.StepPlan(chunks, preempt)


@every_kernel
def test_random_plans_of_a_caller(model: Path, kernel: Kernel) -> None:
    rng = random.Random(1)
    run = Run(model, capture=True, **kernel._asdict(), threads=2, token_budget=90, blocks=200)
    for id, one in enumerate(CATALOGUE):
        one.put(run, id)
    served = 0
    while run.engine.has_work():
        try:
            served += bool(run.step(random_plan(run, rng)).chunks)
        except _core.InvalidArgument:
            run.step()
    assert served > 20
    assert run.preempted > 5
    assert_all_same(run, CATALOGUE, model, kernel)


@settings(max_examples=8, deadline=None, database=None, suppress_health_check=list(HealthCheck))
@given(data=st.data())
@every_kernel
def test_random_traces(model: Path, kernel: Kernel, data: st.DataObject) -> None:
    """Arrivals, cancellations, plans, pools and limits at random."""
    draw = data.draw
    rng = random.Random(draw(st.integers(0, 2**32), label="seed"))
    block_size = draw(st.sampled_from([16, 32, 64]))
    catalogue = [*CATALOGUE, LONG] if rng.random() < 0.1 else CATALOGUE
    longest = max(len(one.prompt) for one in catalogue) + 30
    run = Run(
        model,
        capture=True,
        **kernel._asdict(),
        threads=draw(st.integers(1, 3)),
        token_budget=draw(st.one_of(st.sampled_from(BUDGETS[1:]), st.integers(2, 300))),
        max_sequences=draw(st.integers(1, 16)),
        block_size=block_size,
        blocks=-(-longest // block_size) + draw(st.integers(0, 60)),
        prefix_caching=draw(st.booleans()),
    )
    waiting = {id: rng.choice(catalogue) for id in range(draw(st.integers(1, 12)))}
    truth = dict(waiting)
    own_plans = draw(st.sampled_from([0.0, 0.0, 0.3]))
    cancellations = draw(st.integers(0, 5))
    while waiting or run.engine.has_work():
        if waiting and (not run.engine.has_work() or rng.random() < 0.2):
            id, one = waiting.popitem()
            one.put(run, id)
        live = [id for id in truth if id not in waiting and id not in run.finish]
        if cancellations and live and rng.random() < 0.05:
            cancellations -= 1
            id = rng.choice(live)  # to be asked again from the start
            run.engine.flush(id)
            for said in (run.tokens, run.prompt, run.logits):
                said[id].clear()
            waiting[id] = truth[id]
            continue
        try:
            run.step(random_plan(run, rng) if rng.random() < own_plans else None)
        except _core.InvalidArgument:
            run.step()
    for id, one in truth.items():
        assert_same(run, id, alone(model, kernel, one))
        run.engine.flush(id)
    assert run.engine.query().used_blocks == 0


# ---- Sampling


@pytest.mark.parametrize("dtype", DTYPES)
def test_a_seed_gives_the_same_tokens_whatever_else_runs(model: Path, dtype: str) -> None:
    prompt = random_tokens(50, 40)
    params = {"max_tokens": 25, "temperature": 1.0, "seed": 1234}
    by_itself = Run(model, dtype=dtype).answer(0, prompt, **params)
    run = Run(model, dtype=dtype, threads=2, token_budget=50)
    for id in range(1, 33):
        run.put(id, random_tokens(id, 5 * id), **{**params, "seed": id})
        if id == 20:
            run.put(0, prompt, **params)
            run.step()
    run.finish_all()
    assert run.tokens[0] == by_itself


def test_seed_sample_index_and_position_key_the_stream(model: Path) -> None:
    prompt = random_tokens(51, 20)
    run = Run(model, threads=2)
    keys = [(seed, index) for seed in (0, 1, 2**64 - 1) for index in range(4)]
    for repeat in range(2):
        for id, (seed, index) in enumerate(keys):
            run.put(100 * repeat + id, prompt, temperature=1.5, seed=seed, sample_index=index, max_tokens=20)
    run.finish_all()
    answers = [tuple(run.tokens[id]) for id in range(len(keys))]
    assert answers == [tuple(run.tokens[100 + id]) for id in range(len(keys))]
    assert len(set(answers)) == len(keys)
    assert len({token for answer in answers for token in answer}) > 30  # positions draw anew


# ---- The real model's shapes


@pytest.mark.parametrize("dtype", DTYPES)
@pytest.mark.parametrize("isa", ISAS[1:] or ISAS)
def test_smollm2(smollm2: Path, isa: str, dtype: str) -> None:
    """Rows of the real model's widths take other paths through the kernels than the tiny one's."""
    shared = random_tokens(60, 130, 49152)
    requests = [
        request(shared[:100] + random_tokens(61, 40, 49152), max_tokens=6, prompt_logprobs=0),
        request(shared[:64] + random_tokens(62, 5, 49152), max_tokens=6, seed=3, temperature=1.0),
        request(shared[:64] + random_tokens(63, 9, 49152), max_tokens=6),
        request(random_tokens(64, 7, 49152), max_tokens=6),
    ]
    truth = [alone(smollm2, Kernel(isa, dtype), one) for one in requests]
    for budget, threads in ((16, 1), (64, 2), (257, 2)):
        run = together(smollm2, requests, isa=isa, dtype=dtype, threads=threads, token_budget=budget)
        for id, expected in enumerate(truth):
            assert_same(run, id, expected)
    assert np.ptp(truth[0].logits[0][5]) > 1  # these are logits of something
