"""What requests may hold together, and what one key's requests may learn of another's."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import httpx
import pytest

from scripted_server import Clock
from scripted_server import serving as scripted
from serving import PATIENCE, serving, wait_until
from splitfuse import ConfigError, QueueFull
from splitfuse._intake import Intake
from splitfuse.server.settings import Limits, Settings

pytestmark = pytest.mark.machine_independent
COMPLETIONS = "/v1/completions"


def asked(tokens: int, priority: int = 0) -> Any:
    return SimpleNamespace(prompt_token_ids=[1] * tokens, priority=priority, _queued=True)


def test_prompt_tokens_that_wait_are_bounded() -> None:
    intake = Intake(None, most_tokens=100)
    long = asked(500)
    intake.add(long, 0)  # alone, it may be of any length
    with pytest.raises(QueueFull, match="500 prompt tokens wait already; 100 may"):
        intake.add(asked(1), 1)
    intake.drop(long)
    first, second = asked(60), asked(40)
    intake.add(first, 2)
    intake.add(second, 3)
    with pytest.raises(QueueFull, match="max_queued_tokens"):
        intake.add(asked(1), 4)
    assert intake.first_priority() == 0
    assert intake.pop() is first
    intake.add(asked(60), 5)
    assert intake.tokens == 100


def test_those_who_leave_the_queue_leave_nothing_behind() -> None:
    """An urgent request waits in front of them all the time, so they would never surface."""
    intake = Intake(None)
    intake.add(asked(1, priority=-1), 0)
    for arrival in range(1, 2000):
        request = asked(10, priority=5)
        intake.add(request, arrival)
        intake.drop(request)
    assert intake.waiting == 1
    assert len(intake._heap) < 200


def test_log_probabilities_of_answers_are_bounded_unless_they_are_streamed(
    tiny_llama: Callable[..., Path],
) -> None:
    body = {"prompt": [5, 6, 7], "max_tokens": 30, "n": 2, "logprobs": 4, "ignore_eos": True}
    with serving(tiny_llama(), limits=Limits(answer_logprobs=299)) as server:
        refused = server.post(COMPLETIONS, body)
        assert refused.status_code == 400
        assert refused.json()["error"]["param"] == "logprobs"
        assert "300 log-probabilities" in refused.json()["error"]["message"]
        assert server.post(COMPLETIONS, {**body, "max_tokens": 29}).status_code == 200
        streamed = server.post(COMPLETIONS, {**body, "stream": True})
        assert streamed.status_code == 200
        assert streamed.text.count('"top_logprobs"') >= 60


def test_log_probabilities_that_wait_for_a_reader_are_bounded() -> None:
    """One token with 20 of them is as much as 21 or 22 without."""

    async def waits(steps: int, **params: Any) -> bool:
        async with scripted(Clock(), limits=Limits(stream_items=40)) as runtime:
            stream = runtime.ask(3, streamed=True, max_tokens=100, **params)
            await runtime.step(steps)
            return not stream.cut_off

    async def read_on(**params: Any) -> bool:
        async with scripted(Clock(), limits=Limits(stream_items=40)) as runtime:
            stream = runtime.ask(3, streamed=True, max_tokens=20, **params)
            for _ in range(20):
                await runtime.step()
                assert len(await stream.deltas()) == 1
            return not stream.cut_off

    assert asyncio.run(waits(40))
    assert not asyncio.run(waits(41))
    assert asyncio.run(waits(1, logprobs=20))
    assert not asyncio.run(waits(2, logprobs=20))
    assert asyncio.run(waits(2, n=2, logprobs=20))
    assert not asyncio.run(waits(3, n=2, logprobs=20))
    assert asyncio.run(read_on(logprobs=20))


def test_prompts_repeated_in_an_answer_are_bounded(tiny_llama: Callable[..., Path]) -> None:
    with serving(tiny_llama(), limits=Limits(repeated_tokens=100)) as server:
        body = {"prompt": [5] * 60, "n": 2, "echo": True, "max_tokens": 1}
        refused = server.post(COMPLETIONS, body)
        assert refused.status_code == 400
        assert "120 prompt tokens" in refused.json()["error"]["message"]
        assert server.post(COMPLETIONS, {**body, "n": 1}).status_code == 200


def test_bodies_that_are_open_are_bounded_together(tiny_llama: Callable[..., Path]) -> None:
    limits = Limits(body_bytes=4000, open_bodies=6000)
    head = b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    with serving(tiny_llama(), limits=limits) as server:
        with socket.create_connection(("127.0.0.1", server.port), timeout=PATIENCE) as slow:
            slow.sendall(head + b"Content-Length: 3900\r\n\r\n" + b" " * 3800)
            wait_until(lambda: server.post(COMPLETIONS, {"prompt": " " * 3500}).status_code == 503)
            small = server.post(COMPLETIONS, {"prompt": [5], "max_tokens": 1})
            assert small.status_code == 200
        # Who went away holds nothing any more.
        wait_until(
            lambda: server.post(COMPLETIONS, {"prompt": [5] * 900, "max_tokens": 1}).status_code != 503
        )


def test_keys_do_not_share_cached_prefixes(tiny_llama: Callable[..., Path]) -> None:
    body = {"prompt": list(range(10, 110)), "max_tokens": 1}

    def cached(url: str, key: str) -> int:
        answer = httpx.post(
            url + COMPLETIONS, json=body, headers={"Authorization": f"Bearer {key}"}, timeout=PATIENCE
        )
        return answer.json()["usage"]["prompt_tokens_details"]["cached_tokens"]

    with serving(tiny_llama(), api_keys=("one", "two")) as server:
        assert cached(server.url, "one") == 0
        assert cached(server.url, "one") > 0
        assert cached(server.url, "two") == 0
    with serving(tiny_llama(), api_keys=("one",)) as server:
        assert cached(server.url, "one") == 0
        assert cached(server.url, "one") > 0


def test_a_key_that_a_header_would_change_is_refused() -> None:
    with pytest.raises(ConfigError, match="white space"):
        Settings("model", api_keys=("secret ",))
