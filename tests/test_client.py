"""splitfuse.serve, splitfuse.client: MII's names over a real server in a process of its own."""

import collections
import contextlib
import dataclasses
import gc
import inspect
import os
import re
import signal
import subprocess
import sys
import threading
import time
import urllib.request

import psutil
import pytest

import splitfuse
from splitfuse import Error, InvalidArgument, QueueFull, ServerError, StateError
from splitfuse._http import Address
from splitfuse.mii import MiiParams
from splitfuse.remote import _arguments

pytestmark = pytest.mark.machine_independent
SMALL = {"dtype": "float32", "kv_memory": "16MiB", "token_budget": 48, "max_sequences": 16}
GREEDY = {"do_sample": False, "ignore_eos": True}
LONG = {"max_new_tokens": 400, **GREEDY}


@pytest.fixture(scope="module")
def pipe(tiny_llama):
    pipe = splitfuse.pipeline(tiny_llama(), verbose=False, **SMALL)
    yield pipe
    pipe.destroy()


@pytest.fixture(scope="module")
def server(tiny_llama):
    with splitfuse.serve(tiny_llama(), **SMALL) as client:
        yield client


def process_of(client):
    """The server's process."""
    return psutil.Process(client._process._process.pid)


def until(condition, seconds=60):
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline
        time.sleep(0.02)


def idle(client):
    """Whether the server has nothing under way."""
    with client._calls() as calls:
        return calls.get("/load")["server_load"] == 0


def ends(client):
    """Requests that have ended so far, by reason."""
    with urllib.request.urlopen(f"{client.url}/metrics") as response:
        text = response.read().decode()
    found = re.findall(
        r'^vllm:request_success_total\{.*finished_reason="(\w+)".*\} (\S+)$', text, re.MULTILINE
    )
    return collections.Counter({reason: float(count) for reason, count in found})


# ---------------------------------------------------------------- as pipeline


def test_parameters_are_pipelines():
    parameters = inspect.signature(splitfuse.Pipeline.__call__).parameters
    defaults = {n: p.default for n, p in parameters.items() if n not in ("self", "prompts", "streaming_fn")}
    assert defaults == {field.name: field.default for field in dataclasses.fields(MiiParams)}


@pytest.mark.parametrize(
    "params",
    [
        {"max_new_tokens": 9, **GREEDY},
        {"max_new_tokens": 9, "return_full_text": True, **GREEDY},
        {"max_length": 40, **GREEDY},
        {"max_length": 40, "max_new_tokens": 3, **GREEDY},
        {"max_new_tokens": 30, "stop": ["e", "a"], **GREEDY},
        {"max_new_tokens": 30, "min_new_tokens": 30, "stop": "e", **GREEDY},
        {"max_new_tokens": 9, "do_sample": True, "top_k": 1},
        {"max_new_tokens": 9, "do_sample": False, "temperature": 5.0, "top_k": 3},
    ],
    ids=str,
)
def test_answers_are_pipelines(server, pipe, params):
    prompts = ["the cat", "over the hills", "ü"]
    assert server.generate(prompts, **params) == pipe(prompts, **params)
    assert server.generate(prompts[0], **params) == pipe(prompts[0], **params)
    pieces = []
    assert server.generate(prompts[0], pieces.extend, **params) == pipe(prompts[0], **params)
    assert sum(piece.generated_length for piece in pieces) == pipe(prompts[0], **params)[0].generated_length


def test_an_answer_may_fill_the_context(server, pipe):
    answer = server.generate("the cat", **GREEDY)
    assert answer == pipe("the cat", **GREEDY)
    assert answer[0].prompt_length + answer[0].generated_length == server.max_model_len


def test_sampling_is_random(server):
    params = {"max_new_tokens": 12, "temperature": 2.0, "top_p": 1.0}
    assert len({server.generate("the cat", **params)[0].generated_text for _ in range(4)}) > 1


@pytest.mark.parametrize("full", [False, True])
def test_streaming_fn_gets_the_pieces(server, pipe, full):
    pieces = []
    params = {"max_new_tokens": 15, "return_full_text": full, **GREEDY}
    whole = server.generate("the cat", streaming_fn=lambda responses: pieces.extend(responses), **params)
    assert whole == pipe("the cat", **params)
    assert "".join(p.generated_text for p in pieces) == whole[0].generated_text
    assert sum(p.generated_length for p in pieces) == 15
    assert {p.prompt_length for p in pieces} == {whole[0].prompt_length}
    assert len(pieces) > 1
    assert [p.finish_reason for p in pieces] == [None] * (len(pieces) - 1) + ["length"]


def test_chat(server, pipe):
    messages = [{"role": "user", "content": "the cat"}]
    params = {"max_new_tokens": 12, **GREEDY}
    (output,) = pipe.llm.chat(messages, MiiParams(**params).sampling(None))
    answer = server.chat(messages, **params)
    assert (answer.generated_text, answer.generated_length) == (output.text, 12)
    assert answer.prompt_length == len(output.prompt_token_ids)
    pieces = []
    assert server.chat(messages, pieces.extend, **params) == answer
    assert "".join(p.generated_text for p in pieces) == output.text
    assert server.chat(messages, max_length=answer.prompt_length + 5, **GREEDY).generated_length == 5
    with pytest.raises(InvalidArgument, match="return_full_text"):
        server.chat(messages, return_full_text=True)


def test_many_prompts(server, pipe):
    prompts = [f"{i} times the cat" for i in range(300)]
    params = {"max_new_tokens": 2, **GREEDY}
    assert server.generate(prompts, **params) == pipe(prompts, **params)
    assert server.generate([]) == []


def test_several_threads(server, pipe):
    texts = [f"thread {i}" for i in range(8)]
    params = {"max_new_tokens": 20, **GREEDY}
    found = {}
    threads = [
        threading.Thread(target=lambda t=t: found.update({t: server.generate(t, **params)})) for t in texts
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == {text: pipe(text, **params) for text in texts}


# ---------------------------------------------------------------- a server that runs


def test_a_client_of_a_running_server(server):
    for url in (server.url, server.url + "/", server.url + "/v1"):
        client = splitfuse.client(url)
        assert (client.url, client.model) == (server.url, server.model)
        assert client.generate("the cat", max_new_tokens=5, **GREEDY) == server.generate(
            "the cat", max_new_tokens=5, **GREEDY
        )
        with pytest.raises(StateError, match="not started by this client"):
            client.terminate_server()
    with client:
        pass
    assert process_of(server).is_running()


@pytest.mark.parametrize(
    ("url", "error", "said"),
    [
        ("localhost:8000", InvalidArgument, "http://"),
        ("http://", InvalidArgument, "http://"),
        ("http://localhost:many", InvalidArgument, "many"),
        ("http://127.0.0.1:9", ServerError, "refused"),
    ],
)
def test_no_server_there(url, error, said):
    with pytest.raises(error, match=said):
        splitfuse.client(url)


def test_addresses():
    assert Address("https://a.b/c/v1/").url == "https://a.b/c"
    assert Address("https://a.b/c/v1/").path == "/c"
    assert Address("http://[::1]:80").host == "::1"


# ---------------------------------------------------------------- errors


def test_bad_calls(server):
    with pytest.raises(InvalidArgument, match="single prompt"):
        server.generate(["a", "b"], streaming_fn=print)
    with pytest.raises(InvalidArgument, match=r"^top_p"):
        server.generate(["a", "b"], top_p=2.0)
    with pytest.raises(TypeError, match="num_beams"):
        server.generate("a", num_beams=4)
    with pytest.raises(InvalidArgument, match="max_length"):
        server.generate("the cat", max_length=2)
    with pytest.raises(InvalidArgument, match=r"^prompt 1: max_length"):
        server.generate(["a", "the cat"], max_length=3)
    with pytest.raises(InvalidArgument, match=r"^(?!prompt).*context"):
        server.generate("a", max_new_tokens=10**6)
    with pytest.raises(InvalidArgument, match="context"):
        server.generate("a" * 1000)
    with pytest.raises(InvalidArgument, match=r"^prompt 1: .*context"):
        server.generate(["a", "b" * 1000, "c"], max_new_tokens=3)


@contextlib.contextmanager
def cancelling(client):
    """The block ends with an error. Then what runs is cancelled, and what has not begun never does."""
    before = ends(client)
    yield
    until(lambda: idle(client))
    new = ends(client) - before
    assert new["abort"] > 0
    assert new.total() < 2000


def test_a_streaming_fn_that_fails_cancels(server):
    with cancelling(server), pytest.raises(ZeroDivisionError):
        server.generate("a", lambda responses: 1 / 0, **LONG)


def test_one_that_fails_ends_the_others(server):
    with cancelling(server), pytest.raises(InvalidArgument, match=r"^prompt 300: "):
        server.generate(["the cat"] * 300 + ["x" * 1000] + ["the cat"] * 2000, **LONG)


def test_ctrl_c_cancels(server):
    def interrupt(*_):
        raise KeyboardInterrupt

    raised = threading.Event()

    def press():
        """As a person does: again, where Python lost it (an error inside a weakref's callback reaches nobody)."""
        until(lambda: not idle(server))
        while not raised.is_set():
            os.kill(os.getpid(), signal.SIGUSR1)
            raised.wait(5)

    handler = signal.signal(signal.SIGUSR1, interrupt)
    thread = threading.Thread(target=press)
    try:
        with cancelling(server):
            thread.start()
            with pytest.raises(KeyboardInterrupt):
                server.generate(["the cat"] * 2000, **LONG)
            raised.set()
    finally:
        raised.set()
        thread.join()
        signal.signal(signal.SIGUSR1, handler)
    assert server.generate("the cat", max_new_tokens=1)[0].generated_length == 1


def test_errors_are_of_one_family():
    for kind in (InvalidArgument, QueueFull, ServerError, StateError):
        assert issubclass(kind, Error)


# ---------------------------------------------------------------- the server's life


def test_a_key_is_asked_for(tiny_llama):
    with splitfuse.serve(tiny_llama(), api_key="secret", **SMALL) as client:
        assert client.generate("the cat", max_new_tokens=2, **GREEDY)[0].generated_length == 2
        for key in (None, "wrong"):
            with pytest.raises(ServerError, match="401") as caught:
                splitfuse.client(client.url, key)
            assert caught.value.status == 401
        assert splitfuse.client(client.url, "secret").model == client.model
        process = process_of(client)
        assert "secret" not in " ".join(process.cmdline())
        client.terminate_server()
        client.terminate_server()
        assert not process.is_running()
        with pytest.raises(StateError, match="terminated"):
            client.generate("the cat")


@pytest.mark.parametrize(
    ("model", "options", "said"),
    [
        ("/no/such/model", {}, "/no/such/model"),
        ("MODEL", {"wings": 2}, "--wings"),
        ("MODEL", {"kv_memory": "100TiB"}, "memory plan"),
    ],
)
def test_a_server_that_does_not_start_says_why(tiny_llama, model, options, said):
    with pytest.raises(ServerError, match=f"(?s)exit code 2: .*{said}"):
        splitfuse.serve(tiny_llama() if model == "MODEL" else model, **{**SMALL, **options})


def test_a_server_that_starts_too_slowly_is_ended(tiny_llama):
    before = set(psutil.Process().children(recursive=True))
    with pytest.raises(ServerError, match=r"not ready after 0\.01 s") as caught:
        splitfuse.serve(tiny_llama(), timeout=0.01, **SMALL)
    assert set(psutil.Process().children(recursive=True)) <= before
    del caught  # until here it held the frames in which the server was started


def test_a_port_in_use(tiny_llama, server):
    port = int(server.url.rpartition(":")[2])
    with pytest.raises(ServerError, match=r"(?i)in use"):
        splitfuse.serve(tiny_llama(), port=port, **SMALL)


def test_a_server_that_dies(tiny_llama):
    client = splitfuse.serve(tiny_llama(), **SMALL)

    def kill(responses):
        process_of(client).kill()

    with pytest.raises(ServerError, match=r"the server has ended, with exit code -9") as caught:
        client.generate("the cat", kill, **LONG)
    assert caught.value.status is None
    with pytest.raises(ServerError, match=r"the server has ended"):
        client.generate("the cat")
    client.terminate_server()


def test_a_forgotten_client_ends_its_server(tiny_llama):
    client = splitfuse.serve(tiny_llama(), **SMALL)
    process = process_of(client)
    del client
    gc.collect()
    assert not process.is_running()


PARENT = """
import sys, threading, splitfuse
held = []
def serve():
    held.append(splitfuse.serve(sys.argv[1], dtype="float32", kv_memory="16MiB", token_budget=48))
thread = threading.Thread(target=serve)  # the end of the thread that started it is not the end of the parent
thread.start()
thread.join()
print(held[0]._process._process.pid, held[0].generate("the cat", max_new_tokens=1)[0].generated_length, flush=True)
sys.stdin.read()
"""


@pytest.mark.parametrize("ending", ["kill -9", "its end"])
def test_no_server_outlives_its_parent(tiny_llama, ending):
    pipe = subprocess.PIPE
    parent = subprocess.Popen(
        [sys.executable, "-c", PARENT, tiny_llama()], stdin=pipe, stdout=pipe, text=True, env=os.environ
    )
    try:
        pid, made = map(int, parent.stdout.readline().split())
        assert made == 1
        server = psutil.Process(pid)
        assert server.is_running()
        if ending == "kill -9":
            parent.kill()
        else:
            parent.stdin.close()
        until(lambda: not server.is_running() or server.status() == psutil.STATUS_ZOMBIE)
        assert parent.wait(30) == (-9 if ending == "kill -9" else 0)
    finally:
        parent.kill()
        parent.wait()
        parent.stdin.close()
        parent.stdout.close()


def test_options_become_a_command_line():
    options = {"token_budget": 5, "ui": True, "prefix_caching": False, "isa": None, "cors_origin": ["a", "b"]}
    expected = ["--token-budget=5", "--ui", "--no-prefix-caching", "--cors-origin=a", "--cors-origin=b"]
    assert _arguments(options) == expected
