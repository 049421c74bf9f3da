"""The `openai` client, as it comes, against our server: it must find everything it expects, and the same tokens
that the engine gives in process."""

from __future__ import annotations

import asyncio
import json
import re
from collections import defaultdict
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import openai
import pytest

import splitfuse
from serving import TINY_ENGINE, Running, serving, wait_until
from splitfuse import LLM, SamplingParams
from splitfuse.server.settings import Limits

pytestmark = pytest.mark.machine_independent

MESSAGES: list[Any] = [
    {"role": "system", "content": "the rules"},
    {"role": "user", "content": "Where is the cat?"},
]
PROMPTS = ["the cat", "a dog in the fog", "né 😀", "x"]
LONG = 8192  # tokens of context: an answer that long takes seconds


@pytest.fixture(scope="module")
def model(tiny_llama: Callable[..., Path]) -> Path:
    return tiny_llama(max_position_embeddings=LONG)


@pytest.fixture(scope="module")
def server(model: Path) -> Iterator[Running]:
    with serving(model, served_names=("tiny", "other/name")) as running:
        yield running


@pytest.fixture(scope="module")
def client(server: Running) -> Iterator[openai.OpenAI]:
    with server.openai() as client:
        yield client


@pytest.fixture(scope="module")
def llm(model: Path) -> Iterator[LLM]:
    with LLM(model, **TINY_ENGINE) as llm:
        yield llm


@pytest.fixture(autouse=True)
def idle(server: Running) -> Iterator[None]:
    """No test leaves a request or a block behind."""
    yield
    server.wait_idle()


# ---------------------------------------------------------------- models


def test_models(client: openai.OpenAI) -> None:
    assert [card.id for card in client.models.list()] == ["tiny", "other/name"]
    card = client.models.retrieve("other/name")
    assert (card.id, card.object, card.owned_by) == ("other/name", "model", "splitfuse")
    assert card.model_extra["max_model_len"] == LONG
    with pytest.raises(openai.NotFoundError):
        client.models.retrieve("gpt-4")


# ---------------------------------------------------------------- chat


def test_chat(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.chat(MESSAGES, SamplingParams(max_tokens=20, seed=5, ignore_eos=True))
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=20, seed=5, extra_body={"ignore_eos": True}
    )
    (choice,) = answer.choices
    assert (choice.message.role, choice.message.content) == ("assistant", expected.text)
    assert (choice.index, choice.finish_reason) == (0, "length")
    assert (answer.object, answer.model) == ("chat.completion", "tiny")
    assert answer.id.startswith("chatcmpl-")
    assert answer.usage is not None
    read = len(expected.prompt_token_ids)
    assert (answer.usage.prompt_tokens, answer.usage.completion_tokens) == (read, 20)
    assert answer.usage.total_tokens == read + 20


def test_the_fingerprint_tells_whose_numbers_an_answer_has(
    client: openai.OpenAI, model: Path, tiny_llama: Callable[..., Path]
) -> None:
    asked: dict[str, Any] = {"prompt": [1, 2], "max_tokens": 2, "seed": 1}

    def fingerprint(other: openai.OpenAI) -> str | None:
        return other.completions.create(model=other.models.list().data[0].id, **asked).system_fingerprint

    ours = fingerprint(client)
    assert ours is not None
    assert re.fullmatch(re.escape(f"splitfuse-{splitfuse.__version__}-") + "[0-9a-f]{8}", ours)
    chat: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 2}
    assert client.chat.completions.create(**chat).system_fingerprint == ours
    for stream in (
        client.chat.completions.create(**chat, stream=True, stream_options={"include_usage": True}),
        client.completions.create(model="tiny", **asked, stream=True),
    ):
        assert {chunk.system_fingerprint for chunk in stream} == {ours}
    for path, engine, same in (
        (model, {"threads": 2, "token_budget": 32}, True),
        (model, {"threads": 2, "pin_threads": True}, True),
        (model, {"dtype": "bfloat16"}, False),
        (model, {"kv_dtype": "int8"}, False),
        (model, {"quantize": "int8"}, False),
        (model, {"isa": "ref"}, False),
        (tiny_llama(), {}, False),
    ):
        with serving(path, engine=engine) as another, another.openai() as asking:
            assert (fingerprint(asking) == ours) == same, engine


def test_a_chat_may_take_the_rest_of_the_context(tiny_llama: Callable[..., Path]) -> None:
    with serving(tiny_llama(), engine={"max_model_len": 64}) as server, server.openai() as client:
        answer = client.chat.completions.create(
            model=server.model, messages=[{"role": "user", "content": "a"}], extra_body={"ignore_eos": True}
        )
        assert answer.usage is not None
        assert answer.usage.total_tokens == 64


def test_chat_stream(client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 20, "seed": 5}
    whole = client.chat.completions.create(**asked)
    chunks = list(
        client.chat.completions.create(**asked, stream=True, stream_options={"include_usage": True})
    )
    *content, last = chunks
    assert content[0].choices[0].delta.role == "assistant"
    assert content[0].choices[0].delta.content == ""
    assert all(c.choices[0].delta.role is None for c in content[1:])
    assert "".join(c.choices[0].delta.content or "" for c in content) == whole.choices[0].message.content
    reasons = [c.choices[0].finish_reason for c in content]
    assert reasons == [None] * (len(content) - 1) + [whole.choices[0].finish_reason]
    assert all(c.usage is None for c in content)
    assert last.choices == []
    assert last.usage is not None
    assert whole.usage is not None
    assert last.usage.completion_tokens == whole.usage.completion_tokens
    assert len({c.id for c in chunks}) == 1
    assert {c.object for c in chunks} == {"chat.completion.chunk"}


def test_the_streaming_helper_of_the_client(client: openai.OpenAI, llm: LLM) -> None:
    (free,) = llm.chat(MESSAGES, SamplingParams(max_tokens=8, seed=1))
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 8, "seed": 1}
    asked["extra_body"] = {"stop_token_ids": [free.token_ids[-1]]}
    with client.chat.completions.stream(**asked) as stream:
        kinds = {event.type for event in stream}
        final = stream.get_final_completion()
    assert {"chunk", "content.delta", "content.done"} <= kinds
    whole = client.chat.completions.create(**asked)
    assert final.choices[0].message.content == whole.choices[0].message.content


def test_several_answers(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.chat(MESSAGES, SamplingParams(max_tokens=9, seed=5, n=3))
    asked: dict[str, Any] = {"model": "tiny", "messages": MESSAGES, "max_tokens": 9, "seed": 5, "n": 3}
    whole = client.chat.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == [0, 1, 2]
    texts = [answer.text for answer in expected.outputs]
    assert len(set(texts)) == 3
    assert [choice.message.content for choice in whole.choices] == texts
    pieces: dict[int, str] = defaultdict(str)
    for chunk in client.chat.completions.create(**asked, stream=True):
        (choice,) = chunk.choices
        pieces[choice.index] += choice.delta.content or ""
    assert [pieces[i] for i in range(3)] == texts


def test_chat_logprobs(client: openai.OpenAI, llm: LLM) -> None:
    params = SamplingParams(max_tokens=12, seed=3, logprobs=4)
    (expected,) = llm.chat(MESSAGES, params)
    assert expected.logprobs is not None
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 12,
        "seed": 3,
        "logprobs": True,
        "top_logprobs": 4,
    }
    whole = client.chat.completions.create(**asked).choices[0]
    assert whole.logprobs is not None
    content = whole.logprobs.content
    assert content is not None
    assert len(content) == 12
    for shown, entries in zip(content, expected.logprobs, strict=True):
        chosen, *_ = entries.values()
        assert (shown.token, shown.logprob) == (chosen.text, chosen.logprob)
        best = sorted((entry.logprob for entry in entries.values()), reverse=True)[:4]
        assert [top.logprob for top in shown.top_logprobs] == best
    streamed = [
        entry
        for chunk in client.chat.completions.create(**asked, stream=True)
        if chunk.choices[0].logprobs is not None
        for entry in chunk.choices[0].logprobs.content or ()
    ]
    assert streamed == content


def test_the_bytes_of_tokens_are_exact(client: openai.OpenAI, llm: LLM) -> None:
    """Also where a token is half a code point and has no text of its own."""
    tokenizer = llm.tokenizer
    assert tokenizer is not None
    bias = {str(token): 100 for token in tokenizer.encode("né 😀 the")}
    answer = client.chat.completions.create(
        model="tiny",
        messages=MESSAGES,
        max_tokens=40,
        seed=2,
        logit_bias=bias,
        logprobs=True,  # type: ignore[arg-type]
    )
    logprobs = answer.choices[0].logprobs
    assert logprobs is not None
    tokens = logprobs.content
    assert tokens is not None
    assert any(
        token.token == "\ufffd" and token.bytes is not None and len(token.bytes) == 1 for token in tokens
    )
    spelled = b"".join(bytes(token.bytes or ()) for token in tokens)
    assert spelled.decode(errors="replace") == answer.choices[0].message.content


def test_prompt_logprobs(client: openai.OpenAI, llm: LLM) -> None:
    (expected,) = llm.chat(MESSAGES, SamplingParams(max_tokens=1, prompt_logprobs=2))
    answer = client.chat.completions.create(
        model="tiny", messages=MESSAGES, max_tokens=1, extra_body={"prompt_logprobs": 2}
    )
    shown = (answer.model_extra or {})["prompt_logprobs"]
    assert expected.prompt_logprobs is not None
    assert shown[0] is None
    for entries, wanted in zip(shown[1:], expected.prompt_logprobs[1:], strict=True):
        assert wanted is not None
        assert {int(token): entry["logprob"] for token, entry in entries.items()} == {
            token: entry.logprob for token, entry in wanted.items()
        }
        ranks = [entry["rank"] for entry in entries.values()]
        assert {1, 2} <= set(ranks)
        assert ranks[0] >= 3 or len(ranks) == 2


# ---------------------------------------------------------------- completions


def test_completion_of_text_and_of_ids(client: openai.OpenAI, llm: LLM) -> None:
    assert llm.tokenizer is not None
    for prompt in PROMPTS:
        (expected,) = llm.generate(prompt, SamplingParams(max_tokens=10, seed=4))
        for asked in (prompt, llm.tokenizer.encode(prompt)):
            answer = client.completions.create(model="tiny", prompt=asked, max_tokens=10, seed=4)
            assert answer.object == "text_completion"
            assert answer.id.startswith("cmpl-")
            assert answer.choices[0].text == expected.text
            assert answer.choices[0].finish_reason == expected.finish_reason


def test_a_completion_has_sixteen_tokens_by_default(client: openai.OpenAI) -> None:
    answer = client.completions.create(model="tiny", prompt="a", extra_body={"ignore_eos": True})
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


@pytest.mark.parametrize("as_ids", [False, True])
def test_many_prompts_and_answers(client: openai.OpenAI, llm: LLM, as_ids: bool) -> None:
    expected = llm.generate(PROMPTS, SamplingParams(max_tokens=8, seed=9, n=2))
    texts = [answer.text for output in expected for answer in output.outputs]
    assert llm.tokenizer is not None
    prompts: Any = [llm.tokenizer.encode(p) for p in PROMPTS] if as_ids else PROMPTS
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompts, "max_tokens": 8, "seed": 9, "n": 2}
    whole = client.completions.create(**asked)
    assert [choice.index for choice in whole.choices] == list(range(8))
    assert [choice.text for choice in whole.choices] == texts
    pieces: dict[int, str] = defaultdict(str)
    reasons: dict[int, str | None] = {}
    options = {"include_usage": True}
    for chunk in client.completions.create(**asked, stream=True, stream_options=options):
        for choice in chunk.choices:
            pieces[choice.index] += choice.text
            reasons[choice.index] = choice.finish_reason
        usage = chunk.usage
    assert [pieces[i] for i in range(8)] == texts
    assert [reasons[i] for i in range(8)] == [choice.finish_reason for choice in whole.choices]
    assert usage is not None
    assert whole.usage is not None
    assert usage.prompt_tokens == whole.usage.prompt_tokens == sum(len(o.prompt_token_ids) for o in expected)
    assert usage.completion_tokens == whole.usage.completion_tokens


@pytest.mark.parametrize("stream", [False, True])
def test_echo_with_logprobs(client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    params = SamplingParams(max_tokens=5, seed=1, logprobs=2, prompt_logprobs=2)
    (expected,) = llm.generate("the cat", params)
    answer = client.completions.create(
        model="tiny", prompt="the cat", max_tokens=5, seed=1, logprobs=2, echo=True, stream=stream
    )
    choices = [chunk.choices[0] for chunk in answer] if stream else [answer.choices[0]]
    assert "".join(choice.text for choice in choices) == "the cat" + expected.text
    shown: dict[str, list[Any]] = defaultdict(list)
    for choice in choices:
        for name, values in choice.logprobs.model_dump().items():
            shown[name] += values
    assert expected.prompt_logprobs is not None
    assert expected.logprobs is not None
    entries = [*expected.prompt_logprobs, *expected.logprobs]
    chosen = [next(iter(entry.values())) if entry is not None else None for entry in entries]
    assert shown["token_logprobs"] == [None if each is None else each.logprob for each in chosen]
    assert shown["tokens"][0] == "the"
    assert shown["tokens"][1:] == [each.text for each in chosen[1:] if each is not None]
    offsets = [sum(map(len, shown["tokens"][:i])) for i in range(len(chosen))]
    assert shown["text_offset"] == offsets
    assert shown["top_logprobs"][0] is None
    for top, each in zip(shown["top_logprobs"][1:], chosen[1:], strict=True):
        assert each is not None
        assert top[each.text] == each.logprob


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_of_no_tokens_scores_the_prompt(client: openai.OpenAI, llm: LLM, stream: bool) -> None:
    answer = client.completions.create(
        model="tiny", prompt=[5, 6, 7], max_tokens=0, logprobs=1, echo=True, stream=stream
    )
    (choice,) = [c for chunk in answer for c in chunk.choices] if stream else answer.choices
    assert llm.tokenizer is not None
    assert (choice.text, choice.finish_reason) == (llm.tokenizer.decode([5, 6, 7]), "length")
    assert len(choice.logprobs.token_logprobs) == 3
    if not stream:
        assert answer.usage.completion_tokens == 0


def test_stops(client: openai.OpenAI, llm: LLM) -> None:
    (free,) = llm.generate("the cat", SamplingParams(max_tokens=30, temperature=0, ignore_eos=True))
    assert llm.tokenizer is not None
    at = free.text.index(next(c for c in free.text[3:] if c.isascii() and c.isprintable()), 3)
    stop = free.text[at]
    asked: dict[str, Any] = {"model": "tiny", "prompt": "the cat", "max_tokens": 30, "temperature": 0}
    expected = free.text[: free.text.index(stop)]
    for value in (stop, [stop, "never said"]):
        choice = client.completions.create(**asked, stop=value, extra_body={"ignore_eos": True}).choices[0]
        assert (choice.text, choice.finish_reason) == (expected, "stop")
        assert (choice.model_extra or {})["stop_reason"] == stop
    kept = {"ignore_eos": True, "include_stop_str_in_output": True}
    assert client.completions.create(**asked, stop=stop, extra_body=kept).choices[0].text == expected + stop
    token = free.token_ids[4]
    by_id = {"ignore_eos": True, "stop_token_ids": [token], "return_token_ids": True}
    choice = client.completions.create(**asked, extra_body=by_id).choices[0]
    extra = choice.model_extra or {}
    assert extra["token_ids"] == free.token_ids[: free.token_ids.index(token) + 1]
    assert (choice.finish_reason, extra["stop_reason"]) == ("stop", token)


def test_cached_tokens_are_told(client: openai.OpenAI) -> None:
    prompt = [(7 * i) % 250 for i in range(100)]
    asked: dict[str, Any] = {"model": "tiny", "prompt": prompt, "max_tokens": 1}
    cached = []
    for salt in (None, None, "a tenant of its own"):
        usage = client.completions.create(**asked, extra_body={"cache_salt": salt}).usage
        assert usage is not None
        assert usage.prompt_tokens_details is not None
        cached.append(usage.prompt_tokens_details.cached_tokens)
    assert cached[0] == cached[2] == 0
    assert cached[1] is not None
    assert 0 < cached[1] < 100


# ---------------------------------------------------------------- errors


@pytest.mark.parametrize(
    ("changes", "param"),
    [
        ({"temperature": -1}, "temperature"),
        ({"max_tokens": -1}, "max_tokens"),
        ({"logprobs": True, "top_logprobs": 21}, "top_logprobs"),
        ({"messages": []}, "messages"),
        ({"response_format": {"type": "json_object"}}, "response_format"),
        ({"tools": [{"type": "function", "function": {"name": "f"}}]}, "tools"),
    ],
    ids=str,
)
def test_a_bad_request(client: openai.OpenAI, changes: dict[str, Any], param: str) -> None:
    with pytest.raises(openai.BadRequestError) as caught:
        client.chat.completions.create(**{"model": "tiny", "messages": MESSAGES, **changes})
    assert caught.value.param == param
    assert param in caught.value.message
    assert caught.value.body is not None


def test_an_unknown_model(client: openai.OpenAI) -> None:
    with pytest.raises(openai.NotFoundError) as caught:
        client.chat.completions.create(model="gpt-4", messages=MESSAGES)
    assert caught.value.type == "NotFoundError"
    assert caught.value.param == "model"


def test_too_many_requests(model: Path) -> None:
    limits = Limits(queued=2)
    with (
        ThreadPoolExecutor(1) as pool,
        serving(model, engine={"max_sequences": 1}, limits=limits) as server,
        server.openai() as client,
        client.completions.create(
            model=server.model, prompt="a", max_tokens=8000, stream=True, extra_body={"ignore_eos": True}
        ) as running,
    ):
        next(iter(running))
        waiting = client.with_options(timeout=0.1)
        with pytest.raises(openai.APITimeoutError):
            waiting.completions.create(model=server.model, prompt="a", max_tokens=4000)
        wait_until(lambda: server.runtime.queued == 0)  # it gave up, and so did we on it
        both: dict[str, Any] = {"model": server.model, "prompt": ["a", "b"], "max_tokens": 4}
        another = pool.submit(client.completions.create, **{**both, "prompt": "a"})
        wait_until(lambda: server.runtime.queued == 1)
        with server.watched() as watch:
            with pytest.raises(openai.RateLimitError) as caught:
                client.completions.create(**both)
            wait_until(lambda: "abort" in watch.reasons)  # the first of both had been let in
        with pytest.raises(openai.BadRequestError, match="at most 2 prompts"):
            client.completions.create(**{**both, "prompt": ["a"] * 3})
        running.close()
        assert another.result(60).choices[0].finish_reason == "length"
        assert int(caught.value.response.headers["retry-after"]) >= 1


def test_an_engine_that_fails(tiny_llama: Callable[..., Path]) -> None:
    """Before the first token a status says so, after it an error in the stream."""
    with serving(tiny_llama(max_position_embeddings=LONG), restarts=1) as server, server.openai() as client:
        asked: dict[str, Any] = {"model": server.model, "prompt": "a", "max_tokens": 4000, "stream": True}
        answers = iter(client.completions.create(**asked, extra_body={"ignore_eos": True}))
        next(answers)
        _break(server)
        with pytest.raises(openai.APIError, match="engine failed") as caught:
            list(answers)
        assert "secrets" not in str(caught.value)
        wait_until(lambda: server.runtime.ready)
        _break(server)
        with pytest.raises(openai.InternalServerError, match="engine failed"):
            client.completions.create(**asked)


class _Broken:
    def __init__(self, engine: Any) -> None:
        self._engine = engine

    def __getattr__(self, name: str) -> Any:
        return getattr(self._engine, name)

    def step(self, *_: Any) -> None:
        raise RuntimeError("the engine broke, and here are its secrets")


def _break(server: Running) -> None:
    server.scheduler.engine = _Broken(server.scheduler.engine)


# ---------------------------------------------------------------- leaving


def test_leaving_a_stream_frees_its_blocks(server: Running, client: openai.OpenAI) -> None:
    with server.watched() as watch:
        stream = client.chat.completions.create(
            model="tiny", messages=MESSAGES, stream=True, n=2, extra_body={"ignore_eos": True}
        )
        next(iter(stream))
        wait_until(lambda: server.used_blocks() > 0)
        stream.close()
        server.wait_idle()
    assert watch.reasons == ["abort", "abort"]


def test_leaving_an_answer_frees_its_blocks(server: Running) -> None:
    async def leave() -> None:
        async with server.async_openai() as client:
            asking = asyncio.create_task(
                client.completions.create(
                    model="tiny", prompt=["a", "b"], max_tokens=8000, extra_body={"ignore_eos": True}
                )
            )
            while server.used_blocks() == 0:
                await asyncio.sleep(0.002)
            asking.cancel()
            with pytest.raises(asyncio.CancelledError):
                await asking

    with server.watched() as watch:
        asyncio.run(leave())
        server.wait_idle()
    assert watch.reasons == ["abort", "abort"]


# ---------------------------------------------------------------- many at once


def test_64_at_once(server: Running, llm: LLM) -> None:
    prompts = [f"{i} the cat {'x' * (i % 7)}" for i in range(64)]
    params = [SamplingParams(max_tokens=8 + i % 9, seed=i) for i in range(64)]
    expected = [output.text for output in llm.generate(prompts, params)]

    async def ask(client: openai.AsyncOpenAI, i: int) -> str:
        asked: dict[str, Any] = {"model": "tiny", "prompt": prompts[i], "max_tokens": 8 + i % 9, "seed": i}
        if i % 2:
            return (await client.completions.create(**asked)).choices[0].text
        stream = await client.completions.create(**asked, stream=True)
        return "".join([chunk.choices[0].text async for chunk in stream])

    async def ask_all() -> list[str]:
        async with server.async_openai() as client:
            return await asyncio.gather(*(ask(client, i) for i in range(64)))

    assert asyncio.run(ask_all()) == expected


def test_company_changes_nothing(server: Running, client: openai.OpenAI) -> None:
    asked: dict[str, Any] = {
        "model": "tiny",
        "messages": MESSAGES,
        "max_tokens": 40,
        "seed": 11,
        "extra_body": {"return_token_ids": True, "ignore_eos": True},
    }

    def tokens(answer: Any) -> Any:
        return answer.choices[0].token_ids

    alone = tokens(client.chat.completions.create(**asked))

    async def among_others() -> Any:
        async with server.async_openai() as client:
            others = [
                client.completions.create(model="tiny", prompt=f"{i}" * (1 + 3 * i), max_tokens=50, seed=i)
                for i in range(32)
            ]
            answer, *_ = await asyncio.gather(client.chat.completions.create(**asked), *others)
            return tokens(answer)

    assert len(alone) == 40
    assert asyncio.run(among_others()) == alone


def test_text_is_sent_as_ascii(server: Running, llm: LLM) -> None:
    """Some clients cut a stream at every line separator that Unicode knows."""
    assert llm.tokenizer is not None
    bias = {str(token): 100 for token in llm.tokenizer.encode("\u2028")}
    # Any of its three bytes may come: so many that the three follow each other somewhere.
    body = {"prompt": "a", "logit_bias": bias, "max_tokens": 100, "n": 8, "temperature": 1.5, "stream": True}
    raw = server.post("/v1/completions", body).content
    assert raw.isascii()
    pieces = [json.loads(line[6:]) for line in raw.decode().splitlines() if line.startswith("data: {")]
    assert any("\u2028" in piece["choices"][0]["text"] for piece in pieces)
