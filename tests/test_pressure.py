"""A KV pool far too small: every request ends, with the tokens it has when there is room for all."""

from __future__ import annotations

import functools
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import ISAS, Kernel, Run, every_kernel, random_tokens
from splitfuse import _core

pytestmark = pytest.mark.machine_independent  # the ISAs are named

BLOCK = 16
REQUESTS = 64
SHARED = random_tokens(200, 64)


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def prompt_of(id: int) -> list[int]:
    """Twenty to ninety tokens; every fourth begins as others do."""
    own = random_tokens(id, 20 + 37 * id % 70)
    return SHARED[: 16 * (id % 5)] + own[:30] if id % 4 == 0 else own


def params_of(id: int) -> dict[str, Any]:
    params: dict[str, Any] = {"max_tokens": 20 + 11 * id % 30, "ignore_eos": True}
    if id % 2:
        params |= {"temperature": 1.0, "seed": id, "top_p": 0.9, "repetition_penalty": 1.1}
    return params


def blocks_of(prompt: list[int], params: dict[str, Any]) -> int:
    return -(-(len(prompt) + params["max_tokens"]) // BLOCK)


DEMAND = sum(blocks_of(prompt_of(id), params_of(id)) for id in range(REQUESTS))


def serve(model: Path, blocks: int, **config: Any) -> Run:
    run = Run(model, blocks=blocks, block_size=BLOCK, token_budget=64, threads=2, **config)
    for id in range(REQUESTS):
        run.put(id, prompt_of(id), **params_of(id))
    return run.finish_all()  # the invariants are checked after each step


@functools.cache
def calm_answers(model: Path, kernel: Kernel) -> dict[int, list[int]]:
    run = serve(model, DEMAND, **kernel._asdict())
    assert run.preempted == 0
    return run.tokens


@pytest.mark.parametrize("caching", [True, False])
@every_kernel
def test_a_tenth_of_the_demand(model: Path, kernel: Kernel, caching: bool) -> None:
    calm = calm_answers(model, kernel)
    run = serve(model, DEMAND // 10, **kernel._asdict(), prefix_caching=caching)
    assert run.engine.query().total_blocks == DEMAND // 10
    assert run.preempted > 10
    for id in range(REQUESTS):
        assert len(run.tokens[id]) == params_of(id)["max_tokens"]
        assert run.tokens[id] == calm[id]
        assert run.finish[id] == "length"
        run.engine.flush(id)
    capacity = run.engine.query()
    assert (capacity.used_blocks, capacity.running, capacity.waiting) == (0, 0, 0)
    assert capacity.free_blocks == capacity.total_blocks
    assert capacity.cached_blocks > 0 if caching else capacity.cached_blocks == 0
    assert _core.testing.check(run.engine) == ""


def test_flushing_as_they_finish(model: Path) -> None:
    """What a server does: finished sequences go at once, new ones come while others run."""
    run = Run(model, blocks=DEMAND // 10, block_size=BLOCK, token_budget=64, threads=2)
    waiting = list(range(REQUESTS))
    while waiting or run.engine.has_work():
        for _ in range(min(3, len(waiting))):
            id = waiting.pop(0)
            run.put(id, prompt_of(id), **params_of(id))
        for row in run.step().sampled:
            if row.finish:
                run.engine.flush(row.id)
    assert run.tokens == calm_answers(model, Kernel(ISAS[-1], "float32"))
    assert run.engine.query().used_blocks == 0


def test_prompt_logprobs_survive_preemption_once(model: Path) -> None:
    def serve_logprobs(blocks: int) -> Run:
        run = Run(model, blocks=blocks, block_size=BLOCK, token_budget=40)
        for id in range(6):
            run.put(id, random_tokens(id, 60), max_tokens=40, ignore_eos=True, prompt_logprobs=2, logprobs=2)
        return run.finish_all()

    calm, run = serve_logprobs(100), serve_logprobs(8)
    assert run.preempted > 0
    for id in range(6):
        assert [row.position for row in run.prompt[id]] == list(range(1, 60))
        assert [(row.token, row.logprob, row.top) for row in run.prompt[id]] == [
            (row.token, row.logprob, row.top) for row in calm.prompt[id]
        ]
        assert [(row.token, row.logprob, row.top) for row in run.sampled[id]] == [
            (row.token, row.logprob, row.top) for row in calm.sampled[id]
        ]


def test_one_request_may_fill_the_pool_to_the_last_place(model: Path) -> None:
    run = Run(model, blocks=4, block_size=BLOCK)
    with pytest.raises(_core.InvalidArgument, match="more than max_model_len 64"):
        run.put(0, random_tokens(0, 44), max_tokens=21, ignore_eos=True)
    for id in range(3):
        run.put(id, random_tokens(id, 44), max_tokens=20, ignore_eos=True)
    run.finish_all()
    for id in range(3):
        assert run.tokens[id] == Run(model, block_size=BLOCK).answer(
            0, random_tokens(id, 44), max_tokens=20, ignore_eos=True
        )


def test_finished_sequences_give_way(model: Path) -> None:
    """Nobody flushes them, and they hold the whole pool."""
    run = Run(model, blocks=8, block_size=BLOCK, prefix_caching=False)
    for id in range(2):
        run.answer(id, random_tokens(id, 50), max_tokens=14, ignore_eos=True)
    assert run.engine.query().free_blocks == 0
    long = run.answer(7, random_tokens(7, 100), max_tokens=20, ignore_eos=True)
    assert long == Run(model).answer(7, random_tokens(7, 100), max_tokens=20, ignore_eos=True)
    assert run.preempted == 2
    # Preempted after it had finished, and yet its next turn goes on from all it knew.
    turn = random_tokens(9, 10)
    history = random_tokens(0, 50) + run.tokens[0] + turn
    assert run.answer(0, turn, max_tokens=9, ignore_eos=True) == Run(model).answer(
        0, history, max_tokens=9, ignore_eos=True
    )


def test_prompt_logprobs_of_a_next_turn_are_of_that_turn(model: Path) -> None:
    """Whether or not the turns before it had to be computed again."""
    answers = []
    for blocks in (8, 100):
        run = Run(model, blocks=blocks, block_size=BLOCK, prefix_caching=False)
        run.answer(0, random_tokens(0, 50), max_tokens=14, ignore_eos=True)
        run.answer(1, random_tokens(1, 100), max_tokens=20, ignore_eos=True)
        assert (run.engine.query(0).preemptions > 0) == (blocks == 8)
        run.answer(0, random_tokens(2, 10), max_tokens=4, ignore_eos=True, prompt_logprobs=0)
        answers.append([(row.position, row.token, row.logprob) for row in run.prompt[0]])
    assert [position for position, _, _ in answers[0]] == list(range(64, 74))
    assert answers[0] == answers[1]


def test_lower_priority_numbers_are_served_first(model: Path) -> None:
    run = Run(model, blocks=12, block_size=BLOCK, token_budget=32)
    order = []
    for id, priority in enumerate([5, 5, 0, -3, 5, 1]):
        run.put(id, random_tokens(id, 100), max_tokens=4, ignore_eos=True, priority=priority)
    for out in run.steps_to_end():
        order += [row.id for row in out.sampled if row.finish]
    assert order == [3, 2, 5, 0, 1, 4]


def test_an_urgent_request_preempts_the_others(model: Path) -> None:
    run = Run(model, blocks=8, block_size=BLOCK, token_budget=64)
    for id in range(2):
        run.put(id, random_tokens(id, 60), max_tokens=60, ignore_eos=True)
    while sum(run.engine.query(id).computed >= 60 for id in range(2)) < 2:
        run.step()
    run.put(9, random_tokens(9, 100), max_tokens=10, ignore_eos=True, priority=-1)
    steps = 0
    while 9 not in run.finish:
        run.step()
        steps += 1
    assert steps <= 2 + 10
    assert not {0, 1} & run.finish.keys()
    run.finish_all()
    for id in range(2):
        assert run.tokens[id] == Run(model).answer(id, random_tokens(id, 60), max_tokens=60, ignore_eos=True)


def test_the_oldest_never_starves(model: Path) -> None:
    """New requests come in every step, more than can ever be served, and the pool is full."""
    run = Run(model, blocks=16, block_size=BLOCK, token_budget=32, max_sequences=8)
    oldest, next_id, finished, waited = 0, 0, [], 0
    for _ in range(400):
        for _ in range(2):
            run.put(
                next_id,
                random_tokens(next_id, 10 + 29 * next_id % 150),
                max_tokens=5 + 7 * next_id % 40,
                ignore_eos=True,
            )
            next_id += 1
        out = run.step()
        waited = 0 if oldest in dict(out.chunks) else waited + 1
        assert waited == 0, "the oldest did not advance, and decodes cannot fill this budget"
        finished += [row.id for row in out.sampled if row.finish]
        while oldest in run.finish:
            oldest += 1
            waited = 0
    assert run.preempted > 20
    assert oldest > 20
    assert finished[:3] != []
    for id in finished[:10]:
        assert len(run.tokens[id]) == 5 + 7 * id % 40


def test_cancellation_under_pressure_frees_at_once(model: Path) -> None:
    run = Run(model, blocks=8, block_size=BLOCK, token_budget=64, prefix_caching=False)
    for id in range(6):
        run.put(id, random_tokens(id, 60), max_tokens=60, ignore_eos=True)
    for _ in range(20):
        run.step()
    for id in range(5):
        before = run.engine.query().used_blocks
        held = run.engine.query(id).blocks
        run.engine.flush(id)
        assert run.engine.query().used_blocks == before - held
        assert _core.testing.check(run.engine) == ""
    run.finish_all()
    assert run.tokens[5] == Run(model).answer(5, random_tokens(5, 60), max_tokens=60, ignore_eos=True)


def test_a_victim_frees_no_block_that_another_has_just_attached(model: Path) -> None:
    """The last one's only missing token makes it a decode at once, so that it is spared; and it has come, in the same
    step, to share all blocks of the victim before it."""
    run = Run(model, blocks=8, block_size=BLOCK, token_budget=128)
    prompts = {
        0: random_tokens(1, 70),
        1: random_tokens(2, 60),
        2: SHARED[:32] + random_tokens(3, 60),
        3: [*SHARED[:32], 9],
    }
    for id, priority in ((0, -2), (2, 0)):
        run.put(id, prompts[id], max_tokens=8, ignore_eos=True, priority=priority)
    run.step(_core.StepPlan([(0, 70), (2, 32)]))
    assert run.engine.query().free_blocks == 1
    run.put(1, prompts[1], max_tokens=8, ignore_eos=True, priority=-1)
    run.put(3, prompts[3], max_tokens=8, ignore_eos=True)
    out = run.step()
    assert dict(out.chunks) == {0: 1, 3: 1}
    assert out.cached_tokens == 32
    run.finish_all()
    for id, prompt in prompts.items():
        assert run.tokens[id] == Run(model).answer(id, prompt, max_tokens=8, ignore_eos=True)


def test_finished_sequences_make_room_for_whole_chunks(model: Path) -> None:
    """The longest finished go first."""
    run = Run(model, blocks=32, token_budget=256)
    for id in range(30):
        run.put(id, random_tokens(id, 12), max_tokens=1, ignore_eos=True)
    run.finish_all()
    run.put(99, random_tokens(99, 400), max_tokens=1, ignore_eos=True)
    output = run.engine.step()
    assert output.chunks == [(99, 256)]
    assert output.preempted == list(range(len(output.preempted)))
    assert run.engine.step().chunks == [(99, 144)]
