"""What a reader of a stream gets that the whole answer has otherwise, or not at all."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from fake_engine import FakeEngine, FakeTokenizer, spells
from serving import TINY_ENGINE, Running, serving
from splitfuse import LLM, Request, SamplingParams, Scheduler
from splitfuse.server.runtime import StepRecord

pytestmark = pytest.mark.machine_independent

PROMPT = [ord(c) for c in "ab|"]


def text_scheduler(text: str) -> Scheduler:
    engine: Any = FakeEngine(choose=spells(text))
    tokenizer: Any = FakeTokenizer()
    return Scheduler(engine, tokenizer)


# ---------------------------------------------------------------- text that was held back at a cancellation


@pytest.mark.parametrize(("steps", "told", "kept"), [(5, "one ", "t"), (6, "one ", "tw"), (7, "one twi", "")])
def test_a_cancelled_stream_knows_what_it_was_not_told(steps: int, told: str, kept: str) -> None:
    scheduler, pieces = text_scheduler("one twice"), []
    params = SamplingParams(max_tokens=50, stop="two")
    request = scheduler.submit(PROMPT, params, on_output=lambda _, delta: pieces.append(delta.text))
    for _ in range(steps):
        scheduler.step()
    request.cancel()
    scheduler.run_until_idle()
    (completion,) = request.result().outputs
    assert completion.finish_reason == "abort"
    assert "".join(pieces) == told
    assert completion.undelivered == kept
    assert completion.text == told + kept


def test_an_answer_that_ended_by_itself_has_told_all() -> None:
    scheduler, pieces = text_scheduler("one tw"), []
    params = SamplingParams(max_tokens=50, stop="two")
    request = scheduler.submit(PROMPT, params, on_output=lambda _, delta: pieces.append(delta.text))
    scheduler.run_until_idle()
    assert "".join(pieces) == "one tw"
    assert request.result().outputs[0].undelivered == ""


class CancelsAt:
    """Cancels all that is open after so many steps."""

    def __init__(self, server: Running, steps: int) -> None:
        self._server, self._steps = server, steps

    def on_step(self, step: StepRecord) -> None:
        self._steps -= 1
        if self._steps == 0:
            for stream in list(self._server.runtime._streams):
                stream.cancel()

    def on_end(self, request: Request) -> None: ...


def test_the_last_frame_of_a_cancelled_stream_has_what_was_held_back(
    tiny_llama: Callable[..., Path],
) -> None:
    """The stop string is all that the model will say, and more: so nothing may be shown before the end."""
    path, prompt = tiny_llama(), [7, 8, 9]
    with LLM(path, **TINY_ENGINE) as llm:
        params = SamplingParams(max_tokens=60, temperature=0, ignore_eos=True)
        stop = llm.generate([prompt], params)[0].text[:200] + "never"
        five = SamplingParams(max_tokens=5, temperature=0, ignore_eos=True)
        expected = llm.generate([prompt], five)[0].text
    body = {"prompt": prompt, "max_tokens": 400, "temperature": 0, "ignore_eos": True, "stop": stop}
    with serving(path) as server:
        server.runtime.observers.append(CancelsAt(server, 5))
        answer = server.post("/v1/completions", {**body, "stream": True})
    frames = [json.loads(line[6:]) for line in answer.text.splitlines() if line.startswith("data: {")]
    *before, last = [frame["choices"][0] for frame in frames]
    assert [choice["text"] for choice in before] == [""] * 5
    assert last["finish_reason"] == "abort"
    assert last["text"] == expected
    assert expected


# ---------------------------------------------------------------- log-probabilities that only deltas have


@pytest.mark.parametrize("keep", [True, False])
def test_log_probabilities_are_kept_only_if_asked_for(keep: bool) -> None:
    scheduler, deltas = text_scheduler("hello"), []
    params = SamplingParams(max_tokens=4, logprobs=2)
    request = scheduler.submit(
        PROMPT, params, on_output=lambda _, delta: deltas.append(delta), keep_logprobs=keep
    )
    scheduler.run_until_idle()
    (completion,) = request.result().outputs
    told = [entry for delta in deltas for entry in delta.logprobs]
    assert [next(iter(entry)) for entry in told] == completion.token_ids == [*map(ord, "hell")]
    if keep:
        assert completion.logprobs == told
        assert completion.cumulative_logprob == pytest.approx(
            sum(next(iter(entry.values())).logprob for entry in told)
        )
    else:
        assert completion.logprobs is None
        assert completion.cumulative_logprob is None
