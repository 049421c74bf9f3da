"""What every HTTP request passes before the application sees it: keys, origins, sizes."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import re
from collections.abc import Callable, Iterable
from typing import Any
from urllib.parse import urlsplit

from starlette.types import ASGIApp, Message, Receive, Scope, Send

from .errors import ApiError
from .settings import Settings

_OPEN = frozenset({"/health", "/ready", "/ping"})
_REQUEST_ID = re.compile(rb"[A-Za-z0-9_.:/-]{1,128}")
_NOT_BRACKETS = bytes(set(range(256)) - set(b"[]{}"))
_LARGE = 1 << 18  # bytes of a body that are looked through on the loop's own thread


class Guard:
    """ASGI middleware. `is_open`: further paths that need no key. A request that passes has its whole body with
    it, so nothing below ever waits for a client to send."""

    def __init__(self, app: ASGIApp, settings: Settings, is_open: Callable[[str], bool]) -> None:
        self._app = app
        self.limits = settings.limits
        self._keys = [_digest(key.encode()) for key in settings.api_keys]
        self._is_open = is_open
        self.held = 0  # bytes of bodies that are arriving, or whose requests are open
        self._origins = frozenset(settings.cors_origins)
        # With a key, no page that lacks it can do anything; elsewhere the operator chose to be reached by name.
        self._local_names = settings.loopback and not settings.api_keys

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] == "lifespan":
            await self._app(scope, receive, send)
        elif scope["type"] == "http":
            await self._http(scope, receive, send)
        else:
            await send({"type": "websocket.close", "code": 1008})

    async def _http(self, scope: Scope, receive: Receive, send: Send) -> None:
        headers = scope["headers"]
        send = _echoing(_header(headers, b"x-request-id"), send)
        share = _Share(self)
        try:
            self._check_headers(headers)
            self._check_origin(headers)
            key = self._key_of(headers)
            if self._keys and key is None and scope["path"] not in _OPEN and not self._is_open(scope["path"]):
                await _respond(send, 401, {"error": "Unauthorized"}, {"WWW-Authenticate": "Bearer"})
                return
            if key is not None and len(self._keys) > 1:
                scope["splitfuse.tenant"] = key.hex()
            body = await self._body(headers, receive, share)
            if body is not None:  # else the client went away
                await self._run(scope, _replay(body, receive), send)
        except ApiError as refusal:
            await _respond(send, refusal.status, refusal.body, {**refusal.headers, "Connection": "close"})
        finally:
            share.give_back()

    async def _run(self, scope: Scope, receive: Receive, send: Send) -> None:
        try:
            await self._app(scope, receive, send)
        except asyncio.CancelledError:
            # Cut off, or out of time at shutdown. A polite close would wait for a reader who does not read.
            if (abort := scope.get("extensions", {}).get("splitfuse.abort")) is None:
                raise
            abort["call"]()
            await asyncio.sleep(0)

    def _check_headers(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        if sum(len(name) + len(value) for name, value in headers) > self.limits.header_bytes:
            raise ApiError(431, f"the headers have more than {self.limits.header_bytes} bytes")

    def _check_origin(self, headers: Iterable[tuple[bytes, bytes]]) -> None:
        """A page from elsewhere, open in a browser on this machine, must not drive the server behind its user's
        back: neither across origins, nor by a name of its own that it lets point here."""
        host = _header(headers, b"host").decode("latin-1")
        if self._local_names and host and not _is_local(host):
            raise ApiError(403, f"this server does not go by the name {host[:100]!r}: give it an API key")
        origin = _header(headers, b"origin").decode("latin-1")
        if not origin or origin in self._origins or "*" in self._origins:
            return
        if _netloc(origin) != host:
            raise ApiError(403, f"requests from pages of {origin[:100]!r} are not allowed: see --cors-origin")

    def _key_of(self, headers: Iterable[tuple[bytes, bytes]]) -> bytes | None:
        """The digest of the key that came along, if it is one of ours."""
        scheme, _, key = _header(headers, b"authorization").partition(b" ")
        given = _digest(key.strip())
        # All are compared, so that the time taken tells nothing.
        matches = [hmac.compare_digest(given, known) for known in self._keys]
        return given if scheme.lower() == b"bearer" and any(matches) else None

    async def _body(
        self, headers: Iterable[tuple[bytes, bytes]], receive: Receive, share: _Share
    ) -> bytes | None:
        """The whole body; None if the client went away."""
        limits = self.limits
        declared = _header(headers, b"content-length")
        if declared.isdigit() and int(declared[:20]) > limits.body_bytes:
            raise _too_large(limits.body_bytes)
        try:
            body = await asyncio.wait_for(_read(receive, limits.body_bytes, share), limits.body_seconds)
        except asyncio.TimeoutError:
            raise ApiError(408, f"the body did not come within {limits.body_seconds:g} s") from None
        if body is None:
            return None
        # As vLLM does it. A page may send text/plain, or no type at all, to another origin without asking first.
        if body and not _is_json(_header(headers, b"content-type")):
            raise ApiError(400, "the body's Content-Type must be application/json", param="Content-Type")
        if body.count(b",") > limits.json_values:
            raise ApiError(400, f"the body has more than {limits.json_values} values")
        if len(body) > _LARGE:
            deep = await asyncio.to_thread(is_deep, body, limits.json_depth)
        else:
            deep = is_deep(body, limits.json_depth)
        if deep:
            raise ApiError(400, f"the body is nested more than {limits.json_depth} deep")
        return body


class _Share:
    """What one request's body takes of the bytes that all open ones may have together."""

    def __init__(self, guard: Guard) -> None:
        self._guard = guard
        self._bytes = 0

    def take(self, count: int) -> None:
        """Raises ApiError 503 if there is no room."""
        if self._guard.held + count > self._guard.limits.open_bodies:
            raise ApiError(503, "too many bytes of requests are open: try again later", retry_after=1)
        self._bytes += count
        self._guard.held += count

    def give_back(self) -> None:
        self._guard.held -= self._bytes
        self._bytes = 0


async def _read(receive: Receive, most: int, share: _Share) -> bytes | None:
    parts: list[bytes] = []
    size = 0
    while True:
        message = await receive()
        if message["type"] == "http.disconnect":
            return None
        parts.append(message.get("body", b""))
        size += len(parts[-1])
        share.take(len(parts[-1]))
        if size > most:
            raise _too_large(most)
        if not message.get("more_body", False):
            return b"".join(parts)


def is_deep(body: bytes, depth: int) -> bool:
    """Whether JSON text nests arrays and objects more than `depth` deep. Each round takes the innermost level
    away at the speed of bytes.replace, so a hostile text costs no more than a long one."""
    outside = body.replace(b"\\\\", b"").replace(b'\\"', b"").split(b'"')[::2]  # of strings
    brackets = b"".join(outside).translate(None, _NOT_BRACKETS)
    for _ in range(depth):
        # Marked first, so that a level of one kind does not uncover one of the other in the same round.
        inner = brackets.replace(b"[]", b".").replace(b"{}", b".").replace(b".", b"")
        if len(inner) == len(brackets):  # empty, or not JSON, which the parser will say
            break
        brackets = inner
    return b"[]" in brackets or b"{}" in brackets or len(brackets) > 2 * depth


def _digest(key: bytes) -> bytes:
    return hashlib.sha256(key).digest()


def _header(headers: Iterable[tuple[bytes, bytes]], name: bytes) -> bytes:
    """The first of that name, or b""."""
    return next((value for key, value in headers if key == name), b"")


def _netloc(url: str) -> str | None:
    try:
        return urlsplit(url).netloc
    except ValueError:
        return None


def _is_json(content_type: bytes) -> bool:
    kind = content_type.partition(b";")[0].strip().lower()
    return kind == b"application/json" or (kind.startswith(b"application/") and kind.endswith(b"+json"))


def _is_local(host: str) -> bool:
    try:
        name = urlsplit(f"//{host}").hostname or ""
    except ValueError:  # "[", for one
        return False
    if name == "localhost" or name.endswith(".localhost"):
        return True
    try:
        return ipaddress.ip_address(name).is_loopback
    except ValueError:
        return False


def _too_large(most: int) -> ApiError:
    return ApiError(413, f"the body has more than {most} bytes")


def _replay(body: bytes, receive: Receive) -> Receive:
    """A `receive` that begins with the body that has been read already."""
    message: Message | None = {"type": "http.request", "body": body, "more_body": False}

    async def replayed() -> Message:
        nonlocal message
        if message is None:
            return await receive()
        first, message = message, None
        return first

    return replayed


def _echoing(request_id: bytes, send: Send) -> Send:
    """A `send` that gives the client its X-Request-Id back."""
    if not _REQUEST_ID.fullmatch(request_id):
        return send

    async def echoing(message: Message) -> None:
        if message["type"] == "http.response.start":
            message = {**message, "headers": [*message.get("headers", ()), (b"x-request-id", request_id)]}
        await send(message)

    return echoing


async def _respond(send: Send, status: int, body: Any, headers: dict[str, str]) -> None:
    content = json.dumps(body).encode()
    lines = {"Content-Type": "application/json", "Content-Length": str(len(content)), **headers}
    pairs = [(name.lower().encode(), value.encode()) for name, value in lines.items()]
    await send({"type": "http.response.start", "status": status, "headers": pairs})
    await send({"type": "http.response.body", "body": content})
