"""How the server does: for load balancers, supervisors and people."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter, Request, Response
from fastapi.responses import JSONResponse

from .. import __version__
from .runtime import Runtime

router = APIRouter(tags=["health"])


def _runtime(request: Request) -> Runtime:
    runtime: Runtime = request.app.state.runtime
    return runtime


def _answer(reason: str | None) -> Response:
    return Response() if reason is None else JSONResponse({"status": reason}, 503, {"Retry-After": "1"})


@router.api_route("/ping", methods=["GET", "POST"], include_in_schema=False)
@router.get("/health", response_class=Response)
def health(request: Request) -> Response:
    """200 while the engine can work. 503 while the model is loaded, after the engine has failed, and when work
    waits but no step has ended for a while."""
    return _answer(_runtime(request).sick())


@router.get("/ready", response_class=Response)
def ready(request: Request) -> Response:
    """200 while new requests are taken: healthy, and not shutting down."""
    runtime = _runtime(request)
    return _answer("shutting down" if runtime.draining else runtime.sick())


@router.get("/version")
def version() -> dict[str, str]:
    return {"version": __version__}


@router.get("/load")
def load(request: Request) -> dict[str, Any]:
    """Requests that are open, and how they and the KV cache stand in the engine."""
    runtime = _runtime(request)
    facts: dict[str, Any] = {"server_load": runtime.open_requests, "queued": runtime.queued}
    if (capacity := runtime.capacity) is not None:
        facts |= {
            "running": capacity.running,
            "waiting": capacity.waiting + runtime.queued,
            "kv_blocks_used": capacity.used_blocks,
            "kv_blocks_cached": capacity.cached_blocks,
            "kv_blocks_total": capacity.total_blocks,
        }
    return facts
