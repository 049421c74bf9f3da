"""A step happens or it doesn't: faults at every operation, and logits that are not numbers."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from engines import ISAS, Run, random_tokens
from splitfuse import _core

pytestmark = pytest.mark.machine_independent  # the ISAs are named

PARAMS = {"max_tokens": 6, "ignore_eos": True}
SAMPLED = {**PARAMS, "temperature": 1.0, "seed": 4, "repetition_penalty": 1.2, "logprobs": 2}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama()


def begin(model: Path, **config: Any) -> Run:
    """Prompts of all kinds, so that a step mixes chunks, decodes, log-probabilities and prefix hits."""
    run = Run(model, **{"token_budget": 48, **config})
    shared = random_tokens(90, 40)
    run.put(0, shared, **PARAMS)
    run.put(1, random_tokens(1, 70), **SAMPLED)
    run.put(2, random_tokens(2, 9), prompt_logprobs=1, **SAMPLED)
    run.put(3, [*shared, 1, 2], **PARAMS)
    run.put(4, [7], **PARAMS)
    return run


def seen(run: Run) -> Any:
    """Progress and pool as a caller sees them. view() comes first: it may attach cached prefixes."""
    views, limits = run.engine.view()
    names = ("prompt", "known", "computed", "blocks", "preemptions", "finish")
    progress = [[getattr(run.engine.query(id), name) for name in names] for id in range(5)]
    capacity = run.engine.query()
    return [repr(view) for view in views], limits.free_blocks, progress, capacity.running, capacity.waiting


def said(run: Run) -> Any:
    return (
        {
            id: [(row.token, row.logprob, row.top, row.finish) for row in rows]
            for id, rows in run.sampled.items()
        },
        {id: [(row.position, row.logprob, row.top) for row in rows] for id, rows in run.prompt.items()},
    )


def operations_of_a_step(run: Run) -> int:
    """Steps once, and counts."""
    run.probe.fail_after = 10**6
    run.step()
    count = 10**6 - run.probe.fail_after
    run.probe.fail_after = -1
    return count


def fail(run: Run, operation: int) -> None:
    run.probe.fail_after = operation
    with pytest.raises(_core.Error, match="a fault that the test asked for"):
        run.engine.step()
    run.probe.fail_after = -1


@pytest.mark.parametrize("caching", [True, False])
def test_a_fault_at_every_operation_of_every_step(model: Path, caching: bool) -> None:
    calm = begin(model, prefix_caching=caching).finish_all()
    run = begin(model, prefix_caching=caching)
    scout = begin(model, prefix_caching=caching)  # one step ahead: it counts
    faults = 0
    while run.engine.has_work():
        before = seen(run)
        for operation in range(operations_of_a_step(scout)):
            fail(run, operation)
            assert seen(run) == before
            assert _core.testing.check(run.engine) == ""
            faults += 1
        run.step()
    assert faults > 200
    assert said(run) == said(calm)
    for id in range(5):
        run.engine.flush(id)
    assert run.engine.query().used_blocks == 0


@pytest.mark.parametrize("isa", ISAS)
def test_faults_under_pressure_cost_no_token(model: Path, isa: str) -> None:
    """A preemption of the failed step stays, since it only costs a recomputation."""
    calm = begin(model, isa=isa).finish_all()
    run = begin(model, isa=isa, blocks=7, threads=2)
    step = 0
    while run.engine.has_work():
        known = [run.engine.query(id).known for id in range(5)]
        fail(run, step * 7 % 20)
        assert [run.engine.query(id).known for id in range(5)] == known
        assert _core.testing.check(run.engine) == ""
        run.step()
        step += 1
    assert sum(run.engine.query(id).preemptions for id in range(5)) > 0
    assert said(run) == said(calm)


def test_a_fault_in_a_callers_plan(model: Path) -> None:
    calm = begin(model).finish_all()
    run = begin(model)
    before = seen(run)
    run.probe.fail_after = 5
    with pytest.raises(_core.Error, match="a fault"):
        run.engine.step(_core.StepPlan([(1, 40), (4, 1)]))
    run.probe.fail_after = -1
    assert seen(run) == before
    assert said(run.finish_all()) == said(calm)


def test_after_a_fault_a_sequence_can_be_flushed_and_others_put(model: Path) -> None:
    run = begin(model)
    run.step()
    fail(run, 9)
    for id in range(5):
        run.engine.flush(id)
    assert run.engine.query().used_blocks == 0
    prompt = random_tokens(1, 70)
    assert run.answer(8, prompt, **PARAMS) == Run(model).answer(8, prompt, **PARAMS)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("when", [0, 1, 4])
def test_logits_that_are_not_numbers_end_their_sequence_alone(model: Path, isa: str, when: int) -> None:
    def put_all() -> Run:
        run = Run(model, isa=isa, threads=2)
        for id, params in enumerate([PARAMS, SAMPLED, PARAMS]):
            run.put(id, random_tokens(id, 20), **params)
        return run

    calm = put_all().finish_all()
    run = put_all()
    for _ in range(when):
        run.step()
    run.probe.poison_logits = True  # of the first row, which is sequence 0
    run.finish_all()
    assert run.finish == {0: "error", 1: "length", 2: "length"}
    assert run.sampled[0][-1].token == -1
    assert run.tokens[0] == calm.tokens[0][:when]
    for id in (1, 2):
        assert run.tokens[id] == calm.tokens[id]
    assert run.engine.query(0).finish == "error"
    assert run.engine.query(0).blocks == 0
    assert run.engine.query().running == 0


def test_an_id_that_ended_in_an_error_may_go_on(model: Path) -> None:
    """As any finished one: with all its tokens, computed anew, though others compute and cache the same ones."""
    prompt, turn = random_tokens(1, 40), random_tokens(2, 30)
    run = Run(model, token_budget=128)
    run.put(0, prompt, **PARAMS)
    run.probe.poison_logits = True
    run.finish_all()
    assert run.finish == {0: "error"}
    expected = Run(model).answer(0, [*prompt, *turn], **PARAMS)
    run.put(1, [*prompt, *turn], **PARAMS)
    run.put(0, turn, **PARAMS)
    run.finish_all()
    assert run.tokens[0] == run.tokens[1] == expected
    views, _ = run.engine.view()
    assert [view.shared for view in views] == [4, 4]


def test_poison_in_a_prompts_log_probabilities_ends_that_sequence_alone(model: Path) -> None:
    """A log-probability that cannot be told is not told wrong."""
    prompt, other = random_tokens(3, 30), random_tokens(4, 12)
    calm = Run(model).answer(1, other, **PARAMS)
    run = Run(model)
    run.put(0, prompt, prompt_logprobs=0, **PARAMS)
    run.put(1, other, **PARAMS)
    run.probe.poison_logits = True
    run.finish_all()
    assert run.finish[0] == "error"
    assert [row.token for row in run.sampled[0]] == [-1]
    assert run.prompt[0] == []
    assert run.tokens[1] == calm
