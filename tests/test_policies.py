"""Policies: what each is known for, that no plan of theirs is ever refused, and that everything ends, with the same
tokens, however short the KV blocks are."""

import random
from pathlib import Path

import pytest
from hypothesis import example, given, settings
from hypothesis import strategies as st

from engines import engine_config
from fake_engine import FakeEngine, answer
from splitfuse import ConfigError, Engine, SamplingParams, Scheduler
from splitfuse._core import Limits, SeqView
from splitfuse.loader import load
from splitfuse.policies import POLICIES, make_scheduler, step_tokens
from splitfuse.policies.mlfq import _level, _quantum

pytestmark = pytest.mark.machine_independent

OTHERS = [name for name in POLICIES if name != "splitfuse"]
WHOLE = ["prefill_first", "orca", "static_batch"]


def policy(name, *, token_budget=32, max_step_tokens=256, **engine):
    return make_scheduler(
        name, FakeEngine(token_budget=token_budget, max_step_tokens=max_step_tokens, **engine)
    )


def limits(tokens=32, seqs=8, free=1000, total=1000, block_size=16):
    return Limits(
        max_tokens=tokens, max_seqs=seqs, free_blocks=free, total_blocks=total, block_size=block_size
    )


def decode(id, context=20, **fields):
    return SeqView(id, context + 1, context, -(-context // 16), **fields)


def prompt(id, tokens, **fields):
    return SeqView(id, tokens, 0, **fields)


def test_names():
    assert type(policy("splitfuse")) is Scheduler
    with pytest.raises(ConfigError, match=r"no policy 'fifo'; there are: splitfuse, prefill_first"):
        make_scheduler("fifo", FakeEngine())
    assert step_tokens("splitfuse", "even", "mlfq") == 0
    for name in WHOLE:
        assert step_tokens("splitfuse", name) > 1 << 17
        with pytest.raises(ConfigError, match="forwards of up to 256 tokens, and this engine takes 255"):
            policy(name, max_step_tokens=255)


# ---------------------------------------------------------------- what each is known for


def test_prefill_first_lets_decodes_wait():
    plan = policy("prefill_first").plan([decode(1), prompt(2, 100), decode(3), prompt(4, 60)], limits())
    assert plan.chunks == [(2, 100), (4, 60)]
    plan = policy("prefill_first").plan([decode(1), decode(3)], limits())
    assert plan.chunks == [(1, 1), (3, 1)]


def test_prefill_first_keeps_to_its_limit_but_for_one_prompt():
    scheduler = policy("prefill_first", max_step_tokens=10_000)
    plan = scheduler.plan([prompt(1, 3000), prompt(2, 1096), prompt(3, 1)], limits())
    assert plan.chunks == [(1, 3000), (2, 1096)]
    assert scheduler.plan([prompt(1, 5000), prompt(2, 5)], limits()).chunks == [(1, 5000)]


def test_orca_runs_whole_prompts_beside_decodes():
    plan = policy("orca").plan([decode(1), prompt(2, 100), decode(3), prompt(4, 60)], limits())
    assert plan.chunks == [(1, 1), (3, 1), (2, 100), (4, 60)]


def test_a_whole_prompt_that_does_not_fit_keeps_its_place():
    for name in ("prefill_first", "orca"):
        plan = policy(name).plan([decode(1), prompt(2, 100), prompt(3, 10)], limits(free=4))
        assert plan.chunks == [(1, 1)], name


def test_static_chunk_runs_one_chunk_of_one_prompt_beyond_the_decodes():
    plan = policy("static_chunk").plan([decode(1), prompt(2, 20), decode(3), prompt(4, 60)], limits())
    assert plan.chunks == [(1, 1), (3, 1), (2, 20)]
    assert policy("static_chunk").plan([decode(1), prompt(4, 60)], limits()).chunks == [(1, 1), (4, 32)]


def test_even_levels_what_exact_filling_does_not():
    views = [decode(1), prompt(2, 40), prompt(3, 27)]  # 67 in forwards of 31: 31, 31, 5
    chunks = policy("even").plan(views, limits()).chunks
    assert chunks == [(1, 1), (2, 23)]
    assert policy("even").plan([decode(1), prompt(2, 31)], limits()).chunks == [(1, 1), (2, 31)]


def forwards(name, prompts):
    """Tokens of each forward until all prompts are computed, and how often the last token of a prompt was
    left alone, which no policy can tell from a decode."""
    engine = FakeEngine(token_budget=32, max_sequences=16)
    scheduler = make_scheduler(name, engine)
    for first, tokens in enumerate(prompts, 1):
        scheduler.submit([first] * tokens, SamplingParams(max_tokens=1))
    made, alone = [], 0
    while scheduler.has_work:
        output = scheduler.step()
        made.append(output.prefill_tokens + output.decode_tokens)
        alone += output.decode_tokens
    return made, alone


@settings(deadline=None)
@given(st.lists(st.integers(1, 90), min_size=1, max_size=16))
@example([1, 1, 31, 1, 3, 90])  # one token of the third is left alone, and taken for a decode that goes on
def test_even_takes_as_many_forwards_as_exact_filling_and_equal_ones(prompts):
    (exact, _), (even, alone) = forwards("splitfuse", prompts), forwards("even", prompts)
    assert sum(even) == sum(exact) == sum(prompts)
    assert len(exact) <= len(even) <= len(exact) + alone
    if not alone:
        assert max(even) - min(even) <= max(2, max(exact) - min(exact))


def test_static_batch_admits_nobody_until_the_last_has_ended():
    engine = FakeEngine(max_sequences=3, token_budget=32, max_step_tokens=256)
    scheduler = make_scheduler("static_batch", engine)
    lengths = {3: 9, 5: 2, 7: 5, 11: 1, 13: 1}
    requests = [scheduler.submit([n] * n, SamplingParams(max_tokens=m, seed=0)) for n, m in lengths.items()]
    alive = []
    while scheduler.has_work:
        output = scheduler.step()
        alive.append(len(output.chunks))
    assert alive == [3, 3, 2, 2, 2, 1, 1, 1, 1, 2]
    assert [len(r.output.token_ids) for r in requests] == list(lengths.values())


def test_mlfq_joins_by_prompt_length():
    views = [prompt(1, 500), prompt(2, 60), decode(3), prompt(4, 100)]
    chunks = policy("mlfq").plan(views, limits(tokens=300)).chunks
    assert chunks == [(2, 60), (3, 1), (4, 100), (1, 139)]


def test_mlfq_lets_a_short_question_overtake_a_document_on_the_engine(tiny_llama):
    done = []
    for name in ("mlfq", "splitfuse"):
        loaded = load(tiny_llama())
        engine = Engine(loaded.config, loaded.weights, engine_config(tiny_llama(), token_budget=16))
        scheduler = make_scheduler(name, engine)
        for what, tokens in (("document", 400), ("question", 8)):
            params = SamplingParams(max_tokens=2, temperature=0.0, ignore_eos=True)
            scheduler.submit([1] * tokens, params, request_id=what, on_done=lambda r: done.append(r.id))
            scheduler.step()
        scheduler.run_until_idle()
    assert done == ["question", "document", "document", "question"]


def test_mlfq_demotes_what_has_used_its_quantum_up():
    scheduler, chunk = policy("mlfq"), []
    for step in range(70):
        plan = scheduler.plan([decode(1, 20 + step), prompt(100 + step, 64)], limits(tokens=64))
        chunk.append(plan.chunks[0][0])
    # With 64 tokens it has used up the first level; from then on each new prompt goes before it.
    assert chunk[:65] == [1] * 65 or chunk[:64] == [1] * 64
    assert chunk[66:] == [166, 167, 168, 169]


def test_mlfq_raises_the_starved():
    scheduler, served = policy("mlfq"), []
    long = prompt(1, 5000)
    for step in range(400):
        plan = scheduler.plan([long, prompt(10 + step, 60)], limits(tokens=60))
        served.append(plan.chunks[0][0])
    first = served.index(1)
    assert 250 < first < 300
    assert served[first : first + 80] == [1] * 80  # until what it had to compute is done


@given(st.integers(1, 10**6))
def test_mlfq_levels_cover_their_prompts(tokens):
    level = _level(tokens)
    assert _quantum(level) >= tokens
    assert level == 0 or _quantum(level - 1) < tokens


def test_the_guide_shows_one_that_works():
    guide = (Path(__file__).parent.parent / "docs" / "policies.md").read_text()
    made = {}
    exec(guide.split("```python\n")[1].split("```")[0], made)
    engine = FakeEngine(token_budget=16)
    scheduler = made["ShortestFirst"](engine)
    prompts = [[i + 1] * (5 + 7 * i % 40) for i in range(20)]
    requests = [scheduler.submit(ids, SamplingParams(max_tokens=9, seed=0)) for ids in prompts]
    scheduler.run_until_idle()
    assert [r.result(0).token_ids for r in requests] == [answer(ids, 9) for ids in prompts]
    assert engine.planned


# ---------------------------------------------------------------- any plan can be served


@st.composite
def situations(draw):
    """Views that an engine could show: blocks match what is computed, and add up."""
    block, total = 16, draw(st.integers(8, 64))
    views, free = [], total
    for id in range(draw(st.integers(1, 12))):
        known = draw(st.integers(1, total * block))
        computed = draw(st.integers(0, known - 1) | st.just(known - 1) | st.just(known))
        blocks = -(-computed // block)
        if blocks > free:
            computed = blocks = 0
        free -= blocks
        views.append(SeqView(id, known, computed, blocks, 0, draw(st.integers(0, 1))))
    views.append(SeqView(99, 5, 0))  # somebody has something to do
    views.sort(key=lambda view: (view.known == view.computed, view.priority, view.id))  # idle ones come last
    return views, limits(draw(st.integers(1, 300)), draw(st.integers(1, 8)), free, total, block)


@pytest.mark.parametrize("name", OTHERS)
@settings(max_examples=200, deadline=None)
@given(situations())
def test_no_plan_is_refused_and_something_always_happens(name, situation):
    views, bounds = situation
    scheduler = policy(name, token_budget=bounds.max_tokens, max_step_tokens=max(1024, bounds.max_tokens))
    plan = scheduler.plan(views, bounds)
    by_id = {view.id: view for view in views}
    named = [id for id, _ in plan.chunks] + list(plan.preempt)
    assert len(set(named)) == len(named)
    assert 1 <= len(plan.chunks) <= bounds.max_seqs
    assert sum(tokens for _, tokens in plan.chunks) <= max(1024, bounds.max_tokens)
    free = bounds.free_blocks
    for id in plan.preempt:
        assert by_id[id].blocks > 0
        free += by_id[id].blocks
    for id, tokens in plan.chunks:
        view = by_id[id]
        assert 1 <= tokens <= view.known - view.computed
        free -= -(-(view.computed + tokens) // bounds.block_size) - view.blocks
    assert free >= 0


# ---------------------------------------------------------------- whole runs


@pytest.mark.parametrize("name", POLICIES)
def test_every_request_ends_with_its_answer(name):
    engine = FakeEngine(token_budget=24, max_sequences=5, max_step_tokens=256)
    scheduler = make_scheduler(name, engine)
    rng = random.Random(name)
    asked = []
    for _ in range(60):
        asked.append(([rng.randrange(1, 100) for _ in range(rng.randint(1, 120))], rng.randint(1, 40)))
    requests = []
    for ids, count in asked:
        params = SamplingParams(max_tokens=count, seed=0)
        requests.append(scheduler.submit(ids, params, priority=rng.randint(0, 2)))
        for _ in range(rng.randint(0, 6)):
            scheduler.step()
    scheduler.run_until_idle()
    for (ids, count), request in zip(asked, requests, strict=True):
        assert request.result(0).token_ids == answer(ids, count)
    assert not engine.sequences


@pytest.fixture(scope="module")
def expected(tiny_llama):
    """Forty requests and their answers, by the default policy with blocks to spare."""
    path, rng = tiny_llama(), random.Random(7)
    shared = [rng.randrange(250) for _ in range(64)]
    asked = []
    for i in range(40):
        ids = [rng.randrange(250) for _ in range(rng.randint(1, 100))]
        asked.append((shared * (i % 2) + ids, rng.randint(1, 60)))
    return path, asked, _run(path, "splitfuse", asked, 600)[0]


def _run(path, name, asked, blocks):
    loaded = load(path)
    config = engine_config(
        path, blocks=blocks, token_budget=48, max_step_tokens=step_tokens(name), max_sequences=16
    )
    engine = Engine(loaded.config, loaded.weights, config)
    scheduler = make_scheduler(name, engine)
    requests = [
        scheduler.submit(ids, SamplingParams(max_tokens=n, seed=i, ignore_eos=True))
        for i, (ids, n) in enumerate(asked)
    ]
    steps = 0
    while scheduler.has_work:
        scheduler.step()
        steps += 1
        assert steps < 20_000, "no end in sight"
    tokens = [request.result(0).token_ids for request in requests]
    assert engine.query().used_blocks == 0
    return tokens, sum(request.preemptions for request in requests)


@pytest.mark.parametrize("name", POLICIES)
def test_the_answers_are_the_same_however_short_the_blocks_are(expected, name):
    path, asked, tokens = expected
    got, preempted = _run(path, name, asked, 16)
    assert got == tokens
    assert preempted > 0 or name == "static_batch"  # which takes only what it can hold to the end
