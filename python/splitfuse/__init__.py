"""splitfuse: LLM serving with Dynamic SplitFuse over a paged KV cache.

    from splitfuse import LLM, SamplingParams
    llm = LLM("demo")
    print(llm.chat([{"role": "user", "content": "Hello!"}], SamplingParams(max_tokens=64))[0].text)

`Engine` is the same thing as four verbs, put / step / query / flush; `Scheduler` runs requests on it.
"""

import os
from importlib import import_module
from typing import TYPE_CHECKING, Any

from . import _core
from ._core import (
    CheckpointError,
    ConfigError,
    Engine,
    EngineConfig,
    Error,
    InvalidArgument,
    ModelConfig,
    StateError,
    StepPlan,
)
from ._core import MemoryError as MemoryError  # not in __all__: a star import would hide the builtin

if TYPE_CHECKING:
    from ._http import ServerError
    from .llm import LLM
    from .mii import Pipeline, Response, pipeline
    from .remote import Client, client, serve
    from .request import Completion, Delta, Logprob, NotFinite, Request, RequestOutput, SamplingParams
    from .scheduler import QueueFull, Scheduler

__version__ = _core.__version__

__all__ = [
    "LLM",
    "CheckpointError",
    "Client",
    "Completion",
    "ConfigError",
    "Delta",
    "Engine",
    "EngineConfig",
    "Error",
    "InvalidArgument",
    "Logprob",
    "ModelConfig",
    "NotFinite",
    "Pipeline",
    "QueueFull",
    "Request",
    "RequestOutput",
    "Response",
    "SamplingParams",
    "Scheduler",
    "ServerError",
    "StateError",
    "StepPlan",
    "__version__",
    "client",
    "cmake_prefix",
    "pipeline",
    "serve",
]

# Imported when first used: the command line, and those who only drive an Engine, start faster.
_LAZY = {
    "LLM": "llm",
    "Client": "remote",
    "NotFinite": "request",
    "Completion": "request",
    "Delta": "request",
    "Logprob": "request",
    "Pipeline": "mii",
    "QueueFull": "scheduler",
    "Request": "request",
    "RequestOutput": "request",
    "Response": "mii",
    "SamplingParams": "request",
    "Scheduler": "scheduler",
    "ServerError": "_http",
    "client": "remote",
    "pipeline": "mii",
    "serve": "remote",
}


def __getattr__(name: str) -> Any:
    if name not in _LAZY:
        raise AttributeError(f"module 'splitfuse' has no attribute {name!r}")
    value = getattr(import_module(f".{_LAZY[name]}", __name__), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted({*globals(), *_LAZY})


def cmake_prefix() -> str:
    """The folder for CMAKE_PREFIX_PATH, so that find_package(splitfuse) finds the library of this
    installation."""
    return os.path.dirname(os.path.abspath(_core.__file__))
