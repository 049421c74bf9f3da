"""The application: routes, guards, and what a client is told when something is wrong."""

from __future__ import annotations

import asyncio
import logging
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager

from fastapi import FastAPI, Request, Response
from fastapi.exceptions import RequestValidationError
from starlette.exceptions import HTTPException
from starlette.middleware.cors import CORSMiddleware

from .. import __version__
from . import health, metrics, openai_routes, page
from .errors import ApiError
from .guard import Guard
from .protocol import invalid
from .reply import dumps
from .runtime import Runtime
from .settings import Settings

_log = logging.getLogger("splitfuse")


def create_app(settings: Settings) -> FastAPI:
    """An ASGI application with its `Runtime` at `app.state.runtime`. It answers while the model is still loaded;
    should that fail, `runtime.failure` says why."""
    runtime = Runtime(settings)
    app = FastAPI(
        title="splitfuse",
        version=__version__,
        description="OpenAI's API over one splitfuse engine.",
        docs_url=None,  # they would load scripts from elsewhere
        redoc_url=None,
        lifespan=_lifespan,
    )
    app.state.runtime = runtime
    app.include_router(health.router)
    app.include_router(openai_routes.router)
    metrics.install(app, runtime)
    page.install(app, runtime)
    app.add_exception_handler(ApiError, _on_api_error)
    app.add_exception_handler(RequestValidationError, _on_invalid)
    app.add_exception_handler(HTTPException, _on_http_error)
    app.add_exception_handler(Exception, _on_error)
    shows_page = settings.shows_ui
    app.add_middleware(Guard, settings=settings, is_open=lambda path: shows_page and page.is_open(path))
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=settings.cors_origins,
            allow_methods=["*"],
            allow_headers=["*"],
        )
    return app


@asynccontextmanager
async def _lifespan(app: FastAPI) -> AsyncIterator[None]:
    runtime: Runtime = app.state.runtime
    loading = asyncio.create_task(_load(runtime))
    yield
    loading.cancel()
    await runtime.stop()


async def _load(runtime: Runtime) -> None:
    try:
        await runtime.start()
    except Exception as error:
        _log.debug("loading failed", exc_info=True)
        runtime.failure = error


def _envelope(error: ApiError) -> Response:
    # In ASCII: a message may quote half of a surrogate pair, which UTF-8 can't hold.
    return Response(dumps(error.body), error.status, error.headers, "application/json")


async def _on_api_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, ApiError)
    return _envelope(error)


async def _on_invalid(_: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    return _envelope(invalid(error.errors()))


async def _on_http_error(_: Request, error: Exception) -> Response:
    assert isinstance(error, HTTPException)
    response = _envelope(ApiError(error.status_code, str(error.detail)))
    response.headers.update(error.headers or {})
    return response


async def _on_error(request: Request, error: Exception) -> Response:
    _log.error("%s %s failed", request.method, request.url.path, exc_info=error)
    return _envelope(ApiError(500, "the server failed on this request; its log says why"))
