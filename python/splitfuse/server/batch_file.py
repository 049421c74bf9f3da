"""The two files of a batch, in OpenAI's format: a JSON object a line, asked in one and answered in the other."""

from __future__ import annotations

import fcntl
import json
import os
import uuid
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import IO, Any, BinaryIO

from .._core import InvalidArgument, StateError
from .errors import ApiError
from .guard import is_deep
from .settings import Limits

_FIELDS = {"custom_id", "method", "url", "body"}
_START = b'{"id": "batch_req_'  # of every line of results
_MOST_IGNORED = 8  # names of unknown fields that are kept
_QUOTED = 80  # characters of a value that a message repeats

Result = dict[str, Any]
"""A line of results: id, custom_id, response {status_code, request_id, body} and error, which is None exactly
where the request succeeded."""


@dataclass(frozen=True, slots=True)
class Ask:
    """A request, in order as far as the file goes."""

    custom_id: str
    url: str
    body: Mapping[str, Any]


def result(custom_id: str, status: int, body: Mapping[str, Any]) -> Result:
    """What became of a request: an HTTP status and a body, the answer or an error envelope."""
    name = uuid.uuid4().hex
    return {
        "id": f"batch_req_{name}",
        "custom_id": custom_id,
        "response": {"status_code": status, "request_id": f"req_{name}", "body": body},
        "error": None if status == 200 else body["error"],
    }


class _NotAsked(Exception):
    """A line that is no request, or none that its custom_id could tell from others."""

    def __init__(self, code: str, message: str, custom_id: str | None = None) -> None:
        super().__init__(message)
        self.code = code
        self.custom_id = custom_id

    def result(self, number: int) -> Result:
        """Holds the number of the line, by which a later run knows it."""
        said = {"code": self.code, "message": f"line {number}: {self}", "line": number}
        name = f"batch_req_{uuid.uuid4().hex}"
        return {"id": name, "custom_id": self.custom_id, "response": None, "error": said}


class Results:
    """The results of a batch: those that a file has already, and a place for more. No other process can have
    the file open as this.

    `path`: a regular file is gone on with; anything else, a pipe say, is only written to. Raises OSError,
    StateError if another run writes to it, InvalidArgument if it holds something else than results: such a
    file is left as it is.
    """

    def __init__(self, path: str | int) -> None:
        self.ids: set[str] = set()
        """Of requests that have a result."""
        self.lines: set[int] = set()
        """Numbers of lines that hold no request and were told so."""
        self.count = 0
        self.failed = 0
        regular = not isinstance(path, int) and (not os.path.exists(path) or os.path.isfile(path))
        mode = "a+b" if regular else "wb"
        self._file: IO[bytes] = open(path, mode, closefd=not isinstance(path, int))  # noqa: SIM115
        if regular:
            try:
                self._lock(path)
                self._read(path)
            except BaseException:
                self._file.close()
                raise
        self.kept = self.count
        """How many were there before."""

    def add(self, line: Result) -> None:
        """Writes a result, so that it outlives this process whatever becomes of it."""
        self._file.write(_encode(line) + b"\n")
        self._file.flush()
        self._count(line)

    def close(self) -> None:
        self._file.close()

    def _count(self, line: Result) -> None:
        self.count += 1
        self.failed += line["error"] is not None

    def _lock(self, path: str | int) -> None:
        try:
            fcntl.flock(self._file, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError:
            raise StateError(f"{path}: another run writes to it") from None

    def _read(self, path: str | int) -> None:
        self._file.seek(0)
        end = 0
        for number, line in enumerate(self._file, 1):
            whole = line.endswith(b"\n")
            if not whole and line[: len(_START)] == _START[: len(line)]:
                self._file.truncate(end)  # the last run was ended in the middle of it
                return
            try:
                entry = json.loads(line if whole else b"")
                custom_id, error = entry["custom_id"], entry["error"]
                refused = error is not None and "line" in error
                (self.lines if refused else self.ids).add(error["line"] if refused else custom_id)
            except (ValueError, RecursionError, KeyError, TypeError):
                raise InvalidArgument(
                    f"{path} is there already, and its line {number} is no result of a batch: name another file"
                ) from None
            self._count(entry)
            end += len(line)


class Asks:
    """What `results` lacks of a file of requests, read no faster than it is taken: requests to be run, and for
    a line that can't be, its result. Closes the file at its end."""

    def __init__(self, file: BinaryIO, results: Results, limits: Limits) -> None:
        self.ignored: set[str] = set()
        """Names of fields that mean nothing here, some of them."""
        self._file = file
        self._results = results
        self._most_bytes = limits.body_bytes
        self._most_depth = limits.json_depth
        self._seen: set[str] = set()

    def __iter__(self) -> Iterator[Ask | Result]:
        with self._file:
            for number, line in enumerate(_lines(self._file, self._most_bytes), 1):
                try:
                    entry = self._entry(line) if line.strip() else None
                except _NotAsked as error:
                    if number not in self._results.lines:
                        yield error.result(number)
                    continue
                if entry is not None and entry["custom_id"] not in self._results.ids:
                    yield self._ask(entry, is_deep(line, 1 + self._most_depth))

    def _entry(self, line: bytes) -> dict[str, Any]:
        """A line with a custom_id of its own; raises _NotAsked."""
        if len(line) > self._most_bytes:
            raise _NotAsked("line_too_long", f"longer than {self._most_bytes} bytes")
        try:
            entry = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise _NotAsked("invalid_json", f"not JSON: {error}") from None
        if not isinstance(entry, dict):
            raise _NotAsked("invalid_line", f"must be a JSON object, not {_quote(entry)}")
        custom_id = entry.get("custom_id")
        if not isinstance(custom_id, str) or not custom_id:
            said = f"must be text, not {_quote(custom_id)}" if "custom_id" in entry else "is missing"
            raise _NotAsked("invalid_custom_id", f"custom_id {said}")
        if custom_id in self._seen:
            raise _NotAsked("duplicate_custom_id", f"custom_id {_quote(custom_id)} came before", custom_id)
        self._seen.add(custom_id)
        return entry

    def _ask(self, entry: dict[str, Any], deep: bool) -> Ask | Result:
        if len(self.ignored) < _MOST_IGNORED:
            self.ignored |= entry.keys() - _FIELDS
        custom_id, method, url, body = (entry.get(name) for name in ("custom_id", "method", "url", "body"))
        assert isinstance(custom_id, str)
        try:
            if method != "POST":
                raise ApiError(400, f'method must be "POST", not {_quote(method)}', param="method")
            if not isinstance(url, str):
                raise ApiError(400, f"url must be text, not {_quote(url)}", param="url")
            if not isinstance(body, dict):
                raise ApiError(400, f"body must be a JSON object, not {_quote(body)}", param="body")
            if deep:
                raise ApiError(400, f"the body is nested more than {self._most_depth} deep", param="body")
        except ApiError as refusal:
            return result(custom_id, refusal.status, refusal.body)
        return Ask(custom_id, url, body)


def _lines(file: BinaryIO, most_bytes: int) -> Iterator[bytes]:
    """The lines of a file; of one longer than `most_bytes`, its beginning, a byte longer than that."""
    while line := file.readline(most_bytes + 1):
        rest = line
        while len(rest) > most_bytes and not rest.endswith(b"\n"):
            rest = file.readline(most_bytes + 1)
        yield line


def _encode(line: Result) -> bytes:
    try:
        return json.dumps(line, ensure_ascii=False).encode()
    except UnicodeEncodeError:  # half a surrogate pair, which JSON can say and UTF-8 can't
        return json.dumps(line).encode()


def _quote(value: Any) -> str:
    """A stranger's value in a message."""
    if isinstance(value, (dict, list)):
        return "an object" if isinstance(value, dict) else "a list"
    text = json.dumps(value)
    return text if len(text) <= _QUOTED else text[: _QUOTED - 3] + "..."
