"""splitfuse run-batch: every line asked is answered once, whatever the lines are and whenever the run ends."""

import asyncio
import json
import os
import pty
import signal
import subprocess
import sys
import threading
import time

import pytest

from splitfuse import LLM, Error, InvalidArgument, SamplingParams, Scheduler, StateError, policies
from splitfuse.server import answers
from splitfuse.server.batch import answer_all
from splitfuse.server.batch import run_batch as run_batch_with
from splitfuse.server.batch_file import Ask, Asks, Results, result
from splitfuse.server.settings import Limits, Settings

pytestmark = pytest.mark.machine_independent
REQUEST = {"method": "POST", "url": "/v1/completions", "body": {"prompt": "the cat"}}


def request(custom_id, **changes):
    return json.dumps({"custom_id": custom_id, **REQUEST, **changes})


def write_lines(file, *lines):
    file.write_bytes(b"".join((x if isinstance(x, bytes) else x.encode()) + b"\n" for x in lines))
    return file


def read_lines(file):
    return [json.loads(line) for line in file.read_bytes().splitlines()]


def asks_of(file, results):
    return Asks(file.open("rb"), results, Limits(body_bytes=1000))


def run_all(asks, results, answer, limit=4):
    asyncio.run(answer_all(asks, results, answer, limit))


async def echo(url, body):
    return 200, {"said": body}


@pytest.fixture
def results(tmp_path):
    results = Results(str(tmp_path / "out.jsonl"))
    yield results
    results.close()


# ---------------------------------------------------------------- the file of requests


def test_requests_are_read(tmp_path, results):
    file = write_lines(
        tmp_path / "in", request("1"), "", request("2", body={"a": 1}, url="/v1/chat/completions")
    )
    assert list(asks_of(file, results)) == [
        Ask("1", "/v1/completions", {"prompt": "the cat"}),
        Ask("2", "/v1/chat/completions", {"a": 1}),
    ]


@pytest.mark.parametrize(
    ("line", "code", "said"),
    [
        (b"{", "invalid_json", "not JSON"),
        (b"\xff\xfe{}", "invalid_json", "not JSON"),
        (b"[" * 900, "invalid_json", "not JSON"),
        (b"[1]", "invalid_line", "a list"),
        (b"{}", "invalid_custom_id", "is missing"),
        (b'{"custom_id": 7}', "invalid_custom_id", "7"),
        (b'{"custom_id": ""}', "invalid_custom_id", '""'),
        (b"x" * 2000, "line_too_long", "1000"),
        (request("first").encode(), "duplicate_custom_id", '"first"'),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)
def test_a_line_that_is_no_request_is_told_so(tmp_path, results, line, code, said):
    file = write_lines(tmp_path / "in", request("first"), line, request("last"))
    first, bad, last = asks_of(file, results)
    assert (first.custom_id, last.custom_id) == ("first", "last")
    assert bad["custom_id"] == ("first" if code == "duplicate_custom_id" else None)
    assert bad["response"] is None
    assert (bad["error"]["code"], bad["error"]["line"]) == (code, 2)
    assert bad["error"]["message"].startswith("line 2: ")
    assert said in bad["error"]["message"]


@pytest.mark.parametrize(
    ("changes", "status", "param"),
    [
        ({"method": "GET"}, 400, "method"),
        ({"method": None}, 400, "method"),
        ({"url": ["/v1/completions"]}, 400, "url"),
        ({"url": None}, 400, "url"),
        ({"body": "text"}, 400, "body"),
        ({"body": {"messages": json.loads("[" * 64 + "]" * 64)}}, 400, "body"),
    ],
    ids=str,
)
def test_a_request_that_is_not_served_is_refused(tmp_path, results, changes, status, param):
    file = write_lines(tmp_path / "in", request("a", **changes))
    (refused,) = asks_of(file, results)
    assert refused["custom_id"] == "a"
    assert refused["response"]["status_code"] == status
    assert refused["response"]["body"]["error"] == refused["error"]
    assert refused["error"]["param"] == param


def test_fields_without_a_meaning_are_named(tmp_path, results):
    asks = asks_of(write_lines(tmp_path / "in", request("a", metadata={}), request("b", tag=1)), results)
    assert len(list(asks)) == 2
    assert asks.ignored == {"metadata", "tag"}


# ---------------------------------------------------------------- the file of results


def test_results_are_gone_on_with(tmp_path):
    file = write_lines(
        tmp_path / "in",
        request("a"),
        "{",
        request("a"),
        request("b"),
        request("c"),
        request("d", method="GET"),
    )
    path = str(tmp_path / "out")
    results = Results(path)
    lines = [line for line in asks_of(file, results) if isinstance(line, dict)]
    for line in (*lines, result("b", 200, {"x": "\ud800 ü"})):
        results.add(line)
    results.close()
    again = Results(path)
    assert (again.kept, again.count, again.failed) == (4, 4, 3)
    assert [ask.custom_id for ask in asks_of(file, again)] == ["a", "c"]
    again.add(result("a", 200, {}))
    again.close()
    assert [line["custom_id"] for line in read_lines(tmp_path / "out")] == [None, "a", "d", "b", "a"]


@pytest.mark.parametrize("cut", [1, 10, -1])
def test_a_torn_last_line_is_done_again(tmp_path, cut):
    path = tmp_path / "out"
    results = Results(str(path))
    for name in "ab":
        results.add(result(name, 200, {}))
    results.close()
    first, second = path.read_bytes().splitlines(keepends=True)
    path.write_bytes(first + second[:cut])
    again = Results(str(path))
    assert again.ids == {"a"}
    again.add(result("b", 200, {}))
    again.close()
    assert [line["custom_id"] for line in read_lines(path)] == ["a", "b"]


@pytest.mark.parametrize(
    "text",
    [
        "hello",
        "hello\n",
        request("a") + "\n",
        '{"custom_id": "a", "error": null}',
        "[]\n",
        '{"custom_id": [], "error": null}\n',
    ],
)
def test_a_file_of_something_else_is_left_as_it_is(tmp_path, text):
    path = tmp_path / "out"
    path.write_text(text)
    with pytest.raises(InvalidArgument, match="line 1"):
        Results(str(path))
    assert path.read_text() == text


def test_two_runs_do_not_write_to_one_file(tmp_path, results):
    with pytest.raises(StateError, match="another run"):
        Results(str(tmp_path / "out.jsonl"))


# ---------------------------------------------------------------- many at once


def test_all_are_answered(tmp_path, results):
    file = write_lines(tmp_path / "in", *[request(str(i), body={"i": i}) for i in range(100)], "{")
    run_all(asks_of(file, results), results, echo)
    lines = read_lines(tmp_path / "out.jsonl")
    assert (len(lines), results.count, results.failed) == (101, 101, 1)
    answers = {line["custom_id"]: line for line in lines}
    for i in range(100):
        line = answers[str(i)]
        assert set(line) == {"id", "custom_id", "response", "error"}
        assert line["response"]["status_code"] == 200
        assert line["response"]["body"] == {"said": {"i": i}}
        assert line["error"] is None
    assert len({line["id"] for line in lines}) == 101


def test_no_more_are_held_than_the_limit(results):
    """The input has no end: a reader that ran ahead would never come back."""
    taken, most = 0, 0

    def endless():
        nonlocal taken
        while True:
            taken += 1
            yield Ask(str(taken), "", {})

    async def answer(url, body):
        nonlocal most
        most = max(most, taken - results.count)
        if results.count == 500:
            raise ZeroDivisionError
        return 200, {}

    with pytest.raises(ZeroDivisionError):
        run_all(endless(), results, answer, limit=7)
    assert 2 <= most <= 7


def test_results_come_as_they_end(results):
    """The first request ends after all others have been written."""

    async def answer(url, body):
        while body["first"] and results.count < 20:
            await asyncio.sleep(0)
        return 200, {}

    asks = [Ask(str(i), "", {"first": i == 0}) for i in range(21)]
    run_all(asks, results, answer, limit=2)
    assert results.count == 21


def test_a_slow_source_holds_up_nobody(results):
    """What has been read is answered while the next line is waited for."""
    answered = threading.Event()

    def source():
        yield Ask("a", "", {})
        assert answered.wait(30)
        yield Ask("b", "", {})

    async def answer(url, body):
        answered.set()
        return 200, {}

    run_all(source(), results, answer)
    assert results.count == 2


def test_a_source_that_fails_ends_the_run(results):
    def source():
        yield Ask("a", "", {})
        raise OSError("the disk is gone")

    with pytest.raises(OSError, match="the disk is gone"):
        run_all(source(), results, echo)


# ---------------------------------------------------------------- the command


SMALL = ["--dtype", "float32", "--kv-memory", "16MiB", "--token-budget", "48", "--max-sequences", "16"]


@pytest.fixture(scope="module")
def model(tiny_llama):
    return str(tiny_llama())


def command(model, source, target, *args):
    words = [sys.executable, "-m", "splitfuse", "run-batch", model, "-i", source, "-o", target]
    return [*map(str, words), *SMALL, *args]


def run_batch(*args, **kwargs):
    return subprocess.run(command(*args), capture_output=True, text=True, timeout=120, check=False, **kwargs)


def start(*args):
    pipe = subprocess.PIPE
    return subprocess.Popen(command(*args), stdin=pipe, stdout=pipe, stderr=pipe, text=True)


GREEDY = {"max_tokens": 12, "temperature": 0, "ignore_eos": True}
PROMPTS = ["the cat", "over the hills", "and far away", "ü", "once"]
MESSAGES = [{"role": "user", "content": "the cat"}]


def test_answers_are_those_of_llm(model, tmp_path):
    params = SamplingParams(**GREEDY)
    with LLM(model, dtype="float32", kv_memory="16MiB", token_budget=48, verbose=False) as llm:
        outputs = llm.generate(PROMPTS, params)
        chat = llm.chat(MESSAGES, params)[0]
    chat_request = request("chat", url="/v1/chat/completions", body={"messages": MESSAGES, **GREEDY})
    source = write_lines(
        tmp_path / "in", *[request(p, body={"prompt": p, **GREEDY}) for p in PROMPTS], chat_request
    )
    done = run_batch(model, source, tmp_path / "out")
    assert done.returncode == 0, done.stderr
    assert done.stdout == ""
    assert "6 results" in done.stderr
    bodies = {line["custom_id"]: line["response"]["body"] for line in read_lines(tmp_path / "out")}
    assert {p: bodies[p]["choices"][0]["text"] for p in PROMPTS} == {o.prompt: o.text for o in outputs}
    assert bodies["chat"]["choices"][0]["message"]["content"] == chat.text
    usage = bodies["the cat"]["usage"]
    assert (usage["prompt_tokens"], usage["completion_tokens"]) == (len(outputs[0].prompt_token_ids), 12)


def test_bad_lines_cost_nobody_else(model, tmp_path):
    lines = {
        "good": request("good", body={"prompt": "the cat", **GREEDY}),
        None: "{",
        "no prompt": request("no prompt", body={"max_tokens": 3}),
        "wrong type": request("wrong type", body={"prompt": "a", "temperature": "hot"}),
        "out of range": request("out of range", body={"prompt": "a", "top_p": 2}),
        "too long": request("too long", body={"prompt": "a", "max_tokens": 10**6}),
        "deep": request("deep").replace('"the cat"', "[" * 900 + "]" * 900),
        "unknown model": request("unknown model", body={"prompt": "a", "model": "gpt"}),
        "unknown url": request("unknown url", url="/v1/embeddings"),
        "stream": request("stream", body={"prompt": "a", "stream": True}),
        "last": request("last", body={"prompt": "the cat", **GREEDY}),
    }
    source = write_lines(tmp_path / "in", *lines.values())
    done = run_batch(model, source, tmp_path / "out")
    assert done.returncode == 1
    assert "9 of them errors" in done.stderr
    assert "Traceback" not in done.stderr
    found = {line["custom_id"]: line for line in read_lines(tmp_path / "out")}
    assert set(found) == set(lines)
    assert found["good"]["error"] is None
    assert (
        found["last"]["response"]["body"]["choices"][0]["text"]
        == found["good"]["response"]["body"]["choices"][0]["text"]
    )
    for name in set(lines) - {"good", "last", None}:
        status = found[name]["response"]["status_code"]
        assert status == (404 if name.startswith("unknown") else 400), found[name]
        assert found[name]["error"]["message"]


def wait_for_results(path, count):
    until = time.monotonic() + 60
    while not path.exists() or path.read_bytes().count(b"\n") < count:
        assert time.monotonic() < until
        time.sleep(0.01)


@pytest.mark.parametrize("ending", ["kill", "kill and tear", "ctrl-c"])
def test_an_interrupted_run_is_gone_on_with(model, tmp_path, ending):
    """The first run is given half of the requests, so that it can't have done all before it is ended."""
    body = {"prompt": "the cat", "temperature": 0, "ignore_eos": True}
    requests = [request(str(i), body={**body, "max_tokens": 4 if i < 4 else 300}) for i in range(60)]
    source, target = write_lines(tmp_path / "in", *requests), tmp_path / "out"
    process = start(model, "-", target, "--limit", "4")
    process.stdin.write("".join(line + "\n" for line in requests[:30]))
    process.stdin.flush()
    wait_for_results(target, 3)
    process.send_signal(signal.SIGINT if ending == "ctrl-c" else signal.SIGKILL)
    _, said = process.communicate(timeout=60)
    before = target.read_bytes()
    assert before.endswith(b"\n")
    kept = before.count(b"\n")
    assert 3 <= kept <= 30
    if ending == "ctrl-c":
        assert process.returncode == 130
        assert f"interrupted with {kept} results" in said
        assert "the same command" in said
        assert "Traceback" not in said
    if ending == "kill and tear":
        kept -= 1
        target.write_bytes(before[:-20])
    done = run_batch(model, source, target)
    assert done.returncode == 0, done.stderr
    assert f"{kept} of them from before" in done.stderr
    assert target.read_bytes().startswith(b"".join(before.splitlines(keepends=True)[:kept]))
    lines = read_lines(target)
    assert sorted(line["custom_id"] for line in lines) == sorted(str(i) for i in range(60))
    texts = {line["response"]["body"]["choices"][0]["text"] for line in lines if int(line["custom_id"]) >= 4}
    assert len(texts) == 1


def test_standard_input_and_output(model, tmp_path):
    done = run_batch(model, "-", "-", input=request("a", body={"prompt": "the cat", **GREEDY}) + "\n{\n")
    assert done.returncode == 1
    assert {json.loads(line)["custom_id"] for line in done.stdout.strip().split("\n")} == {"a", None}


def test_ctrl_c_while_standard_input_is_waited_for(model, tmp_path):
    with start(model, "-", "-") as process:
        process.stdin.write(request("a", body={"prompt": "the cat", **GREEDY}) + "\n")
        process.stdin.flush()
        assert json.loads(process.stdout.readline())["custom_id"] == "a"
        process.send_signal(signal.SIGINT)
        said = process.stderr.read()
        assert process.wait(30) == 130
    assert "interrupted with 1 results in the output" in said
    assert "Traceback" not in said


def test_a_terminal_shows_how_fast_it_is(model, tmp_path):
    """Standard input stays open meanwhile, so that there is something to be shown."""
    fd, end = pty.openpty()
    body = {"prompt": "the cat", **GREEDY}
    words = command(model, "-", tmp_path / "out")
    with subprocess.Popen(words, stdin=subprocess.PIPE, stderr=end, text=True) as process:
        os.close(end)
        process.stdin.write(request("a", body=body) + "\n")
        process.stdin.flush()
        seen = b""
        while b"answer tokens/s" not in seen:
            seen += os.read(fd, 4096)
        process.stdin.close()
        assert process.wait(30) == 0
    os.close(fd)
    assert b"Answering" in seen


def test_help():
    done = subprocess.run(
        [sys.executable, "-m", "splitfuse", "run-batch", "--help"], capture_output=True, text=True, check=True
    )
    for word in ("examples:", "custom_id", "--limit", "--policy"):
        assert word in done.stdout


@pytest.mark.parametrize(
    ("args", "said"),
    [
        (["-i", "in", "-o", "in", "MODEL"], "in is input and output at once"),
        (["-i", "missing", "-o", "out", "MODEL"], "missing"),
        (["-i", "in", "-o", "no/such/folder", "MODEL"], "no/such/folder"),
        (["-i", "in", "-o", "other", "MODEL"], "other is there already"),
        (["-i", "in", "-o", "out", "/no/such/model"], "/no/such/model"),
        (["-i", "in", "-o", "out", "MODEL", "--limit", "0"], "--limit"),
        (["-i", "in", "-o", "out", "MODEL", "--policy", "magic"], "magic"),
        (["-i", "in", "MODEL"], "-o"),
    ],
    ids=str,
)
def test_an_error_is_one_line_and_exit_code_2(model, tmp_path, args, said):
    write_lines(tmp_path / "in", request("a"))
    (tmp_path / "other").write_text("hello\n")
    args = [model if a == "MODEL" else a for a in args]
    words = [sys.executable, "-m", "splitfuse", "run-batch", *args]
    done = subprocess.run(words, capture_output=True, text=True, cwd=tmp_path, check=False)
    assert done.returncode == 2
    assert done.stdout == ""
    assert done.stderr.count("\n") == 1
    assert said in done.stderr
    assert read_lines(tmp_path / "in") == [json.loads(request("a"))]
    assert (tmp_path / "other").read_text() == "hello\n"


# ---------------------------------------------------------------- failures

ENGINE = {"dtype": "float32", "kv_memory": "16MiB", "token_budget": 48, "max_sequences": 16}


def run_in_process(model, file, results):
    settings = Settings(model, engine=ENGINE)
    asks = asks_of(file, results)
    return asyncio.run(run_batch_with(settings, asks, results, limit=8, total=None, shown=False))


def test_an_engine_that_fails_ends_the_run(model, tmp_path, results, monkeypatch):
    """What has no answer then has no line either, and is left for another run."""

    class Failing(Scheduler):
        steps = 0

        def plan(self, views, limits):
            self.steps += 1
            if self.steps == 50:
                raise RuntimeError("the power is gone")

    monkeypatch.setattr(policies, "make_scheduler", lambda name, *args, **kwargs: Failing(*args, **kwargs))
    body = {"prompt": "the cat", "ignore_eos": True}
    asked = [request(str(i), body={**body, "max_tokens": 2 if i < 4 else 300}) for i in range(20)]
    with pytest.raises(Error, match="the power is gone"):
        run_in_process(model, write_lines(tmp_path / "in", *asked), results)
    assert {line["custom_id"] for line in read_lines(tmp_path / "out.jsonl")} == {"0", "1", "2", "3"}
    assert results.failed == 0


def test_a_mistake_of_ours_costs_one_request(model, tmp_path, results, monkeypatch, caplog):
    real = answers.answer

    async def answer(runtime, url, body):
        if body.get("user") == "unlucky":
            raise ZeroDivisionError
        return await real(runtime, url, body)

    monkeypatch.setattr(answers, "answer", answer)
    bodies = {
        "a": {"prompt": "the cat"},
        "b": {"prompt": "the cat", "user": "unlucky"},
        "c": {"prompt": "the"},
    }
    asked = [request(name, body=body) for name, body in bodies.items()]
    meter = run_in_process(model, write_lines(tmp_path / "in", *asked), results)
    status = {
        line["custom_id"]: line["response"]["status_code"] for line in read_lines(tmp_path / "out.jsonl")
    }
    assert status == {"a": 200, "b": 500, "c": 200}
    assert "ZeroDivisionError" in caplog.text
    assert meter.made > 2
