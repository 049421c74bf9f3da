"""A real server among clients that die, stall, lie and flood. Afterwards it is healthy, holds no KV block, has not
grown, and every well-formed request was answered."""

import asyncio
import contextlib
import json
import random
import re
import signal
import socket
import subprocess
import sys
import time
from subprocess import PIPE
from urllib.parse import urlsplit

import aiohttp
import httpx
import psutil
import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from schemathesis import GenerationMode
from schemathesis.checks import not_a_server_error

from serving import PATIENCE, wait_until
from test_server_lifecycle import process

pytestmark = pytest.mark.machine_independent

KILLED = 200
QUEUED = 2000
STALL = 1  # seconds

# A client as an operating system sees it: it asks, hears its first token, says what it heard, and is killed.
CLIENT = """
import socket, sys
c = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
c.sendall(sys.stdin.buffer.read())
heard = b""
while b"data: {" not in heard and (more := c.recv(4096)):
    heard += more
print(heard.split(b"\\r\\n")[0].decode(), b"data: {" in heard, flush=True)
c.recv(1 << 30, socket.MSG_WAITALL)
"""


@pytest.fixture(scope="module")
def server(tiny_llama):
    arguments = (
        "--port",
        0,
        "--threads",
        1,
        "--dtype",
        "float32",
        "--token-budget",
        64,
        "--kv-memory",
        "1MiB",
    )
    with process(tiny_llama(), *arguments, "--max-model-len", 512, "--stall-timeout", STALL) as served:
        served.wait_ready()
        served.port = urlsplit(served.url).port
        served.resident = psutil.Process(served.process.pid)
        flood(served, 200)  # so that what it only ever takes once has been taken
        yield served


def load(server):
    return httpx.get(server.url + "/load", timeout=PATIENCE).json()


def is_well(server):
    """Idle, holding nothing, healthy, and still able to answer."""
    wait_until(lambda: load(server)["server_load"] == 0)
    facts = load(server)
    assert (facts["kv_blocks_used"], facts["running"], facts["waiting"]) == (0, 0, 0)
    assert httpx.get(server.url + "/health").status_code == 200
    answer = httpx.post(
        server.url + "/v1/completions", json={"prompt": [5, 6], "max_tokens": 4}, timeout=PATIENCE
    )
    assert answer.status_code == 200
    return True


def flood(server, count, **body):
    """`count` requests at once; the status of each."""
    body = {"prompt": [1, 2, 3], "max_tokens": 4, "ignore_eos": True, **body}

    async def all_of_them():
        connector = aiohttp.TCPConnector(limit=0)
        async with aiohttp.ClientSession(server.url, connector=connector) as session:

            async def one(number):
                async with session.post("/v1/completions", json={**body, "seed": number}) as answer:
                    made = await answer.json()
                    if answer.status == 200:
                        assert made["usage"]["completion_tokens"] == body["max_tokens"]
                    return answer.status

            return await asyncio.gather(*map(one, range(count)))

    return asyncio.run(all_of_them())


def aborted(server):
    """Answers that were broken off, of which the server knows."""
    told = httpx.get(server.url + "/metrics", timeout=PATIENCE).text
    return float(re.search(r'^vllm:request_success_total\{.*"abort".*\} (\S+)$', told, re.MULTILINE)[1])


def test_clients_killed_in_the_middle_of_their_streams(server):
    body = {"prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": True, "stream": True}
    command = [sys.executable, "-S", "-c", CLIENT, str(server.port)]
    before = aborted(server)
    for _ in range(KILLED // 20):
        clients = [subprocess.Popen(command, stdin=PIPE, stdout=PIPE) for _ in range(20)]
        for client in clients:
            client.stdin.write(request(json.dumps(body).encode()))
            client.stdin.close()
        for client in clients:
            assert client.stdout.readline() == b"HTTP/1.1 200 OK True\n"
            if client is clients[0]:
                assert load(server)["server_load"] > 0
            client.send_signal(signal.SIGKILL)
        for client in clients:
            client.wait()
            client.stdout.close()
    assert is_well(server)
    assert aborted(server) - before > KILLED / 2  # the others were fast, or heard when all was made


def request(body, path="/v1/completions"):
    head = f"POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\n"
    return f"{head}Content-Length: {len(body)}\r\n\r\n".encode() + body


def send(server, body, buffer=65536, segment=None):
    """A socket on which a request has been sent. Of a connection of small segments the other side's system keeps
    little that has not been read: kilobytes, not megabytes."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, buffer)
    if segment is not None:
        connection.setsockopt(socket.IPPROTO_TCP, socket.TCP_MAXSEG, segment)
    connection.settimeout(PATIENCE)
    connection.connect(("127.0.0.1", server.port))
    connection.sendall(request(body))
    return connection


def test_readers_that_do_not_read(server):
    """They are cut off; who reads is served meanwhile."""
    long = {"prompt": [1], "max_tokens": 400, "n": 6, "logprobs": 20, "ignore_eos": True, "stream": True}
    stalled = [send(server, json.dumps(long).encode(), 2048, segment=600) for _ in range(4)]
    wait_until(lambda: load(server)["server_load"] == 4)
    assert flood(server, 20) == [200] * 20
    wait_until(lambda: load(server)["server_load"] == 0)
    time.sleep(2 * STALL + 0.5)  # all may have been made in less than it takes to be called stalled
    for connection in stalled:
        with contextlib.suppress(ConnectionError), connection:
            got = b""
            while more := connection.recv(1 << 20):
                got += more
            assert got.startswith(b"HTTP/1.1 200 ")
            assert not got.endswith(b"0\r\n\r\n")  # no clean end
    assert is_well(server)


def test_connections_that_say_nothing_or_half_a_request(server):
    idle = [socket.create_connection(("127.0.0.1", server.port)) for _ in range(100)]
    for connection in idle[:50]:
        connection.sendall(b"POST /v1/completions HTTP/1.1\r\nHost: local")
    assert flood(server, 20) == [200] * 20
    for connection in idle:
        connection.close()
    assert is_well(server)


def test_bytes_that_are_no_requests(server):
    rng = random.Random(4)
    good = b'{"prompt": [1, 2, 3], "max_tokens": 2}'
    headers = {"Content-Type": "application/json"}
    seen = set()
    for _ in range(300):
        body = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        answer = httpx.post(
            server.url + "/v1/completions", content=bytes(body), headers=headers, timeout=PATIENCE
        )
        assert answer.status_code in (200, 400, 404), body
        seen.add(answer.status_code)
    assert {200, 400} <= seen
    for garbage in (b"\x16\x03\x01" + bytes(200), b"GET\r\n\r\n", b"\r\n" * 500, rng.randbytes(4000)):
        with socket.create_connection(("127.0.0.1", server.port)) as connection:
            connection.sendall(garbage)
    assert is_well(server)


def test_more_than_the_kv_cache_holds(server):
    """Each may fill it alone: they are preempted, and all are answered."""
    assert flood(server, 24, prompt=list(range(1, 101)), max_tokens=400) == [200] * 24
    assert is_well(server)


def test_two_thousand_at_once_and_a_storm_of_cancels(server):
    assert flood(server, QUEUED) == [200] * QUEUED
    before = server.resident.memory_info().rss
    broken_off = aborted(server)
    body = json.dumps(
        {"prompt": [1, 2], "max_tokens": 300, "ignore_eos": True, "stream": True, "n": 2}
    ).encode()
    for _ in range(5):
        connections = [send(server, body) for _ in range(100)]
        wait_until(lambda: load(server)["server_load"] > 0)
        for connection in connections:
            connection.close()
    assert flood(server, QUEUED) == [200] * QUEUED
    assert is_well(server)
    assert aborted(server) > broken_off
    assert server.resident.memory_info().rss < before + (16 << 20)


def test_anything_that_the_schema_allows_and_much_that_it_does_not(server):
    schema = schemathesis.openapi.from_url(server.url + "/openapi.json")
    seen = set()
    for found in schema.include(method="POST").get_all_operations():
        ask_about(found.ok(), seen)
    assert {200, 400} <= seen
    assert is_well(server)


def ask_about(operation, seen):
    cases = operation.as_strategy(GenerationMode.POSITIVE) | operation.as_strategy(GenerationMode.NEGATIVE)

    @settings(max_examples=60, deadline=None, database=None, suppress_health_check=list(HealthCheck))
    @given(cases)
    def ask(case):
        response = case.call(timeout=PATIENCE)
        seen.add(response.status_code)
        case.validate_response(response, checks=[not_a_server_error])

    ask()
