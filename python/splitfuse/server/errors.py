"""Refusals as clients see them: an HTTP status and vLLM's error envelope."""

from __future__ import annotations

from http import HTTPStatus
from typing import Any

_TYPES = {
    400: "BadRequestError",
    401: "AuthenticationError",
    403: "PermissionDeniedError",
    404: "NotFoundError",
    408: "RequestTimeoutError",
    413: "RequestTooLargeError",
    422: "UnprocessableEntityError",
    429: "RateLimitError",
    431: "RequestTooLargeError",
    500: "InternalServerError",
    501: "NotImplementedError",
    503: "ServiceUnavailableError",
}
MAX_MESSAGE = 1000
"""Characters of a message: what a client sent may be quoted in it, and must not come back tenfold."""


class ApiError(Exception):
    """A request is refused, or has failed, with this status. `param`: the field at fault."""

    def __init__(
        self, status: int, message: str, *, param: str | None = None, retry_after: int | None = None
    ) -> None:
        super().__init__(message)
        self.status = status
        self.message = message if len(message) <= MAX_MESSAGE else message[: MAX_MESSAGE - 3] + "..."
        self.param = param
        self.retry_after = retry_after

    @property
    def body(self) -> dict[str, Any]:
        """{"error": {"message", "type", "param", "code"}}; `code` is the status."""
        kind = _TYPES.get(self.status, HTTPStatus(self.status).phrase)
        error = {"message": self.message, "type": kind, "param": self.param, "code": self.status}
        return {"error": error}

    @property
    def headers(self) -> dict[str, str]:
        return {} if self.retry_after is None else {"Retry-After": str(self.retry_after)}
