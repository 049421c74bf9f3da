"""The verbs of the native engine as Python sees them: what they say and refuse, and that refusals harm nobody."""

from __future__ import annotations

import contextlib
import threading
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from engines import Run, engine_config, log_softmax, random_tokens, reference_logits
from splitfuse import _core, loader

VOCAB = 331  # of the tiny model; EOS is 257


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def state(run: Run) -> Any:
    """All that a caller can see of the sequences."""
    views, limits = run.engine.view()
    capacity = run.engine.query()
    progress = {id: run.engine.query(id) for id in run.known}
    names = ("prompt", "known", "computed", "blocks", "preemptions", "finish")
    return (
        [repr(view) for view in views],
        limits.free_blocks,
        {id: [getattr(one, name) for name in names] for id, one in progress.items()},
        (capacity.used_blocks, capacity.running, capacity.waiting, capacity.cached_blocks),
    )


class Watched(Run):
    """Knows the ids that were put."""

    def __init__(self, *args: Any, **config: Any) -> None:
        super().__init__(*args, **config)
        self.known: list[int] = []

    def put(self, id: int, prompt: Any, **params: Any) -> None:
        super().put(id, prompt, **params)
        if id not in self.known:
            self.known.append(id)


# ---- put

BAD_PROMPTS = [
    ([], "no tokens"),
    ([5, VOCAB], "token 1 of the prompt is 331, the vocabulary has ids 0 to 330"),
    ([-1], "token 0 of the prompt is -1"),
    (np.array([1, 2**40]), "token 1"),
    (np.array([1, -(2**40)]), "token 1"),
    (np.array([1.0, 2.0]), "not hold integers"),
    (np.array([[1, 2]]), "one-dimensional"),
    ([1] * 509, "509 tokens and max_tokens is 4: 513 together, more than max_model_len 512"),
]
NAN, INF = float("nan"), float("inf")
BAD_PARAMS = [
    *({"temperature": value} for value in (-0.1, NAN, INF, -INF)),
    *({"top_p": value} for value in (0.0, -0.5, 1.01, NAN, INF)),
    *({"min_p": value} for value in (-0.1, 1.1, NAN)),
    *({"repetition_penalty": value} for value in (0.0, -1.0, NAN, INF)),
    *({name: value} for name in ("presence_penalty", "frequency_penalty") for value in (-2.1, 2.1, NAN, INF)),
    {"top_k": -1},
    {"max_tokens": 0},
    {"max_tokens": -5},
    {"min_tokens": -1},
    {"min_tokens": 5},  # more than max_tokens
    {"logprobs": 21},
    {"logprobs": -2},
    {"prompt_logprobs": 21},
    {"stop_token_ids": [VOCAB]},
    {"stop_token_ids": [-1]},
    {"logit_bias": [(VOCAB, 1.0)]},
    {"logit_bias": [(-1, 1.0)]},
    {"logit_bias": [(1, NAN)]},
    {"logit_bias": [(1, INF)]},
]


def test_bad_prompts_and_parameters_are_refused_with_a_reason_and_harm_nobody(model: Path) -> None:
    run = Watched(model)
    run.put(0, random_tokens(0, 100), max_tokens=8, ignore_eos=True)
    run.step()
    before = state(run)
    for prompt, reason in BAD_PROMPTS:
        with pytest.raises(_core.InvalidArgument, match=reason):
            run.engine.put(1, prompt, _core.SamplingParams(max_tokens=4))
    for params in BAD_PARAMS:
        with pytest.raises(_core.InvalidArgument, match=next(iter(params))):
            run.engine.put(1, [1, 2, 3], _core.SamplingParams(**{"max_tokens": 4, **params}))
    with pytest.raises(_core.InvalidArgument, match="sequence 0 is still being served"):
        run.engine.put(0, [1, 2, 3])
    for prompt in ("text", [1, "2"], [1.5], None, 3, [2**40]):
        with pytest.raises((TypeError, RuntimeError, _core.InvalidArgument)):
            run.engine.put(1, prompt)
    with pytest.raises(_core.InvalidArgument, match="no sequence 1"):
        run.engine.query(1)
    assert state(run) == before
    run.finish_all()
    assert run.tokens[0] == Run(model).answer(0, random_tokens(0, 100), max_tokens=8, ignore_eos=True)


def test_any_integer_array_is_a_prompt(model: Path) -> None:
    prompt = random_tokens(1, 20)
    expected = Run(model).answer(0, prompt, max_tokens=4)
    run = Run(model)
    for id, kind in enumerate([np.int64, np.int32, np.uint16, np.uint64]):
        assert run.answer(id, np.array(prompt, kind), max_tokens=4) == expected
    assert run.answer(9, np.array(prompt * 2)[::1][:20], max_tokens=4) == expected
    assert run.answer(10, np.repeat(prompt, 2)[::2], max_tokens=4) == expected  # not contiguous


def test_an_unknown_field_is_an_error() -> None:
    with pytest.raises(TypeError, match="no field 'best_of'"):
        _core.SamplingParams(best_of=2)
    with pytest.raises(TypeError, match="no field 'page_size'"):
        _core.EngineConfig(page_size=16)


# ---- plans


def test_a_plan_that_cannot_be_served_changes_nothing(model: Path) -> None:
    run = Watched(model, blocks=8, token_budget=32, max_sequences=3)
    run.put(1, random_tokens(1, 40), max_tokens=4)
    run.put(2, random_tokens(2, 100), max_tokens=4)
    run.put(3, random_tokens(3, 5), max_tokens=1)
    run.put(4, random_tokens(4, 5), max_tokens=1)
    for chunks in ([(3, 5)], [(2, 32)], [(2, 32)], [(2, 30)]):
        run.step(_core.StepPlan(chunks))
    assert run.engine.query().free_blocks == 1
    before = state(run)
    for chunks, preempt, reason in [
        ([(9, 1)], [], "no sequence 9"),
        ([(1, 1)], [9], "no sequence 9"),
        ([(1, 0)], [], "a chunk of 0 tokens"),
        ([(1, -1)], [], "a chunk of -1 tokens"),
        ([(1, 41)], [], "which has 40 to do"),
        ([(3, 1)], [], "which has 0 to do"),
        ([(1, 1), (1, 1)], [], "sequence 1 is named twice"),
        ([(2, 1)], [2], "sequence 2 is named twice"),
        ([], [2, 2], "sequence 2 is named twice"),
        ([(2, 1)], [1], "sequence 1 to preempt holds no blocks"),
        ([(1, 31), (2, 2)], [], "33 tokens, the forward takes 32"),
        ([(1, 17)], [], "it needs 2 KV blocks, 1 would be free"),
        ([(1, 1), (2, 1), (4, 1), (3, 1)], [], "4 sequences, the forward takes 3"),
    ]:
        with pytest.raises(_core.InvalidArgument, match=reason):
            run.engine.step(_core.StepPlan(chunks, preempt))
        assert state(run) == before
    run.finish_all()
    assert {len(run.tokens[id]) for id in (1, 2)} == {4}


def test_a_callers_plan_is_obeyed(model: Path) -> None:
    run = Run(model)
    run.put(1, random_tokens(1, 40), max_tokens=2, ignore_eos=True)
    run.put(2, random_tokens(2, 40), max_tokens=2, ignore_eos=True)
    assert run.step(_core.StepPlan([(2, 7)])).chunks == [(2, 7)]
    out = run.step(_core.StepPlan([(1, 40)], [2]))
    assert (out.chunks, out.preempted, out.ids.tolist()) == ([(1, 40)], [2], [1])
    assert run.engine.query(2).computed == 0
    assert run.step(_core.StepPlan()).chunks == []
    views, limits = run.engine.view()
    assert run.step().chunks == _core.plan_splitfuse(views, limits).chunks


# ---- memory and configuration


def test_memory_that_does_not_fit_is_refused_with_the_numbers(model: Path) -> None:
    loaded = loader.load(model)
    config = engine_config(model)
    config.kv_bytes = 2**44
    with pytest.raises(
        _core.MemoryError, match=r"(?s)does not fit.*16777216\.0 MiB.*available.*KV pool smaller"
    ):
        _core.Engine(loaded.config, loaded.weights, config)
    with pytest.raises(MemoryError):  # the built-in name works too
        _core.plan_memory(loaded.config, config)
    config.kv_bytes = 100
    with pytest.raises(_core.MemoryError, match="holds no block: one block of 16 tokens takes"):
        _core.Engine(loaded.config, loaded.weights, config)
    config = engine_config(model, blocks=4, max_model_len=65)
    with pytest.raises(
        _core.MemoryError, match=r"max_model_len is 65 tokens, but the KV pool of .* holds 64"
    ):
        _core.Engine(loaded.config, loaded.weights, config)


def test_the_plan_adds_up(model: Path) -> None:
    run = Run(model, blocks=20)
    plan = run.engine.memory_plan
    assert plan.total == plan.weights + plan.kv_pool + plan.workspace + plan.host
    assert plan.blocks == run.engine.query().total_blocks == 20
    assert plan.kv_pool == 20 * 16 * plan.kv_bytes_per_token
    assert plan.max_model_len == 320
    for word in ("weights", "KV pool", "workspace", "total", "20 blocks"):
        assert word in str(plan)


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_the_plan_follows_the_format_of_the_cache(model: Path, dtype: str) -> None:
    loaded = loader.load(model)
    plans = {}
    for kv_dtype in ("auto", "int8"):
        config = _core.EngineConfig(dtype=dtype, kv_dtype=kv_dtype, block_size=16, kv_bytes=1 << 20)
        plans[kv_dtype] = _core.plan_memory(loaded.config, config)
    # 3 layers, 2 KV heads of 24 dimensions, values padded to 32; in int8 two scales.
    size = 4 if dtype == "float32" else 2
    assert plans["auto"].kv_bytes_per_token == 3 * 2 * (24 + 32) * size
    assert plans["int8"].kv_bytes_per_token == 3 * 2 * (24 + 32 + 2 * 4)
    for plan in plans.values():
        assert plan.blocks == (1 << 20) // (16 * plan.kv_bytes_per_token)
        assert plan.kv_pool == plan.blocks * 16 * plan.kv_bytes_per_token


def test_the_engine_says_that_its_cache_is_int8(model: Path) -> None:
    assert "int8 KV cache" in Run(model, kv_dtype="int8").engine.describe()
    assert "int8" not in Run(model).engine.describe()


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("threads", -1),
        ("token_budget", -1),
        ("max_step_tokens", -1),
        ("max_sequences", 0),
        ("block_size", 24),
        ("block_size", 0),
        ("kv_bytes", -1),
        ("max_model_len", 513),
        ("device", "tpu"),
        ("isa", "sse2"),
    ],
)
def test_a_wrong_engine_configuration_is_named(model: Path, field: str, value: Any) -> None:
    loaded = loader.load(model)
    config = engine_config(model)
    setattr(config, field, value)
    with pytest.raises(_core.ConfigError, match=field):
        _core.Engine(loaded.config, loaded.weights, config)


def test_float16_is_no_engine_format(model: Path) -> None:
    with pytest.raises(_core.ConfigError, match="float16"):
        Run(model, dtype="float16")
    with pytest.raises(_core.ConfigError, match="int8"):
        _core.EngineConfig(dtype="int8")


@pytest.mark.parametrize("name", ["int4", "bfloat16", "", "INT8"])
def test_an_unknown_format_of_the_cache_is_named(name: str) -> None:
    with pytest.raises(_core.ConfigError, match=f'kv_dtype is "{name}"; expected "auto" or "int8"'):
        _core.EngineConfig(kv_dtype=name)


# ---- state


def test_flush_of_an_unknown_id(model: Path) -> None:
    run = Run(model)
    run.answer(1, [1, 2, 3], max_tokens=2)
    for id in (2, -1, 2**62):
        with pytest.raises(_core.InvalidArgument, match=f"no sequence {id}"):
            run.engine.flush(id)
    run.engine.flush(1)
    with pytest.raises(_core.InvalidArgument, match="no sequence 1"):
        run.engine.flush(1)


def test_nothing_but_close_works_after_close(model: Path) -> None:
    engine = Run(model).engine
    engine.put(1, [1, 2, 3])
    engine.close()
    engine.close()
    calls: list[Callable[[], Any]] = [
        engine.step,
        engine.query,
        engine.view,
        engine.has_work,
        engine.describe,
        lambda: engine.put(2, [1]),
        lambda: engine.query(1),
        lambda: engine.flush(1),
        lambda: engine.step(_core.StepPlan()),
        lambda: engine.memory_plan,
        lambda: engine.model_config,
    ]
    for call in calls:
        with pytest.raises(_core.StateError, match="closed"):
            call()


def test_a_call_from_a_second_thread_is_refused(tiny_llama: Callable[..., Path]) -> None:
    """step() releases the GIL, so the other thread gets as far as the engine's own guard. engine_test.cc has the
    same for every verb, with a backend that waits."""
    run = Run(tiny_llama(max_position_embeddings=4096), isa="ref", token_budget=2048)
    run.put(0, random_tokens(3, 2048), max_tokens=1)

    def step() -> None:
        while run.engine.query(0).finish is None:
            with contextlib.suppress(_core.StateError):  # it was this thread that came second
                run.engine.step()

    stepping = threading.Thread(target=step)
    stepping.start()
    refusals = set()
    while stepping.is_alive() and not refusals:
        try:
            run.engine.query()
        except _core.StateError as error:
            refusals.add(str(error))
    stepping.join()
    assert refusals == {"the engine is in use by another thread: an Engine has one owner"}
    assert run.engine.query(0).finish == "length"


# ---- what a sequence says


def test_steps_report_their_tokens(model: Path) -> None:
    run = Run(model, token_budget=32)
    run.put(0, random_tokens(0, 40), max_tokens=3, ignore_eos=True)
    first = run.step()
    assert (first.prefill_tokens, first.decode_tokens, len(first.ids)) == (32, 0, 0)
    run.put(1, random_tokens(1, 4), max_tokens=3, ignore_eos=True)
    second = run.step()
    assert (second.chunks, second.prefill_tokens) == ([(0, 8), (1, 4)], 12)
    third = run.step()
    assert (third.decode_tokens, third.prefill_tokens) == (2, 0)
    assert third.ids.dtype == np.int64
    assert third.tokens.tolist() == [row.token for row in third.sampled]
    assert third.host_us > 0
    assert third.forward_us > 0
    fourth = run.step()
    assert fourth.finish.tolist() == [2, 2]
    assert [row.finish for row in fourth.sampled] == ["length", "length"]
    assert first.chunks == [(0, 32)]  # outputs are copies and stay valid
    assert run.step().chunks == []
    progress = run.engine.query(0)
    assert (progress.prompt, progress.known, progress.computed, progress.finish) == (40, 43, 42, "length")


def greedy_path(path: Path, prompt: list[int], count: int) -> list[int]:
    return Run(path).answer(0, prompt, max_tokens=count, ignore_eos=True)


def first_seen(tokens: list[int]) -> int:
    """An index, past the first few, of a token that does not occur before."""
    return next(i for i in range(3, len(tokens)) if tokens[i] not in tokens[:i])


def test_stop_tokens_end_a_sequence_and_are_reported(model: Path) -> None:
    prompt = random_tokens(11, 12)
    path = greedy_path(model, prompt, 40)
    at = first_seen(path)
    run = Run(model)
    assert run.answer(0, prompt, max_tokens=40, stop_token_ids=[path[at]]) == path[: at + 1]
    assert run.finish[0] == "stop"


def test_eos_ends_a_sequence_unless_it_is_ignored(model: Path) -> None:
    prompt = random_tokens(12, 12)
    bias = {"logit_bias": [(257, 1e4)]}
    run = Run(model)
    assert run.answer(0, prompt, max_tokens=5, **bias) == [257]
    assert run.finish[0] == "stop"
    assert run.answer(1, prompt, max_tokens=5, ignore_eos=True, **bias) == [257] * 5
    assert run.finish[1] == "length"


def test_min_tokens_holds_back_eos_and_stop_tokens(model: Path) -> None:
    prompt = random_tokens(13, 12)
    run = Run(model)
    bias = [(257, 1e4), (7, 5e3)]
    said = run.answer(
        0, prompt, max_tokens=9, min_tokens=4, logit_bias=bias, stop_token_ids=[7], temperature=1.0
    )
    assert len(said) == 5
    assert said[4] == 257
    assert not {7, 257} & set(said[:4])
    assert run.answer(1, prompt, max_tokens=9, min_tokens=9, logit_bias=bias, ignore_eos=True) == [257] * 9


def test_logprobs_are_those_of_the_model(model: Path) -> None:
    """Of its own distribution, whatever penalties and temperature made of the choice."""
    prompt = random_tokens(14, 50)
    run = Run(model, token_budget=16)
    params = {"temperature": 0.7, "seed": 3, "repetition_penalty": 1.3, "logit_bias": [(9, 2.0)]}
    run.put(0, prompt, max_tokens=12, ignore_eos=True, logprobs=5, prompt_logprobs=3, **params)
    run.finish_all()
    tokens = prompt + run.tokens[0]
    truth = log_softmax(reference_logits(model, tokens))
    assert [row.position for row in run.prompt[0]] == list(range(1, 50))
    rows = [(row.position, row, 3) for row in run.prompt[0]]
    rows += [(50 + i, row, 5) for i, row in enumerate(run.sampled[0])]
    for position, row, count in rows:
        expected = truth[position - 1]
        assert row.token == tokens[position]
        assert row.logprob == pytest.approx(expected[row.token], abs=2e-5)
        best = np.sort(expected)[::-1][:count]
        assert [value for _, value in row.top] == pytest.approx(best.tolist(), abs=2e-5)
        assert [expected[token] for token, _ in row.top] == pytest.approx(best.tolist(), abs=2e-5)


def test_logprobs_of_the_chosen_token_alone_and_none(model: Path) -> None:
    run = Run(model)
    run.put(0, [1, 2, 3], max_tokens=2, ignore_eos=True, logprobs=0, prompt_logprobs=0)
    run.put(1, [1, 2, 3], max_tokens=2, ignore_eos=True)
    run.finish_all()
    assert all(row.top == [] and row.logprob < 0 for row in run.sampled[0] + run.prompt[0])
    assert all(row.top == [] and row.logprob == 0 for row in run.sampled[1])
    assert run.prompt[1] == []


# ---- turns and cancellation


@pytest.mark.parametrize("caching", [True, False])
def test_turns_equal_one_run_on_the_concatenation(model: Path, caching: bool) -> None:
    run = Run(model, capture=True, prefix_caching=caching)
    history: list[int] = []
    for turn in range(4):
        said = random_tokens(turn, 3 + 17 * turn)
        answer = run.answer(0, said, max_tokens=6 + turn, ignore_eos=True)
        history += said
        fresh = Run(model, capture=True)
        assert fresh.answer(0, history, max_tokens=6 + turn, ignore_eos=True) == answer
        for position, logits in fresh.logits[0].items():
            assert np.array_equal(run.logits[0][position], logits)
        assert run.engine.query(0).prompt == len(history)
        history += answer


def test_a_turn_after_a_stop_token(model: Path) -> None:
    prompt = random_tokens(21, 10)
    run = Run(model)
    bias = {"logit_bias": [(257, 1e4)]}
    assert run.answer(0, prompt, max_tokens=5, **bias) == [257]
    turn = random_tokens(22, 10)
    expected = Run(model).answer(0, [*prompt, 257, *turn], max_tokens=6, ignore_eos=True)
    assert run.answer(0, turn, max_tokens=6, ignore_eos=True) == expected


def test_a_turn_that_would_be_too_long_leaves_the_sequence(model: Path) -> None:
    run = Watched(model)
    run.put(0, random_tokens(0, 400), max_tokens=5, ignore_eos=True)
    run.finish_all()
    before = state(run)
    with pytest.raises(_core.InvalidArgument, match="505 tokens and max_tokens is 8: 513 together"):
        run.engine.put(0, [1] * 100, _core.SamplingParams(max_tokens=8))
    assert state(run) == before


def test_penalties_reach_over_earlier_turns(model: Path) -> None:
    """All that was known when a turn began is its prompt."""
    first, turn = random_tokens(31, 20), random_tokens(32, 5)
    params = {"max_tokens": 12, "ignore_eos": True, "repetition_penalty": 1.8, "frequency_penalty": 1.0}
    run = Run(model)
    answer = run.answer(0, first, **params)
    expected = Run(model).answer(0, [*first, *answer, *turn], **params)
    assert run.answer(0, turn, **params) == expected


def test_cancellation_in_the_middle_of_a_prompt(model: Path) -> None:
    run = Run(model, token_budget=32, prefix_caching=False)
    run.put(0, random_tokens(0, 300), max_tokens=5)
    run.put(1, random_tokens(1, 50), max_tokens=5, ignore_eos=True)
    run.step()
    run.step()
    assert run.engine.query(0).computed == 64
    run.engine.flush(0)
    assert run.engine.query().used_blocks == 0
    run.finish_all()
    assert run.tokens == {1: Run(model).answer(1, random_tokens(1, 50), max_tokens=5, ignore_eos=True)}
    # The id is free, and what the cancelled one computed misleads nobody.
    assert run.answer(0, random_tokens(2, 30), max_tokens=3, ignore_eos=True) == Run(model).answer(
        0, random_tokens(2, 30), max_tokens=3, ignore_eos=True
    )


def test_prefixes_are_shared_within_a_salt_alone(model: Path) -> None:
    prompt = random_tokens(41, 100)
    run = Run(model)
    run.put(0, prompt, max_tokens=2, cache_salt="one")
    run.finish_all()
    for id, salt, hits in ((1, "one", 96), (2, "two", 0), (3, "", 0), (4, "two", 96)):
        before = run.cached
        run.put(id, prompt, max_tokens=2, cache_salt=salt)
        run.finish_all()
        assert run.cached - before == hits
        assert run.tokens[id] == run.tokens[0]
    capacity = run.engine.query()
    assert (capacity.prefix_queries, capacity.prefix_hits) == (500, 192)


def test_a_running_sequence_shares_its_blocks(model: Path) -> None:
    prompt = random_tokens(42, 96)
    run = Run(model, token_budget=128)
    run.put(0, prompt, max_tokens=50, ignore_eos=True)
    run.step()
    used = run.engine.query().used_blocks
    run.put(1, [*prompt, 5], max_tokens=50, ignore_eos=True)
    assert run.step().cached_tokens == 96
    assert run.engine.query().used_blocks == used + 2  # a block of its own for each
    views, _ = run.engine.view()
    assert [view.shared for view in views] == [6, 6]


def test_the_engine_says_what_it_runs_on(model: Path) -> None:
    run = Run(model, isa="ref", dtype="bfloat16", threads=2)
    text = run.engine.describe()
    for word in ("ref", "2 threads", "bfloat16", "64"):
        assert word in text
    assert "\n" not in text
    assert run.engine.model_config == loader.load(model).config


# ---- Many hands on one engine


def test_looking_disturbs_nobody(model: Path) -> None:
    """A look from another thread may be refused while the engine works, but never has the owner refused."""
    run = Run(model)
    stop = threading.Event()
    looks = [0, 0]

    def look(which: int) -> None:
        while not stop.is_set():
            with contextlib.suppress(_core.StateError):
                run.engine.has_work()
            assert run.engine.memory_plan.total > 0
            run.engine.describe()
            looks[which] += 1

    threads = [threading.Thread(target=look, args=(which,)) for which in range(2)]
    for thread in threads:
        thread.start()
    try:
        for id in range(200):
            run.put(id, random_tokens(id, 5), max_tokens=2, ignore_eos=True)
            run.finish_all()
            run.engine.flush(id)
    finally:
        stop.set()
        for thread in threads:
            thread.join()
    assert min(looks) > 0
    assert run.engine.query().used_blocks == 0


def test_closing_under_somebodys_eyes(model: Path) -> None:
    for seed in range(20):
        run = Run(model)
        refused = threading.Event()

        def look(run: Run = run, refused: threading.Event = refused) -> None:
            while not refused.is_set():
                try:
                    run.engine.has_work()
                except _core.StateError as error:
                    if "closed" in str(error):
                        refused.set()

        threads = [threading.Thread(target=look) for _ in range(2)]
        for thread in threads:
            thread.start()
        run.put(0, random_tokens(seed, 5))
        run.engine.close()
        for thread in threads:
            thread.join()
        assert refused.is_set()


# ---- Small print


def test_a_next_turn_keeps_its_salt(model: Path) -> None:
    run = Run(model)
    run.put(0, random_tokens(1, 20), max_tokens=2, ignore_eos=True, cache_salt="a")
    run.finish_all()
    with pytest.raises(_core.InvalidArgument, match="cache_salt"):
        run.put(0, [1, 2], max_tokens=2, cache_salt="b")
    run.put(0, [1, 2], max_tokens=2, ignore_eos=True, cache_salt="a")
    run.finish_all()
    run.put(0, [3], max_tokens=2, ignore_eos=True)
    run.finish_all()


def test_cached_tokens_are_reported_after_a_view(model: Path) -> None:
    run = Run(model)
    prompt = random_tokens(2, 50)
    run.put(0, prompt, max_tokens=1)
    run.finish_all()
    run.put(1, prompt, max_tokens=1)
    run.engine.view()
    assert run.engine.step().cached_tokens == 48


def test_a_view_lists_all_that_a_forward_has_sequences_for(model: Path) -> None:
    run = Run(model, token_budget=16, max_sequences=5)
    for id in range(7):
        run.put(id, random_tokens(id, 40), max_tokens=1)
    assert [view.id for view in run.engine.view()[0]] == [0, 1, 2, 3, 4]


def test_cached_blocks_that_were_never_used_are_given_back_at_no_cost(model: Path) -> None:
    prompt = random_tokens(2, 50)
    run = Run(model)
    run.put(0, prompt, max_tokens=1)
    run.finish_all()
    run.put(1, prompt, max_tokens=1)
    assert run.engine.view()[0][0].blocks == 3
    out = run.step(_core.StepPlan([], [1]))
    assert (out.preempted, out.cached_tokens, run.engine.query(1).blocks) == ([], 0, 0)
    out = run.step()
    assert (out.chunks, out.cached_tokens, run.engine.query(1).preemptions) == ([(1, 2)], 48, 0)


def test_a_prompt_that_waits_is_looked_up_once(model: Path) -> None:
    run = Run(model, max_sequences=1)
    run.put(0, random_tokens(1, 20), max_tokens=10, ignore_eos=True)
    run.put(1, random_tokens(2, 30), max_tokens=1)
    run.finish_all()
    assert run.engine.query().prefix_queries == 50


def test_a_measured_budget_holds_every_sequence(model: Path) -> None:
    engine = Run(model, token_budget=0, max_sequences=200, max_model_len=90).engine
    capacity = engine.query()
    assert capacity.max_sequences == 200
    assert 200 <= capacity.token_budget <= 512
    tokens, rates = zip(*engine.budget_curve(), strict=True)
    assert list(tokens) == sorted(set(tokens))
    assert min(rates) > 0
    assert Run(model, token_budget=200).engine.budget_curve() == []


def test_a_plan_may_exceed_the_budget_as_far_as_memory_was_taken(model: Path) -> None:
    prompt = random_tokens(1, 100)
    whole = Run(model, token_budget=16, max_step_tokens=1 << 20, blocks=10)
    capacity, plan = whole.engine.query(), whole.engine.memory_plan
    assert capacity.token_budget == 16
    assert capacity.max_step_tokens == plan.max_step_tokens == capacity.max_model_len == 160
    assert "forwards of up to 160 tokens" in str(plan)
    split = Run(model, token_budget=16, blocks=10)
    assert split.engine.query().max_step_tokens == 16
    assert split.engine.memory_plan.workspace < plan.workspace
    for run in (whole, split):
        run.put(0, prompt, max_tokens=5, ignore_eos=True)
    assert whole.step(_core.StepPlan([(0, 100)])).prefill_tokens == 100
    with pytest.raises(_core.InvalidArgument, match="100 tokens, the forward takes 16"):
        split.step(_core.StepPlan([(0, 100)]))
    assert whole.finish_all().tokens == split.finish_all().tokens


@pytest.mark.parametrize("tokens", [[2**40], [-(2**40)], np.array([2**40]), "abc", [1.5], [None], 5, None])
def test_what_is_no_prompt_is_said_so(model: Path, tokens: Any) -> None:
    with pytest.raises(_core.InvalidArgument, match="prompt"):
        Run(model).engine.put(0, tokens)


def test_big_endian_weights_are_refused(model: Path) -> None:
    loaded = loader.load(model)
    source = _core.callback_source(
        loaded.weights.names(), lambda name: loaded.weights.read(name).astype(">f4")
    )
    with pytest.raises(_core.CheckpointError, match="big-endian"):
        _core.Engine(loaded.config, source, engine_config(model))
