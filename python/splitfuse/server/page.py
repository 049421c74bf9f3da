"""The page at /: a chat with the model, and SplitFuse at work beside it. Static files, and the feed of live.py."""

from __future__ import annotations

import functools
import hashlib
from importlib import resources
from pathlib import PurePath

from fastapi import FastAPI, Request, Response

from . import live
from .runtime import Runtime

_TYPES = {
    ".css": "text/css; charset=utf-8",
    ".html": "text/html; charset=utf-8",
    ".js": "text/javascript; charset=utf-8",
    ".svg": "image/svg+xml",
}
_HEADERS = {
    "Cache-Control": "no-cache",
    "Content-Security-Policy": (
        "default-src 'none'; script-src 'self'; style-src 'self'; img-src 'self'; connect-src 'self'; "
        "base-uri 'none'; form-action 'none'; frame-ancestors 'none'"
    ),
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
    "X-Frame-Options": "DENY",
}


def install(app: FastAPI, runtime: Runtime) -> None:
    """Adds the page and its feed, if the settings want it."""
    if not runtime.settings.shows_ui:
        return
    for path, file in _files().items():
        app.add_api_route(path, file.respond, methods=["GET", "HEAD"], include_in_schema=False)
    live.install(app, runtime)


def is_open(path: str) -> bool:
    """Whether `path` is one of the page's own files. They hold no secrets, and a browser can't send an API key
    with what a person opens: the page asks for the key and sends it with its requests."""
    return path in _files()


class _File:
    def __init__(self, name: str, content: bytes) -> None:
        self._content = content
        self._etag = f'"{hashlib.sha256(content).hexdigest()[:16]}"'
        self._type = _TYPES[PurePath(name).suffix]

    def respond(self, request: Request) -> Response:
        headers = {**_HEADERS, "ETag": self._etag}
        if self._etag in request.headers.get("if-none-match", ""):
            return Response(status_code=304, headers=headers)
        return Response(self._content, headers={**headers, "Content-Type": self._type})


@functools.cache
def _files() -> dict[str, _File]:
    """By path: index.html at /, the others below /static."""
    folder = resources.files(__package__) / "static"
    ours = [file for file in folder.iterdir() if PurePath(file.name).suffix in _TYPES]
    files = {f"/static/{file.name}": _File(file.name, file.read_bytes()) for file in ours}
    return {"/": files.pop("/static/index.html"), **files}
