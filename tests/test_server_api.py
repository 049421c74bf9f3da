"""The routes as bytes: frames, headers, envelopes, limits, tokenising, templates, and what becomes of a request whose
client leaves or does not read."""

from __future__ import annotations

import asyncio
import json
import re
import socket
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from conftest import TINY_CHAT_TEMPLATE, copy_of
from serving import PATIENCE, TINY_ENGINE, Running, serving, wait_until
from splitfuse import LLM, SamplingParams
from splitfuse.server import sse
from splitfuse.server.answers import answer

pytestmark = pytest.mark.machine_independent

CHAT = "/v1/chat/completions"
COMPLETIONS = "/v1/completions"
MESSAGES = [{"role": "user", "content": "the cat"}]
LONG = 8192  # tokens of context: an answer that long takes seconds
ENDLESS = {"max_tokens": 8000, "ignore_eos": True}


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(max_position_embeddings=LONG)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Running]:
    with serving(model, served_names=("tiny",)) as running:
        yield running


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **TINY_ENGINE) as llm:
        yield llm


@pytest.fixture(autouse=True)
def idle(server: Running) -> Iterator[None]:
    """No test leaves a request or a block behind."""
    yield
    server.wait_idle()


def frames(raw: bytes) -> list[Any]:
    """The events of a stream, which must be nothing but whole ones and [DONE]."""
    *events, end, nothing = raw.split(b"\n\n")
    assert (end, nothing) == (b"data: [DONE]", b"")
    assert all(event.startswith(b"data: {") and b"\n" not in event for event in events)
    return [json.loads(event[6:]) for event in events]


def refusal(server: Running, path: str, body: Any) -> dict[str, Any]:
    """The error of a request that must be refused with status 400, and leave nothing running."""
    response = server.post(path, body)
    assert response.status_code == 400, response.text
    (error,) = response.json().values()
    assert error.keys() == {"message", "type", "param", "code"}
    assert (error["type"], error["code"]) == ("BadRequestError", 400)
    assert server.runtime.open_requests == 0
    found: dict[str, Any] = error
    return found


# ---------------------------------------------------------------- frames


def test_the_frames_of_a_chat(server: Running) -> None:
    body = {"messages": MESSAGES, "max_tokens": 3, "seed": 1, "ignore_eos": True, "stream": True}
    response = server.post(CHAT, body)
    assert response.headers["content-type"] == "text/event-stream; charset=utf-8"
    assert response.headers["cache-control"] == "no-cache"
    assert "content-length" not in response.headers
    events = frames(response.content)
    fingerprint = server.runtime.served.fingerprint
    head = {"object": "chat.completion.chunk", "model": "tiny", "system_fingerprint": fingerprint}
    for event in events:
        assert re.fullmatch("chatcmpl-[0-9a-f]{32}", event.pop("id"))
        assert isinstance(event.pop("created"), int)
        assert event.items() >= head.items()
        assert event.keys() == {*head, "choices"}
    (first,), *middle, (last,) = (event["choices"] for event in events)
    assert first == {"index": 0, "delta": {"role": "assistant", "content": ""}, "finish_reason": None}
    for (choice,) in middle:
        text = choice["delta"].pop("content")
        assert isinstance(text, str)
        assert choice == {"index": 0, "delta": {}, "finish_reason": None}
    assert len(middle) == 2
    assert last.keys() == {"index", "delta", "finish_reason", "stop_reason"}
    assert (last["finish_reason"], last["stop_reason"]) == ("length", None)


def test_the_frames_of_a_completion(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 2, "ignore_eos": True, "stream": True}
    first, last = frames(server.post(COMPLETIONS, body).content)
    assert first.keys() == {"id", "object", "created", "model", "system_fingerprint", "choices"}
    assert first["object"] == "text_completion"
    assert first["choices"][0].keys() == {"index", "text", "finish_reason"}
    assert last["choices"][0].keys() == {"index", "text", "finish_reason", "stop_reason"}


@pytest.mark.parametrize("path", [CHAT, COMPLETIONS])
def test_usage_in_every_frame(server: Running, path: str) -> None:
    asked = {"messages": MESSAGES} if path == CHAT else {"prompt": "the cat"}
    options = {"include_usage": True, "continuous_usage_stats": True}
    body = {**asked, "max_tokens": 5, "ignore_eos": True, "stream": True, "stream_options": options}
    events = frames(server.post(path, body).content)
    made = [event["usage"]["completion_tokens"] for event in events]
    assert made == [*([0] if path == CHAT else []), 1, 2, 3, 4, 5, 5]
    assert len({event["usage"]["prompt_tokens"] for event in events}) == 1
    assert events[-1]["choices"] == []
    body["stream_options"] = {"include_usage": True}
    events = frames(server.post(path, body).content)
    assert [event for event in events if "usage" in event] == events[-1:]


def test_token_ids_in_frames_and_answers(server: Running, llm: LLM) -> None:
    (expected,) = llm.chat(MESSAGES, SamplingParams(max_tokens=6, seed=2))
    body = {"messages": MESSAGES, "max_tokens": 6, "seed": 2, "return_token_ids": True}
    whole = server.post(CHAT, body).json()
    assert whole["prompt_token_ids"] == expected.prompt_token_ids
    assert whole["choices"][0]["token_ids"] == expected.token_ids
    events = frames(server.post(CHAT, {**body, "stream": True}).content)
    assert events[0]["prompt_token_ids"] == expected.prompt_token_ids
    assert [t for event in events for t in event["choices"][0].get("token_ids", ())] == expected.token_ids
    body = {"prompt": [5, 6], "max_tokens": 6, "seed": 2, "return_token_ids": True}
    (choice,) = server.post(COMPLETIONS, body).json()["choices"]
    events = frames(server.post(COMPLETIONS, {**body, "stream": True}).content)
    assert choice["prompt_token_ids"] == events[0]["choices"][0]["prompt_token_ids"] == [5, 6]
    assert [t for event in events for t in event["choices"][0]["token_ids"]] == choice["token_ids"]


def test_tokens_by_id(server: Running) -> None:
    body = {"prompt": "a", "max_tokens": 3, "logprobs": 1, "return_tokens_as_token_ids": True}
    shown = server.post(COMPLETIONS, body).json()["choices"][0]["logprobs"]
    assert all(re.fullmatch(r"token_id:\d+", token) for token in shown["tokens"])


def test_an_answer_that_is_cancelled_says_so(server: Running) -> None:
    """As when the server shuts down: each choice still gets its end."""
    body = {"messages": MESSAGES, "n": 2, "stream": True, **ENDLESS}
    with _raw(server, CHAT, body) as connection:
        reader = connection.makefile("rb")
        while b"content" not in reader.readline():
            pass
        server.on_loop(_coroutine(server.runtime.cancel_all))
        rest = reader.read().replace(b"\r\n", b"\n")
    assert rest.count(b'"finish_reason":"abort","stop_reason":null') == 2
    assert b"data: [DONE]\n\n" in rest


def test_a_long_wait_is_filled_with_comments(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sse, "KEEP_ALIVE", 0.01)
    turn = server.scheduler.engine

    class Waits:
        """An engine whose first step waits until the comment has come."""

        def __getattr__(self, name: str) -> Any:
            return getattr(turn, name)

        def step(self, *arguments: Any) -> Any:
            assert commented.wait(PATIENCE)
            return turn.step(*arguments)

    commented = threading.Event()
    monkeypatch.setattr(server.scheduler, "engine", Waits())
    body = {"prompt": "a", "max_tokens": 2, "ignore_eos": True, "stream": True}
    with _raw(server, COMPLETIONS, body) as connection:
        reader = connection.makefile("rb")
        while reader.readline() != b": keep-alive\n":
            pass
        commented.set()
        rest = reader.read()
    assert rest.count(b"data: {") == 2
    assert b"data: [DONE]\n\n" in rest


def _coroutine(call: Callable[[], Any]) -> Callable[[], Any]:
    async def run() -> Any:
        return call()

    return run


def _raw(server: Running, path: str, body: Any, receive_buffer: int = 0) -> socket.socket:
    """A connection of its own on which a request has been sent."""
    connection = socket.socket()
    connection.settimeout(PATIENCE)
    if receive_buffer:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, receive_buffer)
    connection.connect(("127.0.0.1", server.port))
    content = json.dumps(body).encode()
    head = (
        f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nConnection: close\r\n"
    )
    connection.sendall(f"{head}Content-Length: {len(content)}\r\n\r\n".encode() + content)
    return connection


# ---------------------------------------------------------------- clients that leave, or don't read


@pytest.mark.parametrize(
    "body", [{"stream": True}, {}, {"n": 3}, {"prompt": ["a", "b"], "stream": True}], ids=str
)
def test_whoever_leaves_is_computed_for_no_more(server: Running, body: dict[str, Any]) -> None:
    with server.watched() as watch:
        connection = _raw(server, COMPLETIONS, {"prompt": "a", **ENDLESS, **body})
        wait_until(lambda: server.used_blocks() > 0)
        connection.close()
        server.wait_idle()
    assert set(watch.reasons) == {"abort"}


def test_leaving_while_queued(model: Path) -> None:
    with serving(model, engine={"max_sequences": 1}) as server, server.watched() as watch:
        running = _raw(server, COMPLETIONS, {"prompt": "a", **ENDLESS})
        wait_until(lambda: server.used_blocks() > 0)
        waiting = [_raw(server, COMPLETIONS, {"prompt": "b", "stream": s, **ENDLESS}) for s in (True, False)]
        wait_until(lambda: server.runtime.queued == 2)
        for connection in waiting:
            connection.close()
        wait_until(lambda: server.runtime.queued == 0)
        running.close()
        server.wait_idle()
        assert watch.reasons == ["abort"] * 3


@pytest.mark.parametrize("prompt", ["a", ["a", "b"]], ids=["one", "several"])
def test_a_reader_that_takes_nothing_is_cut_off(model: Path, prompt: Any) -> None:
    """Its blocks are freed, and its connection is broken without a clean end."""
    with serving(model, stall_timeout=0.2) as server, server.watched() as watch:
        body = {"prompt": prompt, "stream": True, "logprobs": 20, **ENDLESS}
        connection = _raw(server, COMPLETIONS, body, receive_buffer=4096)
        wait_until(lambda: server.used_blocks() > 0)
        server.wait_idle()
        received = b""
        try:
            while part := connection.recv(1 << 16):
                received += part
        except ConnectionResetError:
            pass
        assert b"[DONE]" not in received
        assert not received.endswith(b"0\r\n\r\n")
        assert set(watch.reasons) == {"abort"}


@pytest.mark.parametrize("stream", [True, False], ids=["streamed", "whole"])
def test_a_reader_that_stalls_when_all_was_made_is_cut_off(model: Path, stream: bool) -> None:
    """No request is open any more, so nothing but its connection knows of it."""
    with serving(model, stall_timeout=0.3, send_buffer=4096) as server, server.watched() as watch:
        body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "logprobs": 20, "stream": stream}
        with _raw(server, COMPLETIONS, body, receive_buffer=2048):
            wait_until(lambda: watch.reasons)
            assert watch.reasons == ["length"]
            assert server.connections
            wait_until(lambda: not server.connections)


def test_a_slow_reader_is_not_cut_off(model: Path) -> None:
    with serving(model, stall_timeout=0.4, send_buffer=4096) as server:
        body = {"prompt": "a", "max_tokens": 60, "ignore_eos": True, "logprobs": 20}
        with _raw(server, COMPLETIONS, body, receive_buffer=2048) as connection:
            received = connection.recv(1)
            for _ in range(12):  # it takes longer than three stalls
                time.sleep(0.1)
                received += connection.recv(4096)
            while part := connection.recv(1 << 16):
                received += part
        assert json.loads(received.partition(b"\r\n\r\n")[2])["usage"]["completion_tokens"] == 60


# ---------------------------------------------------------------- batches of prompts


def test_one_bad_prompt_stops_all_before_anything_runs(server: Running) -> None:
    with server.watched() as watch:
        for prompts in ([[1], [2], [331]], [[1], []], ["a", "b" * 60000]):
            error = refusal(server, COMPLETIONS, {"prompt": prompts})
            assert error["message"].startswith(f"prompt {len(prompts) - 1}: "), error
    assert (watch.steps, watch.reasons) == (0, [])


@pytest.mark.parametrize(
    "body",
    [
        {"prompt": ""},
        {"prompt": [331]},
        {"prompt": [1], "max_tokens": LONG},
        {"prompt": [1], "min_tokens": LONG, "max_tokens": LONG},
        {"prompt": [1] * (LONG + 1)},
        {"prompt": [1], "stop_token_ids": [331]},
        {"prompt": [1], "logit_bias": {"331": 1}},
        {"prompt": "half a pair \ud800"},
        {"prompt": "x" * (7 * LONG + 1)},
    ],
    ids=lambda body: str(body)[:40],
)
def test_what_could_never_be_served(server: Running, body: dict[str, Any]) -> None:
    error = refusal(server, COMPLETIONS, body)
    assert len(error["message"]) < 300


def test_a_text_too_long_to_fit_is_not_tokenised(server: Running, monkeypatch: pytest.MonkeyPatch) -> None:
    def encode(*_: Any, **__: Any) -> None:
        raise AssertionError("tokenised")

    monkeypatch.setattr(server.runtime.tokenizer, "encode", encode)
    text = "x" * (10 * LONG)
    for path, body in (
        (COMPLETIONS, {"prompt": text}),
        (CHAT, {"messages": [{"role": "user", "content": text}]}),
        ("/tokenize", {"prompt": text}),
    ):
        assert "can't fit" in refusal(server, path, body)["message"]


def test_a_default_length_gives_way_to_the_context(server: Running) -> None:
    body = {"prompt": [1] * (LONG - 3), "ignore_eos": True}
    assert server.post(COMPLETIONS, body).json()["usage"]["completion_tokens"] == 3
    assert "max_tokens" in refusal(server, COMPLETIONS, {**body, "max_tokens": 16})["message"]


@pytest.mark.parametrize(("keep", "left"), [(3, 3), (9, 5), (-1, 5)])
def test_a_prompt_is_cut_from_the_left(server: Running, llm: LLM, keep: int, left: int) -> None:
    prompt = [10, 11, 12, 13, 14]
    (expected,) = llm.generate(prompt[-left:], SamplingParams(max_tokens=4, seed=1))
    body = {"prompt": prompt, "truncate_prompt_tokens": keep, "max_tokens": 4, "seed": 1, "echo": True}
    whole = server.post(COMPLETIONS, body).json()
    assert whole["usage"]["prompt_tokens"] == left
    assert llm.tokenizer is not None
    assert whole["choices"][0]["text"] == llm.tokenizer.decode(prompt[-left:]) + expected.text


def test_a_prompt_is_cut_to_the_context(server: Running) -> None:
    body = {"prompt": [1] * (LONG + 500), "truncate_prompt_tokens": -1, "max_tokens": 5, "ignore_eos": True}
    assert server.post(COMPLETIONS, body).json()["usage"]["prompt_tokens"] == LONG - 5
    assert "max_tokens" in refusal(server, COMPLETIONS, {**body, "max_tokens": LONG})["message"]


# ---------------------------------------------------------------- names that mean nothing, or too much


@pytest.mark.parametrize("stream", [False, True])
def test_ignored_names_are_told(server: Running, stream: bool) -> None:
    body = {"messages": MESSAGES, "max_tokens": 1, "user": "me", "no_such_thing": 1, "stream": stream}
    assert server.post(CHAT, body).headers["x-ignored-params"] == "user, no_such_thing"
    del body["user"], body["no_such_thing"]
    assert "x-ignored-params" not in server.post(CHAT, body).headers
    assert server.post("/tokenize", {"prompt": "a", "what": 1}).headers["x-ignored-params"] == "what"


def test_a_constraint_is_refused(server: Running) -> None:
    body = {"messages": MESSAGES, "guided_regex": "[0-9]+"}
    assert refusal(server, CHAT, body)["param"] == "guided_regex"


def test_a_wrong_model(server: Running) -> None:
    for path, body in (
        (CHAT, {"messages": MESSAGES}),
        (COMPLETIONS, {"prompt": "a"}),
        ("/tokenize", {"prompt": "a"}),
        ("/detokenize", {"tokens": [1]}),
    ):
        response = server.post(path, {**body, "model": "\ud800other"})
        assert response.status_code == 404
        assert response.json()["error"]["type"] == "NotFoundError"
    assert server.get("/v1/models/other").status_code == 404


# ---------------------------------------------------------------- conversations


def test_parts_of_text_are_joined(server: Running, llm: LLM) -> None:
    parts = [{"type": "text", "text": "the"}, {"type": "text", "text": "cat"}]
    body = {"messages": [{"role": "user", "content": parts}]}
    ids = server.post("/tokenize", body).json()["tokens"]
    assert llm.tokenizer is not None
    assert ids == llm.tokenizer.encode_chat([{"role": "user", "content": "the\ncat"}])


@pytest.mark.parametrize("kind", ["image_url", "input_audio", "video_url", "\ud800" * 200], ids=ascii)
def test_other_parts_are_refused(server: Running, kind: str) -> None:
    part = {"type": kind, kind: {"url": "http://127.0.0.1:1/never-fetched"}}
    error = refusal(server, CHAT, {"messages": [{"role": "user", "content": [part]}]})
    assert error["param"] == "messages"
    assert f"type {kind[:80]!a} is not supported" in error["message"] or len(kind) > 80
    assert len(error["message"]) < 600


def test_contents_of_no_kind(server: Running) -> None:
    for content in (
        5,
        {"type": "text"},
        [5],
        [{"type": "text", "text": 5}],
        [{"text": "a"}],
        [{"type": "text"}],
    ):
        error = refusal(server, CHAT, {"messages": [{"role": "user", "content": content}]})
        assert error["message"].startswith("messages.0.content")


def test_a_message_can_be_gone_on_with(server: Running, llm: LLM) -> None:
    assert llm.tokenizer is not None
    messages = [*MESSAGES, {"role": "assistant", "content": "It is "}]
    prompt = llm.tokenizer.render_chat(MESSAGES) + "It is "
    ids = llm.tokenizer.encode(prompt, add_special_tokens=False)
    (expected,) = llm.generate(ids, SamplingParams(max_tokens=5, seed=1))
    body = {"messages": messages, "continue_final_message": True, "max_tokens": 5, "seed": 1}
    whole = server.post(CHAT, body).json()
    assert whole["usage"]["prompt_tokens"] == len(ids)
    assert whole["choices"][0]["message"] == {"role": "assistant", "content": expected.text}
    echoed = server.post(CHAT, {**body, "echo": True}).json()
    assert echoed["choices"][0]["message"]["content"] == "It is " + expected.text
    events = frames(server.post(CHAT, {**body, "echo": True, "stream": True}).content)
    text = "".join(event["choices"][0]["delta"]["content"] for event in events)
    assert text == "It is " + expected.text
    assert refusal(server, CHAT, {**body, "add_generation_prompt": True})["param"] == "continue_final_message"
    del messages[-1]["content"]
    assert "no text to go on with" in refusal(server, CHAT, body)["message"]


def test_without_a_generation_prompt(server: Running, llm: LLM) -> None:
    assert llm.tokenizer is not None
    body = {"messages": MESSAGES, "add_generation_prompt": False}
    expected = llm.tokenizer.encode_chat(MESSAGES, add_generation_prompt=False)
    assert server.post("/tokenize", body).json()["tokens"] == expected


def test_the_advice_of_the_makers_is_the_default(model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "greedy")
    (folder / "generation_config.json").write_text('{"do_sample": false}')
    with serving(folder) as server:
        body = {"prompt": "the cat", "max_tokens": 12, "seed": 1}
        answers = {
            server.post(COMPLETIONS, {**body, "seed": s}).json()["choices"][0]["text"] for s in range(3)
        }
        assert len(answers) == 1
        body["temperature"] = 1
        answers = {
            server.post(COMPLETIONS, {**body, "seed": s}).json()["choices"][0]["text"] for s in range(3)
        }
        assert len(answers) == 3


REVERSED = "{{ messages[0]['content'] | reverse }}{{ style }}"


def test_templates_of_requests_are_refused(server: Running) -> None:
    body = {"messages": MESSAGES, "chat_template": REVERSED}
    for path in (CHAT, "/tokenize"):
        assert refusal(server, path, body)["param"] == "chat_template"


def test_templates_of_operators_and_trusted_requests(model: Path) -> None:
    def shown(server: Running, **fields: Any) -> str:
        tokens = server.post("/tokenize", {"messages": MESSAGES, **fields}).json()["tokens"]
        text: str = server.post("/detokenize", {"tokens": tokens}).json()["prompt"]
        return text

    with serving(model, chat_template=REVERSED, trust_request_chat_template=True) as server:
        assert shown(server) == "tac eht"
        assert shown(server, chat_template_kwargs={"style": "!"}) == "tac eht!"
        assert shown(server, chat_template="{{ messages[0]['role'] }}") == "user"
        for template in ("{% for %}", "{{ 1 / 0 }}", "{{ raise_exception('no') }}", "{{ ''.__class__.x }}"):
            refusal(server, "/tokenize", {"messages": MESSAGES, "chat_template": template})


@pytest.mark.parametrize(
    "name", ["messages", "add_generation_prompt", "chat_template", "tokenize", "tools", "bos_token", "self"]
)
def test_the_template_gets_our_variables(server: Running, name: str) -> None:
    body = {"messages": MESSAGES, "chat_template_kwargs": {name: "other"}}
    error = refusal(server, CHAT, body)
    assert (error["param"], name in error["message"]) == ("chat_template_kwargs", True)


def test_a_template_that_refuses(model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "strict")
    template = "{% if messages[0]['role'] != 'user' %}{{ raise_exception('user first') }}{% endif %}"
    (folder / "chat_template.jinja").write_text(template + TINY_CHAT_TEMPLATE)
    with serving(folder) as server:
        error = refusal(server, CHAT, {"messages": [{"role": "system", "content": "a"}]})
        assert "user first" in error["message"]
        assert server.post(CHAT, {"messages": MESSAGES, "max_tokens": 1}).status_code == 200


# ---------------------------------------------------------------- tokens


def test_tokenize_and_back(server: Running, llm: LLM) -> None:
    assert llm.tokenizer is not None
    ids = llm.tokenizer.encode("the né")
    whole = server.post("/tokenize", {"prompt": "the né", "return_token_strs": True}).json()
    spelled = [llm.tokenizer.id_to_token(token) for token in ids]
    assert whole == {"count": len(ids), "max_model_len": LONG, "tokens": ids, "token_strs": spelled}
    assert server.post("/tokenize", {"prompt": "a"}).json()["token_strs"] is None
    assert server.post("/detokenize", {"tokens": ids}).json() == {"prompt": "the né"}
    assert server.post("/detokenize", {"tokens": []}).json() == {"prompt": ""}


@pytest.mark.parametrize(
    "tokens", [[331], [-1], [2**40], ["a"], [True], [0] * (7 * LONG + 1)], ids=lambda t: str(t)[:20]
)
def test_tokens_that_are_none(server: Running, tokens: list[Any]) -> None:
    assert refusal(server, "/detokenize", {"tokens": tokens})["param"] == "tokens"


def test_a_model_without_a_tokenizer(model: Path, tmp_path: Path) -> None:
    folder = copy_of(model, tmp_path / "bare")
    for file in ("tokenizer.json", "tokenizer_config.json"):
        (folder / file).unlink()
    with serving(folder) as server:
        body = {
            "prompt": [1, 2],
            "max_tokens": 3,
            "logprobs": 1,
            "return_token_ids": True,
            "ignore_eos": True,
        }
        (choice,) = server.post(COMPLETIONS, body).json()["choices"]
        assert (choice["text"], len(choice["token_ids"])) == ("", 3)
        assert choice["logprobs"]["tokens"] == [f"token_id:{token}" for token in choice["token_ids"]]
        assert len(frames(server.post(COMPLETIONS, {**body, "stream": True}).content)) == 3
        for path, needs in (
            (COMPLETIONS, {"prompt": "a"}),
            (COMPLETIONS, {**body, "echo": True}),
            (COMPLETIONS, {**body, "stop": "a"}),
            (CHAT, {"messages": MESSAGES}),
            ("/tokenize", {"prompt": "a"}),
            ("/detokenize", {"tokens": [1]}),
        ):
            assert "tokenizer" in refusal(server, path, needs)["message"]


# ---------------------------------------------------------------- without HTTP


def test_answers_without_http(server: Running) -> None:
    def ask(url: str, body: Any) -> tuple[int, dict[str, Any]]:
        found: tuple[int, dict[str, Any]] = server.on_loop(lambda: answer(server.runtime, url, body))
        return found

    for path, body in (
        (CHAT, {"messages": MESSAGES, "max_tokens": 5, "seed": 3}),
        (COMPLETIONS, {"prompt": ["a", "b"], "max_tokens": 5, "seed": 3, "logprobs": 1}),
    ):
        status, whole = ask(path, body)
        over_http = server.post(path, body).json()
        assert status == 200
        assert whole["choices"] == over_http["choices"]
        assert whole["usage"] == over_http["usage"]
        assert whole.keys() == over_http.keys()
        assert ask(path, {**body, "user": "me"})[1]["ignored_params"] == ["user"]
        for wrong in ({"temperature": "hot"}, {"model": "other"}, {"guided_regex": "a"}):
            response = server.post(path, {**body, **wrong})
            assert ask(path, {**body, **wrong}) == (response.status_code, response.json())
        assert ask(path, {**body, "stream": True})[1]["error"]["param"] == "stream"
    assert ask("/v1/embeddings", {})[0] == 404


def test_an_answer_without_http_can_be_cancelled(server: Running) -> None:
    async def leave() -> None:
        asking = asyncio.ensure_future(answer(server.runtime, COMPLETIONS, {"prompt": ["a", "b"], **ENDLESS}))
        while server.used_blocks() == 0:
            await asyncio.sleep(0.002)
        asking.cancel()
        with pytest.raises(asyncio.CancelledError):
            await asking

    with server.watched() as watch:
        server.on_loop(leave)
        server.wait_idle()
    assert watch.reasons == ["abort", "abort"]


# ---------------------------------------------------------------- the schema


def test_the_schema_declares_shapes_and_refusals(server: Running) -> None:
    schema = server.get("/openapi.json").json()
    for path in (CHAT, COMPLETIONS, "/tokenize", "/detokenize"):
        responses = schema["paths"][path]["post"]["responses"]
        assert {"200", "400", "401", "404", "429", "4XX", "500", "503"} <= responses.keys()
        assert "422" not in responses
    fields = schema["components"]["schemas"]["CompletionRequest"]["properties"]
    (number,) = (each for each in fields["temperature"]["anyOf"] if each["type"] != "null")
    assert number["minimum"] == 0


# ---------------------------------------------------------------- small requests that would cost everybody


def test_log_probabilities_of_prompts_are_bounded_in_all(server: Running) -> None:
    """Each answer would repeat those of its prompt."""
    body = {"prompt": [7] * 1000, "n": 128, "echo": True, "logprobs": 20, "max_tokens": 1}
    error = refusal(server, COMPLETIONS, body)
    assert error["param"] == "n"
    assert f"{128 * 1000 * 21} log-probabilities" in error["message"]


def test_no_room_for_the_least_tokens(server: Running) -> None:
    context = server.runtime.max_model_len
    error = refusal(server, COMPLETIONS, {"prompt": [1] * (context - 3), "min_tokens": 10})
    assert "min_tokens" in error["message"]


def test_a_body_of_too_many_values(server: Running) -> None:
    error = refusal(server, COMPLETIONS, {"prompt": [1] * ((1 << 20) + 2)})
    assert "values" in error["message"]
