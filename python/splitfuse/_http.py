"""JSON over HTTP, as a client of a server of ours needs it: calls that can be broken off together, and errors that
say what the server said."""

from __future__ import annotations

import contextlib
import http.client
import json
import socket
import threading
from collections.abc import Generator, Iterator, Mapping
from typing import Any
from urllib.parse import urlsplit

from ._core import Error, InvalidArgument
from .scheduler import QueueFull

_CONNECT = 10.0  # seconds; an answer itself may take as long as it takes
_PROBE = 30  # seconds of silence after which the other side is asked whether it is still there
_MOST_SAID = 64 << 10  # bytes of an error that are read


class ServerError(Error):
    """A server can't be reached, or has failed, or refuses this client. `status`: what it answered, None if there
    was no answer."""

    def __init__(self, message: str, status: int | None = None) -> None:
        super().__init__(message)
        self.status = status


class Address:
    """A server's URL, with or without /v1 at its end, taken apart. Raises InvalidArgument."""

    def __init__(self, url: str) -> None:
        try:
            parts = urlsplit(url)
            self.host, self.port = parts.hostname, parts.port
        except ValueError as error:
            raise InvalidArgument(f"{url!r} is no URL: {error}") from None
        if parts.scheme not in ("http", "https") or not self.host:
            raise InvalidArgument(f"a server's URL begins with http:// or https://, unlike {url!r}")
        self.url = url.rstrip("/").removesuffix("/v1")
        self.path = parts.path.rstrip("/").removesuffix("/v1")
        self.secure = parts.scheme == "https"

    def connection(self) -> http.client.HTTPConnection:
        assert self.host is not None
        kind = http.client.HTTPSConnection if self.secure else http.client.HTTPConnection
        return kind(self.host, self.port, timeout=_CONNECT)


class Calls:
    """Calls to one server, each on a connection of its own. Safe to use from several threads; `break_off` ends
    all that are under way, and the server drops what it did for them. `patience`: seconds that the server may be
    silent; None: any number."""

    def __init__(self, address: Address, api_key: str | None = None, patience: float | None = None) -> None:
        self._address = address
        self._patience = patience
        self._headers = {"Content-Type": "application/json", "Connection": "close"}
        if api_key is not None:
            self._headers["Authorization"] = f"Bearer {api_key}"
        self._lock = threading.Lock()
        self._sockets: set[socket.socket] = set()
        self._broken_off = False

    def probe(self, path: str) -> None:
        """Raises unless the answer's status is 200."""
        with self._call("GET", path, None):
            pass

    def get(self, path: str) -> dict[str, Any]:
        with self._call("GET", path, None) as response:
            return self._json(response.read())

    def post(self, path: str, body: Mapping[str, Any]) -> dict[str, Any]:
        with self._call("POST", path, body) as response:
            return self._json(response.read())

    def stream(self, path: str, body: Mapping[str, Any]) -> Generator[dict[str, Any], None, None]:
        """The events of an answer as they come. Closing the generator ends the call."""
        with self._call("POST", path, body) as response:
            for line in response:
                if line.startswith(b"data: [DONE]"):
                    return
                if line.startswith(b"data:"):
                    event = self._json(line[5:])
                    if "error" in event:
                        raise ServerError(_said(event), 500)
                    yield event
        raise ServerError("the server broke its answer off")

    def break_off(self) -> None:
        with self._lock:
            self._broken_off = True
            for each in self._sockets:
                with contextlib.suppress(OSError):
                    each.shutdown(socket.SHUT_RDWR)

    @contextlib.contextmanager
    def _call(
        self, method: str, path: str, body: Mapping[str, Any] | None
    ) -> Iterator[http.client.HTTPResponse]:
        """A response whose status is 200. Raises InvalidArgument where the request is at fault, QueueFull,
        ServerError."""
        connection = self._address.connection()
        try:
            connection.connect()
            with self._open(connection.sock):
                content = None if body is None else json.dumps(body).encode()
                connection.request(method, self._address.path + path, content, self._headers)
                response = connection.getresponse()
                with response:
                    if response.status != 200:
                        raise _refusal(response.status, response.read(_MOST_SAID))
                    yield response
        except (OSError, http.client.HTTPException) as error:
            raise ServerError(
                f"no answer from {self._address.url}: {str(error) or type(error).__name__}"
            ) from error
        finally:
            connection.close()

    @contextlib.contextmanager
    def _open(self, sock: socket.socket) -> Iterator[None]:
        sock.settimeout(self._patience)
        sock.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
        for often in (socket.TCP_KEEPIDLE, socket.TCP_KEEPINTVL):
            sock.setsockopt(socket.IPPROTO_TCP, often, _PROBE)
        with self._lock:
            if self._broken_off:
                raise ServerError("the call was broken off")
            self._sockets.add(sock)
        try:
            yield
        finally:
            with self._lock:
                self._sockets.discard(sock)

    def _json(self, content: bytes) -> dict[str, Any]:
        try:
            value = json.loads(content)
        except ValueError:
            value = None
        if not isinstance(value, dict):
            raise ServerError(f"{self._address.url} answers, but not as a splitfuse server does", 200)
        return value


def _refusal(status: int, content: bytes) -> Error:
    try:
        said = _said(json.loads(content))
    except ValueError:
        said = http.client.responses.get(status, "")
    if status in (400, 413, 422):
        return InvalidArgument(said)
    if status == 429:
        return QueueFull(said)
    return ServerError(f"the server answers {status}: {said}", status)


def _said(body: Any) -> str:
    """The message of an error envelope."""
    error = body.get("error", body) if isinstance(body, dict) else body
    message = error.get("message", error) if isinstance(error, dict) else error
    return str(message)
