"""KV blocks that every attention window has passed are given back, and no answer changes by it."""

from __future__ import annotations

from pathlib import Path

import pytest

from engines import Run, random_tokens, same_bits
from tiny_models import Tiny, save

pytestmark = pytest.mark.machine_independent
WINDOW, BLOCK = 40, 16
ENOUGH = -(-WINDOW // BLOCK) + 2  # blocks that a sequence of any length can do with


@pytest.fixture(scope="module")
def windowed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save(Tiny("mistral", {"sliding_window": WINDOW}), tmp_path_factory.mktemp("windowed"))


@pytest.fixture(scope="module")
def mixed(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One of its layers sees everything."""
    fields = {"use_sliding_window": True, "sliding_window": WINDOW, "max_window_layers": 1}
    return save(Tiny("qwen2", fields), tmp_path_factory.mktemp("mixed"))


def alone(path: Path, prompt: list[int], tokens: int) -> Run:
    run = Run(path, capture=True, token_budget=512, prefix_caching=False)
    run.put(0, prompt, max_tokens=tokens, ignore_eos=True)
    return run.finish_all()


def assert_same(run: Run, id: int, truth: Run) -> None:
    assert run.tokens[id] == truth.tokens[0]
    for position, logits in run.logits[id].items():
        assert same_bits(logits, truth.logits[0][position])


@pytest.mark.parametrize("caching", [True, False])
def test_a_sequence_longer_than_the_pool_runs_to_its_end(windowed: Path, caching: bool) -> None:
    prompt = random_tokens(1, 300)
    run = Run(windowed, capture=True, token_budget=13, blocks=ENOUGH, prefix_caching=caching)
    assert run.engine.memory_plan.max_model_len == 512
    run.put(0, prompt, max_tokens=100, ignore_eos=True)
    most = 0
    for _ in run.steps_to_end():
        most = max(most, run.engine.query().used_blocks)
    assert most <= ENOUGH < 400 // BLOCK
    assert run.preempted == 0
    assert_same(run, 0, alone(windowed, prompt, 100))


def test_what_it_holds_does_not_grow(windowed: Path) -> None:
    run = Run(windowed, token_budget=64)
    run.put(0, random_tokens(2, 100), max_tokens=300, ignore_eos=True)
    held = [run.engine.query().used_blocks for out in run.steps_to_end() if not out.prefill_tokens]
    assert max(held[:-1]) <= ENOUGH - 1
    run.engine.flush(0)
    assert run.engine.query().used_blocks == 0


def test_where_a_layer_sees_everything_all_blocks_stay(mixed: Path) -> None:
    run = Run(mixed, token_budget=64)
    run.put(0, random_tokens(3, 100), max_tokens=100, ignore_eos=True)
    run.finish_all()
    assert run.engine.query().used_blocks == -(-199 // BLOCK)


def test_a_prefix_is_found_by_what_its_window_sees(windowed: Path) -> None:
    """The beginning is evicted by others; the end is still there, and is all that is needed."""
    prompt = random_tokens(4, 200)
    run = Run(windowed, capture=True, token_budget=64, blocks=14)
    run.put(0, prompt, max_tokens=2)
    run.finish_all()
    run.engine.flush(0)
    run.put(1, random_tokens(5, 60), max_tokens=2)
    run.finish_all()
    run.engine.flush(1)
    before = run.cached
    run.put(2, [*prompt, *random_tokens(6, 20)], max_tokens=8, ignore_eos=True)
    run.finish_all()
    assert run.cached - before == 192
    assert_same(run, 2, alone(windowed, [*prompt, *random_tokens(6, 20)], 8))


def test_many_share_preempt_and_come_back(windowed: Path) -> None:
    shared = random_tokens(7, 120)
    prompts = [[*shared, *random_tokens(10 + i, 30 + 7 * i)] for i in range(6)]
    run = Run(windowed, capture=True, threads=2, token_budget=31, blocks=2 * ENOUGH)
    for id, prompt in enumerate(prompts):
        run.put(id, prompt, max_tokens=60, ignore_eos=True, seed=id, temperature=0.8)
    run.finish_all()
    assert run.preempted > 0
    for id, prompt in enumerate(prompts):
        truth = Run(windowed, capture=True, token_budget=512, prefix_caching=False)
        truth.put(0, prompt, max_tokens=60, ignore_eos=True, seed=id, temperature=0.8)
        assert_same(run, id, truth.finish_all())
        run.engine.flush(id)
    assert run.engine.query().used_blocks == 0


def test_what_a_preemption_frees_is_told_where_the_first_blocks_are_given_back(windowed: Path) -> None:
    """The sequence ahead gave its first blocks back, so the one behind shares blocks in the middle of its table."""
    common = random_tokens(20, 48)
    prompts = [[*common, *random_tokens(21, 152)], [*common, *random_tokens(22, 12)]]
    run = Run(windowed, capture=True, token_budget=512, blocks=ENOUGH)
    for id, prompt in enumerate(prompts):
        run.put(id, prompt, max_tokens=4, ignore_eos=True)
    shared = []
    for _ in run.steps_to_end():
        shared += [view.shared for view in run.engine.view()[0] if view.behind == 0]
    assert max(shared) > 0
    for id, prompt in enumerate(prompts):
        assert_same(run, id, alone(windowed, prompt, 4))


def test_a_next_turn_goes_on_where_the_window_stands(windowed: Path) -> None:
    first, second = random_tokens(8, 150), random_tokens(9, 40)
    run = Run(windowed, capture=True, token_budget=64, prefix_caching=False)
    run.put(0, first, max_tokens=20, ignore_eos=True)
    run.finish_all()
    whole = [*first, *run.tokens[0], *second]
    run.put(0, second, max_tokens=20, ignore_eos=True)
    run.finish_all()
    truth = alone(windowed, whole, 20)
    assert run.tokens[0][20:] == truth.tokens[0]
