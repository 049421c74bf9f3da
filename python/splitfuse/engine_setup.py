"""From a model's name to its engine, loaded and told about."""

from __future__ import annotations

import logging
import os
import sys
from typing import TYPE_CHECKING, Any

from . import _core
from ._core import ConfigError, Engine, EngineConfig
from ._progress import byte_bar, on_terminal
from ._sizes import parse_bytes

if TYPE_CHECKING:
    from .loader import LoadedModel

_log = logging.getLogger("splitfuse")


def engine_config(
    *,
    device: str = "auto",
    dtype: str = "auto",
    quantize: str | None = None,
    threads: int | None = None,
    token_budget: int | str = "auto",
    max_step_tokens: int = 0,
    max_sequences: int = 256,
    max_model_len: int | None = None,
    kv_memory: int | str = "auto",
    kv_dtype: str = "auto",
    prefix_caching: bool = True,
    isa: str = "auto",
    pin_threads: bool = False,
) -> EngineConfig:
    """The native configuration of what `LLM` takes; its docstring says what each means. `quantize`: what depends on
    the model is "dense" until `LoadedModel.quantize_as` is asked. `max_step_tokens`: a policy's. Raises ConfigError."""
    if token_budget == "auto":
        token_budget = 0
    elif not isinstance(token_budget, int) or token_budget < 1:
        raise ConfigError(f'token_budget must be "auto" or an integer of at least 1, not {token_budget!r}')
    for name, value in (
        ("threads", threads),
        ("max_sequences", max_sequences),
        ("max_model_len", max_model_len),
    ):
        if value is not None and (not isinstance(value, int) or value < 1):
            raise ConfigError(f"{name} must be an integer of at least 1, not {value!r}")
    return EngineConfig(
        device="cpu" if device == "auto" else device,
        dtype="bfloat16" if dtype == "auto" else dtype,
        quantize="dense" if quantize in (None, "none", "auto") else quantize,
        threads=threads or 0,
        token_budget=token_budget,
        max_step_tokens=max_step_tokens,
        max_sequences=max_sequences,
        max_model_len=max_model_len or 0,
        kv_bytes=0 if kv_memory == "auto" else parse_bytes(kv_memory),
        kv_dtype=kv_dtype,
        prefix_caching=prefix_caching,
        isa=isa,
        pin_threads=pin_threads,
    )


def load_engine(
    model: str | os.PathLike[str] | LoadedModel,
    *,
    lora: str | os.PathLike[str] | None = None,
    verbose: bool | None = None,
    quantize_cache: bool = True,
    **options: Any,
) -> tuple[LoadedModel, Engine]:
    """Opens `model` and builds its engine; `options` are those of `engine_config`, the others as for `LLM`."""
    config = engine_config(**options)
    from .loader import load

    loaded = load(os.fspath(model), lora=lora) if isinstance(model, (str, os.PathLike)) else model
    config.quantize = loaded.quantize_as(options.get("quantize"))
    say = _Says(on_terminal() if verbose is None else verbose)
    say(str(_core.plan_memory(loaded.config, config)).rstrip())
    if loaded.kinds:
        say(loaded.matrices(config.quantize))
    if quantize_cache:
        from .integer_cache import with_integers

        loaded = with_integers(loaded, config.quantize, say)
    with byte_bar(f"Loading {loaded.name}", on_terminal()) as progress:
        engine = Engine(loaded.config, loaded.weights, config, progress=progress)
    if curve := engine.budget_curve():
        say(_curve_text(curve, engine.query().token_budget))
    say(engine.describe())
    return loaded, engine


def _curve_text(curve: list[tuple[int, float]], chosen: int) -> str:
    """The measurement behind `token_budget="auto"`."""
    points = ", ".join(f"{tokens}: {rate:,.0f}" for tokens, rate in curve)
    return (
        f"token budget {chosen}: the fewest tokens within 5 % of the best speed, but no fewer than "
        f"max_sequences\n  tokens/s by tokens of a forward: {points}"
    )


class _Says:
    """Logs, and prints where wanted."""

    def __init__(self, aloud: bool) -> None:
        self._aloud = aloud

    def __call__(self, text: str) -> None:
        _log.info("%s", text)
        if self._aloud:
            print(text, file=sys.stderr, flush=True)
