"""A real server among clients that die, stall, lie and flood. Afterwards it is healthy, holds no KV block, has not
grown, and every well-formed request was answered."""

import asyncio
import contextlib
import json
import random
import signal
import socket
import subprocess
import sys
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

# A client as an operating system sees it: it asks, hears the first bytes, says so, and is killed.
CLIENT = """
import socket, sys
c = socket.create_connection(("127.0.0.1", int(sys.argv[1])))
b = b'{"prompt": [1, 2, 3], "max_tokens": 400, "ignore_eos": true, "stream": true}'
c.sendall(b"POST /v1/completions HTTP/1.1\\r\\nHost: localhost\\r\\nContent-Length: %d\\r\\n\\r\\n" % len(b) + b)
c.recv(64)
print("heard", flush=True)
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
    with process(tiny_llama(), *arguments, "--max-model-len", 512, "--stall-timeout", 1) as served:
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


def test_clients_killed_in_the_middle_of_their_streams(server):
    for _ in range(KILLED // 20):
        clients = [
            subprocess.Popen([sys.executable, "-S", "-c", CLIENT, str(server.port)], stdout=subprocess.PIPE)
            for _ in range(20)
        ]
        for client in clients:
            assert client.stdout.readline() == b"heard\n"
            client.send_signal(signal.SIGKILL)
        for client in clients:
            client.wait()
            client.stdout.close()
    assert is_well(server)


def send(server, body, **options):
    """A socket on which a request has been sent."""
    connection = socket.socket()
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, options.pop("buffer", 65536))
    connection.settimeout(PATIENCE)
    connection.connect(("127.0.0.1", server.port))
    head = f"POST /v1/completions HTTP/1.1\r\nHost: localhost\r\nContent-Length: {len(body)}\r\n\r\n"
    connection.sendall(head.encode() + body)
    return connection


def test_readers_that_do_not_read(server):
    """They are cut off; who reads is served meanwhile."""
    long = {"prompt": [1], "max_tokens": 400, "n": 6, "logprobs": 20, "ignore_eos": True, "stream": True}
    stalled = [send(server, json.dumps(long).encode(), buffer=2048) for _ in range(4)]
    assert flood(server, 20) == [200] * 20
    wait_until(lambda: load(server)["server_load"] == 0)
    for connection in stalled:
        with contextlib.suppress(ConnectionError), connection:
            got = b""
            while more := connection.recv(1 << 20):
                got += more
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
    for _ in range(300):
        body = bytearray(good)
        for _ in range(rng.randint(1, 4)):
            body[rng.randrange(len(body))] = rng.randrange(256)
        answer = httpx.post(server.url + "/v1/completions", content=bytes(body), timeout=PATIENCE)
        assert answer.status_code in (200, 400, 404), body
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
    body = json.dumps({"prompt": [1, 2], "max_tokens": 300, "stream": True, "n": 2}).encode()
    for _ in range(5):
        for connection in [send(server, body) for _ in range(100)]:
            connection.close()
    assert flood(server, QUEUED) == [200] * QUEUED
    assert is_well(server)
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
