"""How a server begins, fails, comes back, and ends."""

import contextlib
import json
import os
import re
import signal
import socket
import subprocess
import sys
import threading
import time
from pathlib import Path

import httpx
import openai
import pytest

from serving import PATIENCE, serving, wait_until
from splitfuse import StepPlan
from splitfuse.server.serve import _listen
from splitfuse.server.settings import Settings

pytestmark = pytest.mark.machine_independent


class Process:
    """`splitfuse serve` as an operator runs it, after `first`, which is Python."""

    def __init__(self, *arguments, first=""):
        code = f"{first}\nimport sys\nfrom splitfuse.cli import main\nsys.exit(main())"
        command = [sys.executable, "-c", code, "serve", *map(str, arguments)]
        self.process = subprocess.Popen(command, stderr=subprocess.PIPE, text=True)
        self.lines = []
        self._reader = threading.Thread(target=self._read, daemon=True)
        self._reader.start()

    def _read(self):
        for line in self.process.stderr:
            self.lines.append(line)

    @property
    def url(self):
        wait_until(lambda: self.lines or self.process.poll() is not None)
        return re.search(r"http://[\d.]+:\d+", self.lines[0])[0]

    def wait_ready(self):
        wait_until(lambda: any("serving" in line for line in self.lines))
        assert httpx.get(self.url + "/ready").status_code == 200

    def end(self):
        """The exit code, and what it printed."""
        code = self.process.wait(PATIENCE)
        self._reader.join(PATIENCE)
        return code, "".join(self.lines)


@contextlib.contextmanager
def process(*arguments, **options):
    served = Process(*arguments, **options)
    try:
        yield served
    finally:
        served.process.kill()
        served.process.wait()


SMALL = ("--port", 0, "--threads", 1, "--dtype", "float32", "--kv-memory", "16MiB", "--token-budget", 64)


_BODY = b'{"prompt": [1], "max_tokens": 9, "stream": true}'
ASKED = (
    b"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    b"Content-Length: %d\r\n\r\n%b" % (len(_BODY), _BODY)
)


def stream(url, tokens):
    body = {"prompt": [1, 2, 3], "max_tokens": tokens, "ignore_eos": True, "stream": True}
    return httpx.stream("POST", url + "/v1/completions", json=body, timeout=PATIENCE)


def counted(lines):
    """(tokens, whether it ended as it should) of a stream's lines."""
    found = [line for line in lines if line.startswith("data: ")]
    return sum('"finish_reason"' in line for line in found), bool(found) and found[-1] == "data: [DONE]"


# ---------------------------------------------------------------- the beginning


def test_what_can_not_be_loaded_is_one_line(tmp_path):
    with process(tmp_path / "nothing", *SMALL) as served:
        code, said = served.end()
    assert code == 2
    assert said.splitlines()[-1].startswith("splitfuse: error: ")
    assert "nothing" in said.splitlines()[-1]
    assert "Traceback" not in said


def test_a_port_that_is_taken_is_one_line(tiny_llama):
    with socket.create_server(("127.0.0.1", 0)) as other:
        port = other.getsockname()[1]
        with process(tiny_llama(), "--port", port) as served:
            code, said = served.end()
    assert code == 2
    assert f"can't listen on 127.0.0.1 port {port}" in said


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (("--drain-timeout", "-1"), "drain_timeout"),
        (("--port", "99999"), "port must be 0 to 65535"),
        (("--api-key", ""), "an API key is empty"),
        (("--policy", "fifo"), "invalid choice: 'fifo'"),
        (("--api-key-file", os.devnull), "holds no API key"),
    ],
)
def test_wrong_options_are_one_line(tiny_llama, arguments, message):
    with process(tiny_llama(), *arguments) as served:
        code, said = served.end()
    assert code == 2
    assert message in said
    assert len(said.splitlines()) == 1


def test_what_is_accepted_is_kept_alive_by_probes():
    with _listen(Settings("demo", port=0)) as listener:
        listener.setblocking(True)
        listener.listen()
        with socket.create_connection(listener.getsockname()), listener.accept()[0] as accepted:
            assert accepted.getsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE) == 1
            assert accepted.getsockopt(socket.IPPROTO_TCP, socket.TCP_KEEPIDLE) == 60


def open_files(soft, hard):
    return f"import resource; resource.setrlimit(resource.RLIMIT_NOFILE, ({soft}, {hard}))"


def test_it_may_have_as_many_connections_as_the_system_allows(tiny_llama):
    with process(tiny_llama(), *SMALL, "--max-queued", 300, first=open_files(200, 700)) as served:
        served.wait_ready()
        limits = Path(f"/proc/{served.process.pid}/limits").read_text()
    assert re.search(r"Max open files +700 +700 ", limits)
    assert "warning" not in "".join(served.lines)


def test_too_few_open_files_are_one_line(tiny_llama):
    options = ("--max-queued", 600, "--max-sequences", 40)
    with process(tiny_llama(), *SMALL, *options, first=open_files(200, 700)) as served:
        served.wait_ready()
        wait_until(lambda: any("warning" in line for line in served.lines))
        (line,) = [line for line in served.lines if "warning" in line]
    assert "may have 700 open files" in line
    assert "600 requests that wait and 40 that run can need 704" in line


def test_until_the_model_is_loaded_it_says_so(tiny_llama, monkeypatch):
    loading = threading.Event()
    from splitfuse.server.runtime import Runtime

    load = Runtime._load
    monkeypatch.setattr(Runtime, "_load", lambda self: (loading.wait(PATIENCE), load(self))[1])
    answers = []

    def look(url):
        answers.extend(httpx.get(url + path) for path in ("/health", "/ready"))
        answers.append(httpx.post(url + "/v1/completions", json={"prompt": "a"}))
        loading.set()

    found = {}
    create = socket.create_server

    def listen(*arguments, **options):
        listener = found["listener"] = create(*arguments, **options)
        url = f"http://127.0.0.1:{listener.getsockname()[1]}"
        threading.Thread(target=look, args=(url,)).start()
        return listener

    monkeypatch.setattr("serving.socket.create_server", listen)
    with serving(tiny_llama()) as server:
        assert server.get("/ready").status_code == 200
    assert [answer.status_code for answer in answers] == [503, 503, 503]
    assert all(answer.headers["retry-after"] == "1" for answer in answers)
    assert answers[2].json()["error"]["type"] == "ServiceUnavailableError"


# ---------------------------------------------------------------- the end


def test_sigterm_lets_what_runs_finish_and_takes_nothing_new(smollm2):  # a tiny model would have finished
    with process(smollm2, "--port", 0, "--threads", 1, "--kv-memory", "64MiB") as served:
        served.wait_ready()
        with stream(served.url, 300) as answer:
            lines = answer.iter_lines()
            first = [next(lines) for _ in range(4)]
            served.process.send_signal(signal.SIGTERM)
            wait_until(lambda: httpx.get(served.url + "/ready").status_code == 503)
            refused = httpx.post(served.url + "/v1/completions", json={"prompt": "a"})
            assert refused.status_code == 503
            assert httpx.get(served.url + "/health").status_code == 200
            assert counted([*first, *lines]) == (300, True)
        code, said = served.end()
    assert code == 0
    assert "1 requests may finish" in said


@pytest.mark.parametrize("signals", [1, 2])
def test_what_does_not_finish_in_time_is_cut(tiny_llama, signals):
    """After the drain timeout, or at the second signal."""
    with process(tiny_llama(), *SMALL, "--drain-timeout", 0.2 if signals == 1 else 60) as served:
        served.wait_ready()
        with stream(served.url, 480) as answer:
            lines = answer.iter_lines()
            next(lines)
            served.process.send_signal(signal.SIGSTOP)  # so that it can't finish before the signal is seen
            for _ in range(signals):
                served.process.send_signal(signal.SIGTERM)
                served.process.send_signal(signal.SIGCONT)
                time.sleep(0.15 if signals == 2 else 0)
            with contextlib.suppress(httpx.RemoteProtocolError):
                list(lines)
        began = time.monotonic()
        code, _ = served.end()
    assert code == 0
    assert time.monotonic() - began < 30


HANGING_STEP = "import time, splitfuse\nsplitfuse.Engine.step = lambda *_: time.sleep(1000)"
HANGING_LOAD = "import time\nfrom splitfuse import loader\nloader.load = lambda *_, **__: time.sleep(1000)"
FAILING_STEP = """
import splitfuse
def step(*_):
    raise RuntimeError("the kernel is on fire")
splitfuse.Engine.step = step
"""


def test_a_step_that_hangs_does_not_keep_it_from_ending(tiny_llama):
    with process(tiny_llama(), *SMALL, "--drain-timeout", 0.1, first=HANGING_STEP) as served:
        served.wait_ready()
        with socket.create_connection(("127.0.0.1", int(served.url.rpartition(":")[2]))) as client:
            client.sendall(ASKED)
            wait_until(lambda: httpx.get(served.url + "/load").json()["server_load"] == 1)
            served.process.send_signal(signal.SIGTERM)
            code, said = served.end()
    assert code == 1
    assert "splitfuse: error: a step of the engine has not ended within 5 s: ending without it" in said


def test_loading_does_not_keep_it_from_ending(tiny_llama):
    with process(tiny_llama(), *SMALL, first=HANGING_LOAD) as served:
        wait_until(lambda: httpx.get(served.url + "/health").status_code == 503)
        served.process.send_signal(signal.SIGTERM)
        code, said = served.end()
    assert code == 1
    assert "splitfuse: error: the model is still being loaded: ending without it" in said


# ---------------------------------------------------------------- failures


def break_engine(server, *, hang=None, steps=None):
    """Replaces the engine under the scheduler by one whose step raises, or waits for the event `hang`, or with
    `steps`, a list that notes them, both."""
    real = server.scheduler.engine

    class Failing:
        def __getattr__(self, name):
            return getattr(real, name)

        def step(self, plan=None):
            if hang is not None:
                hang.wait(PATIENCE)
                if steps is None:
                    return real.step(plan)
                steps.append(plan)
            raise RuntimeError("the kernel is on fire")

    server.scheduler.engine = Failing()


def test_a_failed_engine_ends_its_requests_and_says_so(tiny_llama):
    with serving(tiny_llama(), engine={"max_sequences": 1}) as server:
        break_engine(server)
        client = server.openai()
        with pytest.raises(openai.InternalServerError, match="engine") as caught:
            client.completions.create(model=server.model, prompt="a", max_tokens=400)
        assert "fire" not in str(caught.value)
        assert server.get("/health").status_code == 503
        assert server.get("/ready").status_code == 503
        with pytest.raises(openai.APIStatusError) as caught:
            client.completions.create(model=server.model, prompt="a")
        assert caught.value.status_code == 503
        assert server.runtime.open_requests == 0


@pytest.mark.parametrize("restarts", [0, 1])
def test_when_it_has_failed_for_good_it_ends(tiny_llama, restarts):
    """Open requests are answered first; the code makes a supervisor start it anew."""
    with process(tiny_llama(), *SMALL, "--restart", restarts, first=FAILING_STEP) as served:
        served.wait_ready()
        for left in range(restarts, -1, -1):
            answer = httpx.post(served.url + "/v1/completions", json={"prompt": "a"}, timeout=PATIENCE)
            assert answer.status_code == 500
            if left:
                wait_until(lambda: httpx.get(served.url + "/ready").status_code == 200)
        code, said = served.end()
    assert code == 1
    assert "splitfuse: error: the engine has failed: the kernel is on fire" in said.splitlines()


def test_it_stays_up_if_told_to(tiny_llama):
    with process(tiny_llama(), *SMALL, "--stay-up", first=FAILING_STEP) as served:
        served.wait_ready()
        assert httpx.post(served.url + "/v1/completions", json={"prompt": "a"}).status_code == 500
        time.sleep(0.5)
        assert httpx.get(served.url + "/health").status_code == 503
        served.process.send_signal(signal.SIGTERM)
        assert served.end()[0] == 1


def test_one_failure_is_one_restart(tiny_llama, monkeypatch):
    """Those that waited are not run by the engine that has failed."""
    from splitfuse.server.runtime import Runtime

    loads, load = [], Runtime._load

    def counted_load(self):
        loads.append(served := load(self))
        return served

    monkeypatch.setattr(Runtime, "_load", counted_load)
    with serving(tiny_llama(), engine={"max_sequences": 1}, restarts=3) as server:
        steps, hang = [], threading.Event()
        break_engine(server, hang=hang, steps=steps)
        codes = []

        def ask():
            codes.append(server.post("/v1/completions", {"prompt": "a"}).status_code)

        asking = [threading.Thread(target=ask) for _ in range(4)]
        for thread in asking:
            thread.start()
        wait_until(lambda: server.runtime.queued == 3)
        hang.set()
        for thread in asking:
            thread.join(PATIENCE)
        assert codes == [500] * 4
        wait_until(lambda: server.get("/ready").status_code == 200)
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 200
        assert (len(steps), server.runtime.restarts, len(loads)) == (1, 1, 2)


def test_a_restart_that_fails_is_tried_again(tiny_llama, monkeypatch):
    from splitfuse.server.runtime import Runtime

    monkeypatch.setattr("splitfuse.server.runtime._PAUSE", 0.01)
    with serving(tiny_llama(), restarts=3) as server:
        load, tries = Runtime._load, []

        def sometimes(self):
            tries.append(1)
            if len(tries) < 3:
                raise MemoryError("not now")
            return load(self)

        monkeypatch.setattr(Runtime, "_load", sometimes)
        break_engine(server)
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 500
        wait_until(lambda: server.get("/ready").status_code == 200)
        assert server.runtime.restarts == 3
        break_engine(server)
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 500
        wait_until(lambda: server.runtime.given_up)


def test_an_observer_that_fails_shows(tiny_llama):
    """It is no step of the engine, but nothing is served any more."""

    class Broken:
        def on_step(self, step):
            raise ZeroDivisionError("in an observer")

        def on_end(self, request): ...

    with serving(tiny_llama()) as server:
        server.runtime.observers.append(Broken())
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 500
        wait_until(lambda: server.get("/health").status_code == 503)


def test_a_policy_that_holds_everything_back_shows(tiny_llama):
    with serving(tiny_llama(), health_timeout=0.3) as server:
        scheduler = server.scheduler
        scheduler._overridden, scheduler.plan = True, lambda views, limits: StepPlan()
        with socket.create_connection(("127.0.0.1", server.port)) as client:
            client.sendall(ASKED)
            wait_until(lambda: server.get("/health").status_code == 503)


def test_a_stream_is_told_of_the_failure(tiny_llama):
    with serving(tiny_llama()) as server:
        with stream(server.url, 480) as answer:
            lines = answer.iter_lines()
            next(lines)
            break_engine(server)
            rest = [line for line in lines if line.startswith("data: ")]
        assert json.loads(rest[-2][6:])["error"]["code"] == 500
        assert rest[-1] == "data: [DONE]"


def test_with_restarts_it_comes_back(tiny_llama):
    with serving(tiny_llama(), restarts=1) as server:
        expected = server.post("/v1/completions", {"prompt": "a", "temperature": 0, "max_tokens": 5}).json()
        break_engine(server)
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 500
        wait_until(lambda: server.get("/ready").status_code == 200)
        again = server.post("/v1/completions", {"prompt": "a", "temperature": 0, "max_tokens": 5}).json()
        assert again["choices"] == expected["choices"]
        assert server.runtime.restarts == 1
        break_engine(server)
        assert server.post("/v1/completions", {"prompt": "a"}).status_code == 500
        wait_until(lambda: server.get("/health").status_code == 503)


def test_a_step_that_hangs_shows(tiny_llama):
    with serving(tiny_llama(), health_timeout=0.3) as server:
        hang = threading.Event()
        break_engine(server, hang=hang)
        done = []
        asking = threading.Thread(
            target=lambda: done.append(server.post("/v1/completions", {"prompt": "a", "max_tokens": 3}))
        )
        asking.start()
        wait_until(lambda: server.get("/health").status_code == 503)
        assert "no step has ended" in server.get("/health").json()["status"]
        hang.set()
        asking.join(PATIENCE)
        assert done[0].status_code == 200
        assert server.get("/health").status_code == 200


def test_a_full_queue_is_429(tiny_llama):
    from splitfuse.server.settings import Limits

    with serving(tiny_llama(), engine={"max_sequences": 1}, limits=Limits(queued=2)) as server:
        hang = threading.Event()
        break_engine(server, hang=hang)
        body = {"prompt": "a", "max_tokens": 2}
        asking = [threading.Thread(target=server.post, args=("/v1/completions", body)) for _ in range(3)]
        asking[0].start()
        wait_until(lambda: server.runtime.open_requests == 1 and server.runtime.queued == 0)
        for thread in asking[1:]:
            thread.start()
        wait_until(lambda: server.runtime.queued == 2)
        refused = server.post("/v1/completions", body)
        assert (refused.status_code, refused.json()["error"]["type"]) == (429, "RateLimitError")
        assert int(refused.headers["retry-after"]) >= 1
        hang.set()
        for thread in asking:
            thread.join(PATIENCE)
        server.wait_idle()
