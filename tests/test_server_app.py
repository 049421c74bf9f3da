"""What every request passes before a route sees it, and what is said when something is wrong."""

import contextlib
import json
import socket
import time

import httpx
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serving import serving
from splitfuse.server.guard import is_deep
from splitfuse.server.settings import Limits

pytestmark = pytest.mark.machine_independent

KEYS = ("first-key", "second-key")


@pytest.fixture(scope="module")
def server(tiny_llama):
    limits = Limits(body_bytes=4096, head_seconds=1.0, body_seconds=1.0)
    with serving(tiny_llama(), limits=limits, ui=False) as running:
        yield running


@pytest.fixture(scope="module")
def guarded(tiny_llama):
    with serving(tiny_llama(), api_keys=KEYS, ui=True) as running:
        yield running


def talk(server, data, patience=30.0):
    """Sends bytes as they are; all that comes back until the connection ends."""
    with socket.create_connection(("127.0.0.1", server.port), timeout=patience) as connection:
        connection.sendall(data)
        got = b""
        while more := connection.recv(65536):
            got += more
        return got


def head(method="GET", path="/health", *lines):
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *lines, "", ""]).encode()


# ---------------------------------------------------------------- keys


@pytest.mark.parametrize(
    "path", ["/metrics", "/load", "/version", "/v1/models", "/openapi.json", "/live", "/nowhere"]
)
def test_every_path_asks_for_the_key(guarded, path):
    for headers in (
        {},
        {"Authorization": "Bearer wrong"},
        {"Authorization": KEYS[0]},
        {"Authorization": "Bearer"},
    ):
        answer = httpx.get(guarded.url + path, headers=headers)
        assert (answer.status_code, answer.json()) == (401, {"error": "Unauthorized"})
        assert answer.headers["www-authenticate"] == "Bearer"


@pytest.mark.parametrize("key", KEYS)
def test_any_of_the_keys_opens(guarded, key):
    assert httpx.get(guarded.url + "/load", headers={"Authorization": f"Bearer {key}"}).status_code == 200
    assert httpx.get(guarded.url + "/load", headers={"Authorization": f"bearer {key}"}).status_code == 200
    assert guarded.openai(api_key=key).models.list().data[0].id == guarded.model


@pytest.mark.parametrize("path", ["/health", "/ready", "/ping", "/"])
def test_these_ask_for_none(guarded, path):
    assert httpx.get(guarded.url + path).status_code == 200


# ---------------------------------------------------------------- who may call


def test_a_page_from_elsewhere_may_not_call(server):
    for origin in ("http://evil.example", "null", "http://localhost:1"):
        answer = httpx.get(server.url + "/load", headers={"Origin": origin})
        assert answer.status_code == 403
        assert "--cors-origin" in answer.json()["error"]["message"]
    assert httpx.get(server.url + "/load", headers={"Origin": server.url}).status_code == 200


def test_nor_by_a_name_that_it_lets_point_here(server):
    answer = httpx.get(server.url + "/load", headers={"Host": f"evil.example:{server.port}"})
    assert answer.status_code == 403
    assert "evil.example" in answer.json()["error"]["message"]
    for name in ("localhost", "127.0.0.1:99", "[::1]:80", "model.localhost"):
        assert httpx.get(server.url + "/load", headers={"Host": name}).status_code == 200


@pytest.mark.parametrize("line", ["Host: [", "Host: [::1", "Host: localhost\r\nOrigin: http://["])
def test_names_that_are_none(server, line, caplog):
    request = f"GET /load HTTP/1.1\r\n{line}\r\nConnection: close\r\n\r\n"
    assert talk(server, request.encode()).startswith(b"HTTP/1.1 403 ")
    assert not caplog.records


def test_with_a_key_any_name_will_do(guarded):
    headers = {"Host": "llm.example", "Authorization": f"Bearer {KEYS[0]}"}
    assert httpx.get(guarded.url + "/load", headers=headers).status_code == 200


def test_pages_that_the_operator_names_may_call(tiny_llama):
    with serving(tiny_llama(), cors_origins=("https://app.example",)) as server:
        answer = httpx.get(server.url + "/load", headers={"Origin": "https://app.example"})
        assert answer.status_code == 200
        assert answer.headers["access-control-allow-origin"] == "https://app.example"
        assert httpx.get(server.url + "/load", headers={"Origin": "https://other.example"}).status_code == 403
        asked = {"Origin": "https://app.example", "Access-Control-Request-Method": "POST"}
        assert httpx.options(server.url + "/v1/completions", headers=asked).status_code == 200


# ---------------------------------------------------------------- sizes


def test_a_body_too_large(server):
    answer = server.post("/v1/completions", {"prompt": "x" * 5000})
    assert (answer.status_code, answer.json()["error"]["code"]) == (413, 413)
    assert b" 413 " in talk(server, head("POST", "/v1/completions", f"Content-Length: {10**12}"))
    chunk = b"400\r\n" + b" " * 1024 + b"\r\n"
    assert b" 413 " in talk(server, head("POST", "/v1/completions", "Transfer-Encoding: chunked") + chunk * 5)


def test_headers_too_many_or_too_long(server):
    assert talk(server, head("GET", "/health", *(f"x{i}: y" for i in range(10_000)))).startswith(
        b"HTTP/1.1 431 "
    )
    assert talk(server, head("GET", "/health", "x: " + "y" * 100_000)).startswith(b"HTTP/1.1 431 ")
    assert b" 200 " in talk(
        server, head("GET", "/health", *(f"x{i}: y" for i in range(100)), "Connection: close")
    )


def test_headers_that_never_end(server):
    with socket.create_connection(("127.0.0.1", server.port), timeout=30) as connection:
        connection.sendall(b"GET /health HTTP/1.1\r\nHost: localhost\r\nx: ")
        sent = 0
        with contextlib.suppress(ConnectionError):
            while sent < 1 << 26:
                sent += connection.send(b"y" * 65536)
        assert sent < 1 << 24  # the other side has hung up


def test_a_head_or_body_that_does_not_come(server):
    began = time.monotonic()
    for data in (b"", b"GET /health HTTP/1.1\r\nHost: local"):
        with contextlib.suppress(ConnectionResetError):
            assert talk(server, data) == b""
    assert b" 408 " in talk(server, head("POST", "/v1/completions", "Content-Length: 100") + b"{")
    assert time.monotonic() - began > 2.5  # three deadlines of a second
    assert server.get("/health").status_code == 200


@pytest.mark.parametrize(
    "text", ["[" * 65 + "]" * 65, '{"a":' * 65 + "1" + "}" * 65, "[" * 4000, '[{"a":' * 33 + "[]" + "}]" * 33]
)
def test_a_body_too_deep(server, text):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.url + "/v1/completions", content=text.encode(), headers=headers)
    assert answer.status_code == 400
    assert "nested" in answer.json()["error"]["message"]


_LEAVES = st.none() | st.integers() | st.text(max_size=8) | st.sampled_from(["[[[", '"', "\\", "]}", '\\"['])
_JSON = st.recursive(
    _LEAVES,
    lambda inner: st.lists(inner, max_size=4) | st.dictionaries(st.text(max_size=4), inner, max_size=4),
)


def depth(value):
    if isinstance(value, dict):
        value = list(value.values())
    return 1 + max(map(depth, value), default=0) if isinstance(value, list) else 0


@given(_JSON, st.integers(1, 6), st.booleans())
def test_depth_is_that_of_the_value(value, most, ascii_only):
    body = json.dumps(value, ensure_ascii=ascii_only).encode("utf-8", "surrogatepass")
    assert is_deep(body, most) == (depth(value) > most)


# ---------------------------------------------------------------- what is said


@pytest.mark.parametrize(
    "content", [b"", b"{", b"not json", b"\xff\xfe", b'{"prompt": "\xff"}', b"[1, 2]", b'"text"', b"null"]
)
def test_what_is_no_request_is_refused_in_the_envelope(server, content):
    headers = {"Content-Type": "application/json"}
    answer = httpx.post(server.url + "/v1/completions", content=content, headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["code"], error["type"]) == (400, 400, "BadRequestError")
    assert error["message"]


@pytest.mark.parametrize("kind", [None, "text/plain", "application/x-www-form-urlencoded", "", "json"])
def test_a_body_that_is_not_called_json_is_refused_by_name(server, kind):
    headers = {} if kind is None else {"Content-Type": kind}
    answer = httpx.post(server.url + "/v1/completions", content=b'{"prompt": "a"}', headers=headers)
    error = answer.json()["error"]
    assert (answer.status_code, error["param"]) == (400, "Content-Type")
    assert "must be application/json" in error["message"]


@pytest.mark.parametrize(
    "kind", ["application/json; charset=utf-8", "Application/JSON", "application/vnd.api+json"]
)
def test_json_by_its_other_names(server, kind):
    content = b'{"prompt": [1], "max_tokens": 1}'
    answer = httpx.post(server.url + "/v1/completions", content=content, headers={"Content-Type": kind})
    assert answer.status_code == 200


def test_many_mistakes_are_not_all_told(server):
    answer = server.post("/v1/completions", {"prompt": "a", "stop_token_ids": ["x" * 30] * 100})
    assert answer.status_code == 400
    assert len(answer.content) < 3000


def test_unknown_paths_and_methods(server):
    answer = server.get("/v1/nothing")
    assert (answer.status_code, answer.json()["error"]["type"]) == (404, "NotFoundError")
    answer = httpx.delete(server.url + "/load")
    assert (answer.status_code, answer.json()["error"]["code"]) == (405, 405)
    assert httpx.get(server.url + "/").status_code == 404  # no page was wanted


def test_the_model_as_it_was_given_is_a_name_too(server):
    given = server.runtime.settings.model
    assert given not in server.runtime.names
    answer = server.post("/v1/completions", {"prompt": "a", "max_tokens": 1, "model": given})
    assert (answer.status_code, answer.json()["model"]) == (200, given)


def test_a_request_id_comes_back_if_it_is_sane(server):
    assert (
        httpx.get(server.url + "/load", headers={"X-Request-Id": "abc-1"}).headers["x-request-id"] == "abc-1"
    )
    for bad in ("a b", "x" * 200, "<script>"):
        assert "x-request-id" not in httpx.get(server.url + "/load", headers={"X-Request-Id": bad}).headers


def test_health_load_version(server):
    assert (server.get("/health").status_code, server.get("/health").content) == (200, b"")
    assert server.get("/ready").status_code == 200
    assert httpx.post(server.url + "/ping").status_code == 200
    assert server.get("/version").json()["version"]
    server.wait_idle()
    facts = server.get("/load").json()
    assert (facts["server_load"], facts["running"], facts["waiting"], facts["kv_blocks_used"]) == (0, 0, 0, 0)
    assert facts["kv_blocks_total"] > 0
