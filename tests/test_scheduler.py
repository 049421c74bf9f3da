"""The scheduler over an engine whose every answer is known: intake, order, streams, stops, cancels,
failures."""

import random
import threading
import time

import pytest

from fake_engine import EOS, FakeEngine, FakeTokenizer, answer, spells
from splitfuse import InvalidArgument, QueueFull, SamplingParams, Scheduler, StateError, StepPlan

pytestmark = pytest.mark.machine_independent


def greedy(count=8, **kwargs):
    return SamplingParams(max_tokens=count, seed=0, **kwargs)


def text_scheduler(text, **kwargs):
    return Scheduler(FakeEngine(choose=spells(text), **kwargs), FakeTokenizer())


PROMPT = [ord(c) for c in "ab|"]


# ---------------------------------------------------------------- results


def test_answers_come_back_by_request():
    engine = FakeEngine(token_budget=5, max_sequences=3)
    scheduler = Scheduler(engine)
    prompts = [[i + 1] * (i + 1) for i in range(20)]
    requests = [scheduler.submit(p, greedy(1 + i % 7), request_id=f"r{i}") for i, p in enumerate(prompts)]
    scheduler.run_until_idle()
    for i, (prompt, request) in enumerate(zip(prompts, requests, strict=True)):
        result = request.result(0)
        assert result.token_ids == answer(prompt, 1 + i % 7)
        assert (result.request_id, result.finish_reason, result.prompt_token_ids) == (
            f"r{i}",
            "length",
            prompt,
        )
        assert result.text == ""
        assert result.error is None
    assert sorted(engine.flushed) == sorted(engine.puts)
    assert not engine.sequences
    assert not scheduler.has_work


def test_the_text_of_a_quiet_answer_is_that_of_a_streamed_one():
    pieces = []
    scheduler = text_scheduler("hello")
    quiet = scheduler.submit(PROMPT, greedy(9))
    loud = scheduler.submit(PROMPT, greedy(9), on_output=lambda _, delta: pieces.append(delta))
    scheduler.run_until_idle()
    assert quiet.result().text == loud.result().text == "".join(d.text for d in pieces) == "hello"
    assert quiet.result().token_ids == loud.result().token_ids == [*map(ord, "hello"), EOS]
    assert [d.finish_reason for d in pieces] == [None] * 5 + ["stop"]
    assert [d.token_ids for d in pieces] == [[t] for t in loud.result().token_ids]
    assert quiet.result().outputs[0].stop_reason is None


def test_an_end_of_sequence_shows_only_if_asked_for():
    for streamed in (False, True):
        scheduler = text_scheduler("ab")
        kwargs = {"on_output": lambda *_: None} if streamed else {}
        plain = scheduler.submit(PROMPT, greedy(skip_special_tokens=False), **kwargs)
        shown = scheduler.submit(
            PROMPT, greedy(skip_special_tokens=False, include_stop_str_in_output=True), **kwargs
        )
        scheduler.run_until_idle()
        assert plain.result().text == "ab"
        assert shown.result().text == "ab<end>"


def test_a_stop_token_is_named_and_hidden():
    for streamed in (False, True):
        scheduler = text_scheduler("abc")
        kwargs = {"on_output": lambda *_: None} if streamed else {}
        request = scheduler.submit(PROMPT, greedy(stop_token_ids=[ord("b")]), **kwargs)
        scheduler.run_until_idle()
        completion = request.result().outputs[0]
        assert (completion.text, completion.token_ids) == ("a", [97, 98])
        assert (completion.finish_reason, completion.stop_reason) == ("stop", ord("b"))


def test_max_tokens_none_takes_what_the_context_allows():
    scheduler = Scheduler(FakeEngine(max_model_len=20))
    request = scheduler.submit([1, 2, 3], SamplingParams(max_tokens=None))
    scheduler.run_until_idle()
    assert len(request.result().token_ids) == 17


def test_a_seed_is_drawn_for_each_request_and_reported():
    scheduler = Scheduler(FakeEngine())
    requests = [scheduler.submit([1, 2], SamplingParams(max_tokens=4)) for _ in range(2)]
    scheduler.run_until_idle()
    assert requests[0].seed != requests[1].seed
    for request in requests:
        assert request.result().token_ids == answer([1, 2], 4, seed=request.seed)


# ---------------------------------------------------------------- stop strings


@pytest.mark.parametrize(("include", "expected"), [(False, "one "), (True, "one two th")])
def test_a_stop_string_across_tokens_ends_the_answer_and_the_sequence(include, expected):
    pieces, scheduler = [], text_scheduler("one two three")
    params = greedy(50, stop=["two th", "nowhere"], include_stop_str_in_output=include)
    request = scheduler.submit(PROMPT, params, on_output=lambda _, d: pieces.append(d))
    scheduler.run_until_idle()
    completion = request.result().outputs[0]
    assert completion.text == expected == "".join(d.text for d in pieces)
    assert (completion.finish_reason, completion.stop_reason) == ("stop", "two th")
    assert completion.token_ids == [*map(ord, "one two th")]
    assert pieces[-1].finish_reason == "stop"
    assert all("tw" not in d.text for d in pieces[:-1])
    assert not scheduler.engine.sequences


def test_what_might_have_been_a_stop_string_is_given_back_at_the_end():
    scheduler = text_scheduler("one tw")
    request = scheduler.submit(PROMPT, greedy(50, stop="two"))
    scheduler.run_until_idle()
    assert (request.result().text, request.result().finish_reason) == ("one tw", "stop")
    assert request.result().outputs[0].stop_reason is None


def test_no_stop_string_before_min_tokens():
    scheduler = text_scheduler("xaxaxa")
    request = scheduler.submit(PROMPT, greedy(50, stop="a", min_tokens=3))
    scheduler.run_until_idle()
    assert request.result().text == "xax"
    assert len(request.result().token_ids) == 4


def test_stop_strings_need_a_tokenizer():
    with pytest.raises(InvalidArgument, match="tokenizer"):
        Scheduler(FakeEngine()).submit([1], greedy(stop="a"))


# ---------------------------------------------------------------- n, log-probabilities


@pytest.mark.parametrize("stream", [False, True])
def test_n_answers_differ_by_sample_index_and_share_the_prompt(stream):
    engine, deltas = FakeEngine(token_budget=7), []
    scheduler = Scheduler(engine)
    prompt = list(range(1, 30))
    kwargs = {"on_output": lambda _, d: deltas.append(d)} if stream else {}
    request = scheduler.submit(prompt, greedy(6, n=3), **kwargs)
    other = scheduler.submit([5], greedy(30))
    scheduler.run_until_idle()
    result = request.result()
    assert [c.index for c in result.outputs] == [0, 1, 2]
    assert [c.token_ids for c in result.outputs] == [answer(prompt, 6, sample_index=i) for i in range(3)]
    assert engine.cached_tokens == 2 * (len(prompt) - 1)
    assert other.result().token_ids == answer([5], 30)
    for i in range(3 if stream else 0):
        assert [t for d in deltas if d.index == i for t in d.token_ids] == result.outputs[i].token_ids


def test_n_answers_of_one_token():
    scheduler = Scheduler(FakeEngine())
    request = scheduler.submit([3], greedy(1, n=4))
    scheduler.run_until_idle()
    assert [c.token_ids for c in request.result().outputs] == [
        answer([3], 1, sample_index=i) for i in range(4)
    ]


def test_logprobs_begin_with_the_chosen_token():
    deltas = []
    scheduler = text_scheduler("ab")
    params = greedy(logprobs=2, prompt_logprobs=1, n=2)
    request = scheduler.submit(PROMPT, params, on_output=lambda _, d: deltas.append(d))
    quiet = scheduler.submit(PROMPT, greedy(prompt_logprobs=0))
    scheduler.run_until_idle()
    result = request.result()
    for completion in result.outputs:
        assert [next(iter(entry)) for entry in completion.logprobs] == completion.token_ids == [97, 98, EOS]
        assert list(completion.logprobs[0]) == [97, 98]  # the best of all is the chosen one: named once
        assert completion.logprobs[0][97].text == "a"
        assert completion.cumulative_logprob == pytest.approx(-1.5)
    assert result.prompt_logprobs[0] is None
    assert [next(iter(entry)) for entry in result.prompt_logprobs[1:]] == PROMPT[1:]
    assert [d.logprobs for d in deltas if d.index == 0] == [[entry] for entry in result.logprobs]
    assert quiet.result().logprobs is None
    assert [list(entry) for entry in quiet.result().prompt_logprobs[1:]] == [[t] for t in PROMPT[1:]]


# ---------------------------------------------------------------- order and admission


def test_priority_then_arrival():
    scheduler, order = Scheduler(FakeEngine(max_sequences=1)), []
    for name, priority in [("a", 5), ("b", 0), ("c", 5), ("d", -1), ("e", 0)]:
        scheduler.submit(
            [1], greedy(2), priority=priority, request_id=name, on_done=lambda r: order.append(r.id)
        )
    scheduler.run_until_idle()
    assert order == ["d", "b", "e", "a", "c"]


def test_the_engine_holds_no_more_than_it_can_run_at_once():
    engine = FakeEngine(max_sequences=4)
    scheduler = Scheduler(engine)
    for _ in range(50):
        scheduler.submit([1, 2], greedy(3))
    scheduler.run_until_idle()
    assert engine.most_live == 4
    assert len(engine.puts) == 50


def test_the_urgent_pass_prompts_that_fill_the_engine():
    engine = FakeEngine(max_sequences=2, token_budget=4)
    scheduler = Scheduler(engine)
    slow = [scheduler.submit([1] * 40, greedy(4)) for _ in range(4)]
    scheduler.step()
    urgent = scheduler.submit([2], greedy(2), priority=-1)
    scheduler.step()
    scheduler.step()
    assert urgent.done
    assert not any(r.done for r in slow)
    assert engine.most_live == 3
    scheduler.run_until_idle()
    assert all(r.result().token_ids == answer([1] * 40, 4) for r in slow)


def test_a_full_queue_refuses():
    scheduler = Scheduler(FakeEngine(max_sequences=1), max_queued=2)
    first, second = (scheduler.submit([1], greedy(3)) for _ in range(2))
    with pytest.raises(QueueFull, match="max_queued"):
        scheduler.submit([1], greedy(3))
    second.cancel()
    scheduler.step()  # the first is admitted, the second gone
    waiting = [scheduler.submit([1], greedy(3)) for _ in range(2)]
    with pytest.raises(QueueFull):
        scheduler.submit([1], greedy(3))
    scheduler.run_until_idle()
    assert first.result().finish_reason == "length"
    assert second.result().finish_reason == "abort"
    assert all(r.result().finish_reason == "length" for r in waiting)


def test_a_max_queued_of_nonsense_is_refused():
    with pytest.raises(InvalidArgument, match="max_queued"):
        Scheduler(FakeEngine(), max_queued=-1)


@pytest.mark.parametrize(
    ("prompt", "params", "reason"),
    [
        ([], None, "empty"),
        ([[1, 2]], None, "flat"),
        ([1.5], None, "integer"),
        (["a"], None, "integer"),
        ([True, False], None, "integer"),
        ([1, 128], None, "128"),
        ([-1], None, "-1"),
        ([2**70], None, "integer"),
        ([1] * 250, greedy(7), "256"),
        ([1] * 256, SamplingParams(max_tokens=None), "256"),
        ([1], greedy(stop_token_ids=[128]), "stop_token_ids"),
        ([1], greedy(logit_bias={500: 1.0}), "logit_bias"),
        ([1], {"max_tokens": 3}, "SamplingParams"),
    ],
)
def test_what_could_not_be_served_is_refused_at_once(prompt, params, reason):
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    with pytest.raises(InvalidArgument, match=reason):
        scheduler.submit(prompt, params)
    assert not scheduler.has_work


def test_a_refusal_of_the_engine_ends_only_that_request():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    put = engine.put

    def refuse(sequence, tokens, params, priority=0, cache_salt=""):
        if tokens[0] == 9:
            raise InvalidArgument("nines are refused")
        put(sequence, tokens, params, priority, cache_salt)

    engine.put = refuse
    bad, good = scheduler.submit([9], greedy()), scheduler.submit([1], greedy())
    scheduler.run_until_idle()
    with pytest.raises(InvalidArgument, match="nines"):
        bad.result(0)
    assert bad.output.finish_reason == "error"
    assert good.result().token_ids == answer([1], 8)


# ---------------------------------------------------------------- policies


class ShortestFirst(Scheduler):
    """One sequence a step: the one with the least left to do."""

    def plan(self, views, limits):
        seen.append([self.request_of(v.id).id for v in views])
        view = min(views, key=lambda v: (v.known - v.computed, v.id))
        return StepPlan([(view.id, min(view.known - view.computed, limits.max_tokens))])


seen: list[list[str]] = []


def test_plan_is_obeyed():
    seen.clear()
    engine = FakeEngine()
    scheduler, order = ShortestFirst(engine), []
    for name, size in [("long", 30), ("short", 3)]:
        scheduler.submit([2] * size, greedy(2), request_id=name, on_done=lambda r: order.append(r.id))
    scheduler.run_until_idle()
    assert order == ["short", "long"]
    assert all(len(p.chunks) == 1 for p in engine.planned)
    assert seen[0] == ["long", "short"]


def test_a_plan_of_none_is_the_engines_own():
    class Sometimes(Scheduler):
        def plan(self, views, limits):
            return None

    engine = FakeEngine()
    request = Sometimes(engine).submit([1], greedy())
    request._scheduler.run_until_idle()
    assert not engine.planned
    assert request.result().token_ids == answer([1], 8)


@pytest.mark.parametrize("bad", ["raises", "unservable"])
def test_a_bad_plan_ends_what_it_was_for(bad):
    class Bad(Scheduler):
        broken = True

        def plan(self, views, limits):
            if not self.broken:
                return None
            if bad == "raises":
                raise KeyError("policy")
            return StepPlan([(12345, 1)])

    scheduler = Bad(FakeEngine())
    request = scheduler.submit([1], greedy())
    scheduler.run_until_idle()
    with pytest.raises(KeyError if bad == "raises" else InvalidArgument):
        request.result(0)
    scheduler.broken = False
    later = scheduler.submit([1], greedy())
    scheduler.run_until_idle()
    assert later.result().token_ids == answer([1], 8)


def test_a_policy_that_holds_back_does_not_spin():
    class Lazy(Scheduler):
        calls = 0

        def plan(self, views, limits):
            self.calls += 1
            return StepPlan() if time.monotonic() < until else None

    scheduler = Lazy(FakeEngine())
    request = scheduler.submit([1], greedy())
    until = time.monotonic() + 0.1
    scheduler.run_until_idle()
    assert request.result().token_ids == answer([1], 8)
    assert scheduler.calls < 150


# ---------------------------------------------------------------- failures


def test_a_failed_step_ends_what_it_ran_and_no_more():
    error = RuntimeError("the device fell over")
    engine = FakeEngine(max_sequences=2, fail=lambda step: error if step == 3 else None)
    scheduler, done = Scheduler(engine), []
    requests = [scheduler.submit([i + 1], greedy(5), on_done=done.append) for i in range(4)]
    scheduler.run_until_idle()
    for request in requests[:2]:
        with pytest.raises(RuntimeError, match="fell over"):
            request.result(0)
        assert (request.output.finish_reason, len(request.output.token_ids)) == ("error", 2)
    for i, request in enumerate(requests[2:], 3):
        assert request.result(0).token_ids == answer([i], 5)
    assert sorted(map(id, done)) == sorted(map(id, requests))
    assert not engine.sequences


def test_a_dead_engine_leaves_nobody_waiting():
    engine = FakeEngine(max_sequences=2)
    scheduler = Scheduler(engine)
    scheduler.start()
    requests = [scheduler.submit([1], greedy(200)) for _ in range(7)]
    engine.close()
    for request in requests:
        with pytest.raises(StateError, match="closed"):
            request.result(5)
    scheduler.stop()


def test_output_that_is_not_finite_ends_that_request_alone():
    def choose(history, seed, sample_index, vocab_size):
        return -1 if history[0] == 9 and len(history) == 4 else 5

    for streamed in (False, True):
        scheduler = Scheduler(FakeEngine(choose=choose), FakeTokenizer())
        kwargs = {"on_output": lambda *_: None} if streamed else {}
        bad, good = scheduler.submit([9, 9], greedy(), **kwargs), scheduler.submit([1], greedy(), **kwargs)
        scheduler.run_until_idle()
        assert bad.output.token_ids == [5, 5]
        assert bad.output.finish_reason == "error"
        assert "not finite" in str(bad.error)
        assert good.result().token_ids == [5] * 8


def test_a_callback_that_raises_ends_its_own_request():
    scheduler = text_scheduler("hello")

    def fall(request, delta):
        if delta.text == "l":
            raise ZeroDivisionError("mine")

    bad = scheduler.submit(PROMPT, greedy(n=2), on_output=fall)
    good = scheduler.submit(PROMPT, greedy())
    scheduler.run_until_idle()
    with pytest.raises(ZeroDivisionError):
        bad.result(0)
    assert bad.output.outputs[0].token_ids == [*map(ord, "hel")]
    assert {c.finish_reason for c in bad.output.outputs} == {"error"}
    assert good.result().text == "hello"
    assert not scheduler.engine.sequences


def test_a_tokenizer_that_raises_ends_only_requests_that_need_text():
    class Broken(FakeTokenizer):
        def decode(self, ids, skip_special_tokens=True):
            raise UnicodeError("no text today")

    scheduler = Scheduler(FakeEngine(), Broken())
    streamed = scheduler.submit([1], greedy(), on_output=lambda *_: None)
    quiet = scheduler.submit([1], greedy())
    scheduler.run_until_idle()
    with pytest.raises(UnicodeError):
        streamed.result(0)
    assert quiet.result().token_ids == answer([1], 8)


def test_on_done_that_raises_is_logged_and_forgotten(caplog):
    scheduler = Scheduler(FakeEngine())
    request = scheduler.submit([1], greedy(), on_done=lambda r: 1 / 0)
    scheduler.run_until_idle()
    assert request.result().finish_reason == "length"
    assert "on_done" in caplog.text


# ---------------------------------------------------------------- cancelling


def test_cancel_in_every_state():
    engine = FakeEngine(max_sequences=1)
    scheduler, done = Scheduler(engine), []
    running, waiting, after = (scheduler.submit([1], greedy(6), on_done=done.append) for _ in range(3))
    scheduler.step()
    scheduler.step()
    running.cancel()
    waiting.cancel()
    scheduler.run_until_idle()
    assert (running.result().token_ids, running.result().finish_reason) == (answer([1], 2), "abort")
    assert (waiting.result().token_ids, waiting.result().finish_reason) == ([], "abort")
    assert after.result().token_ids == answer([1], 6)
    after.cancel()
    scheduler.run_until_idle()
    assert after.result().finish_reason == "length"
    assert done == [running, waiting, after]
    assert len(engine.puts) == 2


def test_cancel_keeps_the_answers_that_were_finished():
    def choose(history, seed, sample_index, vocab_size):
        return EOS if sample_index == 0 and len(history) == 3 else 7

    scheduler = Scheduler(FakeEngine(choose=choose))
    request = scheduler.submit([1], greedy(100, n=2))
    for _ in range(10):
        scheduler.step()
    request.cancel()
    scheduler.run_until_idle()
    assert [c.finish_reason for c in request.result().outputs] == ["stop", "abort"]


def test_a_callback_may_cancel_and_submit():
    scheduler, later = Scheduler(FakeEngine()), []

    def on_output(request, delta):
        request.cancel()
        later.append(scheduler.submit([2], greedy(2)))

    request = scheduler.submit([1], greedy(50), on_output=on_output)
    scheduler.run_until_idle()
    assert request.result().finish_reason == "abort"
    assert len(request.result().token_ids) == 1
    assert [r.result().token_ids for r in later] == [answer([2], 2)]


# ---------------------------------------------------------------- threads


def test_step_belongs_to_one_thread():
    scheduler = Scheduler(FakeEngine())
    scheduler.start()
    with pytest.raises(StateError, match="another thread"):
        scheduler.step()
    with pytest.raises(StateError, match="started"):
        scheduler.start()
    scheduler.stop()
    assert scheduler.step() is None


def test_many_threads_submit_cancel_and_wait():
    engine = FakeEngine(token_budget=16, max_sequences=6)
    scheduler = Scheduler(engine)
    scheduler.start()
    ended: list[object] = []
    failures: list[str] = []

    def client(number):
        rng = random.Random(number)
        for i in range(25):
            prompt = [rng.randrange(1, 128) for _ in range(rng.randrange(1, 20))]
            count = rng.randrange(1, 12)
            streamed: list[int] = []
            request = scheduler.submit(
                prompt, greedy(count, n=rng.choice([1, 1, 2])), priority=rng.randrange(3),
                on_output=(lambda _, d, s=streamed: s.extend(d.token_ids)) if i % 3 == 0 else None,
                on_done=ended.append,
            )  # fmt: skip
            if i % 4 == 0:
                time.sleep(rng.random() * 0.002)
                request.cancel()
            result = request.result(20)
            for completion in result.outputs:
                full = answer(prompt, count, sample_index=completion.index)
                whole = completion.token_ids == full and completion.finish_reason == "length"
                cut = (
                    completion.finish_reason == "abort"
                    and completion.token_ids == full[: len(completion.token_ids)]
                )
                if not (whole or (cut and i % 4 == 0)):
                    failures.append(f"client {number} request {i}: {completion}")
            if i % 3 == 0 and len(streamed) != sum(len(c.token_ids) for c in result.outputs):
                failures.append(f"client {number} request {i}: streamed {streamed}")

    threads = [threading.Thread(target=client, args=(k,)) for k in range(8)]
    for t in threads:
        t.start()
    for t in threads:
        t.join(30)
    scheduler.stop()
    assert not failures
    assert len(ended) == 200 == len(set(map(id, ended)))
    assert not engine.sequences
    assert sorted(engine.flushed) == sorted(engine.puts)


def test_an_idle_thread_sleeps():
    engine = FakeEngine()
    scheduler = Scheduler(engine)
    scheduler.start()
    scheduler.submit([1], greedy()).result(5)
    steps, cpu = engine.steps, time.process_time()
    time.sleep(0.3)
    assert engine.steps == steps
    assert time.process_time() - cpu < 0.1
    scheduler.stop()


def test_stop_drains_or_cancels_and_can_start_again():
    scheduler = Scheduler(FakeEngine(delay=0.001, max_sequences=2))
    scheduler.start()
    requests = [scheduler.submit([1], greedy(20)) for _ in range(5)]
    scheduler.stop()
    assert [r.result(0).finish_reason for r in requests] == ["length"] * 5
    scheduler.start()
    requests = [scheduler.submit([1], greedy(200)) for _ in range(5)]
    scheduler.stop(drain=False)
    assert [r.result(0).finish_reason for r in requests] == ["abort"] * 5
    scheduler.start()
    assert scheduler.submit([1], greedy(2)).result(5).token_ids == answer([1], 2)
    scheduler.stop()


def test_stop_without_a_thread():
    scheduler = Scheduler(FakeEngine())
    drained = scheduler.submit([1], greedy())
    scheduler.stop()
    assert drained.result(0).finish_reason == "length"
    dropped = scheduler.submit([1], greedy())
    scheduler.stop(drain=False)
    assert dropped.result(0).finish_reason == "abort"


def test_while_stopping_nothing_is_taken():
    scheduler = Scheduler(FakeEngine(delay=0.005))
    scheduler.start()
    request = scheduler.submit([1], greedy(40))
    stopper = threading.Thread(target=scheduler.stop)
    stopper.start()
    while scheduler._stopping is None:
        time.sleep(0.001)
    with pytest.raises(StateError, match="stopping"):
        scheduler.submit([1], greedy(1))
    stopper.join(10)
    assert request.result(0).finish_reason == "length"


def test_close_is_for_good():
    for threaded in (False, True):
        scheduler = Scheduler(FakeEngine(delay=0.001))
        if threaded:
            scheduler.start()
        request = scheduler.submit([1], greedy(200))
        scheduler.close()
        scheduler.close()
        assert request.result(0).finish_reason == "abort"
        with pytest.raises(StateError, match="closed"):
            scheduler.submit([1], greedy())


def test_stop_waits_no_longer_than_it_is_told():
    hang = threading.Event()
    engine = FakeEngine(fail=lambda step: hang.wait(20) and None)
    scheduler = Scheduler(engine)
    scheduler.start()
    request = scheduler.submit([1], greedy())
    while not engine.steps:
        time.sleep(0.001)
    with pytest.raises(TimeoutError, match=r"a step of the engine has not ended within 0\.05 s"):
        scheduler.close(0.05)
    hang.set()
    scheduler.close()
    assert request.result(5).finish_reason == "abort"


def test_stop_from_a_callback():
    scheduler = Scheduler(FakeEngine())
    scheduler.start()
    request = scheduler.submit([1], greedy(50), on_output=lambda *_: scheduler.stop(drain=False))
    assert request.result(5).finish_reason == "abort"


def test_result_in_time_or_timeout():
    scheduler = Scheduler(FakeEngine())
    request = scheduler.submit([1], greedy(), request_id="slow")
    with pytest.raises(TimeoutError, match="slow"):
        request.result(0.01)
    assert not request.wait(0.01)
    assert request.output is None
