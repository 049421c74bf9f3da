"""What a scheduler tells of its work: hooks after steps and failures, and each request's times and counts."""

import threading
import time

import pytest

from engines import engine_config, random_tokens
from fake_engine import FakeEngine, answer
from splitfuse import Engine, QueueFull, SamplingParams, Scheduler, StateError
from splitfuse.loader import load

pytestmark = pytest.mark.machine_independent


def greedy(count=8, **kwargs):
    return SamplingParams(max_tokens=count, seed=0, **kwargs)


# ---------------------------------------------------------------- hooks


def test_on_step_tells_what_the_engine_did_after_the_callbacks():
    told = []
    scheduler = Scheduler(
        FakeEngine(token_budget=4),
        on_step=lambda output: told.append(None if output is None else list(output.chunks)),
    )
    assert scheduler.step() is None
    request = scheduler.submit(
        [1] * 6, greedy(2), on_output=lambda *_: told.append("token"), on_done=lambda _: told.append("done")
    )
    scheduler.run_until_idle()
    sequence = scheduler.engine.puts[0]
    expected = [None, [(sequence, 4)], "token", [(sequence, 2)], "token", "done", [(sequence, 1)]]
    assert told == expected
    assert request.done


def test_on_step_runs_on_the_thread_that_owns_the_engine():
    names = set()
    scheduler = Scheduler(FakeEngine(), on_step=lambda _: names.add(threading.current_thread().name))
    scheduler.start()
    scheduler.submit([1], greedy()).result(5)
    scheduler.stop()
    assert names == {"splitfuse"}


def test_on_failure_comes_when_those_it_hit_have_ended():
    seen = []
    error = RuntimeError("the device fell over")
    engine = FakeEngine(max_sequences=1, fail=lambda step: error if step == 2 else None)
    scheduler = Scheduler(
        engine,
        on_step=lambda output: seen.append(output is None),
        on_failure=lambda failure: seen.append((failure, [r.done for r in requests])),
    )
    requests = [scheduler.submit([n], greedy(2)) for n in (1, 2)]
    scheduler.run_until_idle()
    assert seen[:3] == [False, (error, [True, False]), True]
    assert seen[3:] == [False, False]
    assert requests[0].error is error
    assert requests[1].result(0).token_ids == answer([2], 2)


def test_on_failure_tells_of_what_failed_outside_the_engine():
    seen = []

    def fall(output):
        raise ZeroDivisionError("in a hook")

    scheduler = Scheduler(FakeEngine(), on_step=fall, on_failure=seen.append)
    scheduler.start()
    request = scheduler.submit([1], greedy())
    with pytest.raises(ZeroDivisionError):
        request.result(5)
    scheduler.stop()
    assert [type(error) for error in seen] == [ZeroDivisionError]


def test_an_engine_that_is_abandoned_is_not_stepped_again():
    error = RuntimeError("the device fell over")
    engine = FakeEngine(max_sequences=1, fail=lambda step: error)
    seen = []

    def give_up(failure):
        seen.append(failure)
        scheduler.abandon(failure)

    scheduler = Scheduler(engine, on_failure=give_up)
    requests = [scheduler.submit([n], greedy()) for n in (1, 2, 3)]
    scheduler.start()
    for request in requests:
        with pytest.raises(RuntimeError, match="fell over"):
            request.result(5)
    assert (engine.steps, seen) == (1, [error])
    with pytest.raises(StateError, match="closed"):
        scheduler.submit([1], greedy())
    scheduler.close()


# ---------------------------------------------------------------- times


def test_times_follow_the_request():
    inside = []  # when the engine was at work
    engine = FakeEngine(token_budget=4, max_sequences=1, fail=lambda _: inside.append(time.monotonic()))
    scheduler = Scheduler(engine)
    before = time.monotonic()
    first, second = scheduler.submit([1] * 6, greedy(2)), scheduler.submit([2], greedy(1))
    assert before <= first.times.arrived <= second.times.arrived <= time.monotonic()
    assert first.times.started is first.times.first_token is first.times.ended is None

    began = time.monotonic()
    scheduler.step()  # 4 tokens of the first prompt
    started = first.times.started
    assert began <= started <= inside[0]
    assert first.times.first_token is None
    scheduler.step()
    token = first.times.first_token
    assert inside[1] <= token
    assert second.times.started is first.times.ended is None
    scheduler.run_until_idle()
    assert (first.times.started, first.times.first_token) == (started, token)
    assert token <= first.times.ended <= second.times.started <= second.times.ended


def test_the_first_of_several_answers_sets_the_times():
    scheduler = Scheduler(FakeEngine())
    request = scheduler.submit([1], greedy(3, n=3))
    scheduler.step()
    times = (request.times.started, request.times.first_token)
    assert None not in times
    scheduler.run_until_idle()
    assert (request.times.started, request.times.first_token) == times


def test_what_never_happened_has_no_time():
    scheduler = Scheduler(FakeEngine(max_sequences=1))
    running, waiting = (scheduler.submit([1], greedy(50)) for _ in range(2))
    scheduler.step()
    waiting.cancel()
    running.cancel()
    scheduler.run_until_idle()
    assert waiting.times.started is waiting.times.first_token is None
    assert waiting.times.ended is not None
    assert running.times.first_token is not None

    broken = Scheduler(FakeEngine(choose=lambda *_: -1))
    request = broken.submit([1], greedy())
    broken.run_until_idle()
    assert request.times.started is not None
    assert request.times.first_token is None


# ---------------------------------------------------------------- counts


def test_queued_counts_those_that_wait():
    scheduler = Scheduler(FakeEngine(max_sequences=2), max_queued=4)
    requests = [scheduler.submit([1], greedy(4)) for _ in range(4)]
    assert scheduler.queued == 4
    with pytest.raises(QueueFull):
        scheduler.submit([1], greedy(4))
    scheduler.step()
    assert scheduler.queued == 2
    requests[3].cancel()
    requests[0].cancel()
    assert scheduler.queued == 2  # until the next step
    scheduler.step()
    assert scheduler.queued == 0
    scheduler.run_until_idle()
    assert scheduler.queued == 0


@pytest.fixture
def engine(tiny_llama):
    """Room for two prompts of 60 tokens, not for their answers."""
    path = tiny_llama()
    loaded = load(path)
    engine = Engine(loaded.config, loaded.weights, engine_config(path, blocks=8, max_sequences=4))
    yield engine
    engine.close()


def test_preemptions_are_counted_by_request(engine):
    told = []
    scheduler = Scheduler(engine, on_step=lambda output: told.extend(output.preempted))
    requests = [scheduler.submit(random_tokens(i, 60), greedy(40, ignore_eos=True)) for i in range(2)]
    scheduler.run_until_idle()
    assert [r.preemptions for r in requests] == [0, len(told)]
    assert len(told) > 0


def test_cached_tokens_are_those_of_the_prompt(engine):
    scheduler = Scheduler(engine)
    prompt = random_tokens(1, 60)

    def ask(ids, **kwargs):
        request = scheduler.submit(ids, greedy(2, ignore_eos=True), **kwargs)
        assert request.cached_tokens == 0
        scheduler.run_until_idle()
        return request.cached_tokens

    assert ask(prompt) == 0
    assert ask(prompt) == 48  # whole blocks of 16
    assert ask([*prompt[:40], 1, 2]) == 32
    assert ask(prompt, cache_salt="mine") == 0
