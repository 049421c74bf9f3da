"""From the fields of a request to `SamplingParams`: limits, aliases, and what is refused or ignored by name."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping
from typing import Any

from pydantic import BaseModel

from .._core import InvalidArgument
from ..request import SamplingParams
from .errors import ApiError
from .protocol import ChatRequest, CompletionRequest, SamplingFields
from .settings import Limits

_NOTHING: tuple[Any, ...] = (None, False, 0, "", [], {})
_UNSAFE = re.compile(r"[^A-Za-z0-9_.-]")
_NAME, _NAMES = 64, 32  # characters of a name, and names, that the header of ignored parameters holds

# What one server or another takes to constrain an answer, and the values beside _NOTHING that leave it
# unconstrained. Any other value is refused: an answer that only looks constrained would be worse than none.
_CONSTRAINTS: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(
        (
            "tools", "functions", "suffix", "documents", "prompt_embeds",
            "structured_outputs", "guided_json", "guided_regex", "guided_choice", "guided_grammar",
            "guided_whitespace_pattern", "regex", "ebnf", "grammar", "json_schema", "structural_tag",
            "stop_regex", "bad_words", "bad_token_ids", "allowed_token_ids", "stop_criteria",
            "logits_processors", "custom_logit_processor", "repetition_detection", "thinking_token_budget",
            "use_beam_search", "num_beam_groups", "no_repeat_ngram_size", "repetition_ngram_size",
            "mirostat", "dry_multiplier", "xtc_probability", "dynatemp_range", "n_predict", "t_max_predict_ms",
            "audio", "lora_path", "adapter_id", "watermark", "watermarking", "kv_transfer_params",
            "vllm_xargs",
        ),
        (),
    ),
    "tool_choice": ("none", "auto"),
    "function_call": ("none", "auto"),
    "response_format": ({"type": "text"},),
    "modalities": (["text"],),
    "num_beams": (1,),
    "typical_p": (1,),
    "top_n_sigma": (-1,),
    "repeat_penalty": (1,),
    "truncation_side": ("left",),
}  # fmt: skip

_DIRECT = (
    "temperature", "top_p", "top_k", "min_p", "repetition_penalty", "presence_penalty", "frequency_penalty",
    "ignore_eos", "skip_special_tokens", "stop_token_ids", "prompt_logprobs",
)  # fmt: skip


def ignored(request: BaseModel) -> list[str]:
    """Names of the fields that mean nothing here. Raises ApiError 400 for one that would constrain the
    answer."""
    extra = dict(request.model_extra or {})
    names = []
    if extra.get("tool_choice") == "none" and extra.pop("tools", None):
        names.append("tools")
    best_of = extra.pop("best_of", None)
    if best_of not in (None, 1, getattr(request, "n", None)):
        raise ApiError(400, "best_of is not supported, unless it is n", param="best_of")
    for name, value in extra.items():
        neutral = _CONSTRAINTS.get(name)
        if neutral is None:
            names.append(name)
        elif value not in _NOTHING and value not in neutral:
            raise ApiError(400, f"{name} is not supported", param=name)
    options = getattr(request, "stream_options", None)
    if options is not None:
        names += [f"stream_options.{name}" for name in options.model_extra or {}]
    return names


def ignored_header(names: Iterable[str]) -> dict[str, str]:
    """X-Ignored-Params: what a client wrote, so made safe and short."""
    shown = [_UNSAFE.sub("?", name[:_NAME]) for name in names]
    if len(shown) > _NAMES:
        shown = [*shown[:_NAMES], "..."]
    return {"X-Ignored-Params": ", ".join(shown)} if shown else {}


def sampling_params(
    request: ChatRequest | CompletionRequest, limits: Limits, defaults: Mapping[str, Any]
) -> SamplingParams:
    """`defaults`: where the request is silent. Raises ApiError 400."""
    check_limits(request, limits)
    if request.stream_options is not None and not request.stream:
        raise ApiError(400, "stream_options need stream: true", param="stream_options")
    if request.prompt_logprobs is not None and request.stream:
        raise ApiError(400, "prompt_logprobs can't be streamed", param="prompt_logprobs")
    given = {name: value for name in _DIRECT if (value := getattr(request, name)) is not None}
    seed = _one_of(request, "seed", "sampling_seed")
    given |= {
        "n": request.n or 1,
        "max_tokens": _max_tokens(request),
        "min_tokens": _one_of(request, "min_tokens", "min_new_tokens") or 0,
        "seed": None if seed == -1 else seed,
        "stop": () if request.stop is None else request.stop,
        "include_stop_str_in_output": _one_of(request, "include_stop_str_in_output", "no_stop_trim") or False,
        "logit_bias": _logit_bias(request.logit_bias),
        "logprobs": _logprobs(request),
    }
    if isinstance(request, CompletionRequest) and request.echo and request.logprobs is not None:
        given["prompt_logprobs"] = max(request.logprobs, request.prompt_logprobs or 0)
    try:
        return SamplingParams(**{**defaults, **given})
    except InvalidArgument as error:
        raise bad_argument(error) from None


def bad_argument(error: InvalidArgument) -> ApiError:
    """Our own refusals begin with the parameter's name, where it is about one."""
    message = str(error)
    name = message.split(" ", 1)[0].split("[", 1)[0].rstrip(":")
    return ApiError(400, message, param=name if name in SamplingFields.model_fields else None)


def check_limits(request: ChatRequest | CompletionRequest, limits: Limits) -> None:
    """Raises ApiError 400 for what asks for too much, before anything is made of it."""
    stops = [request.stop] if isinstance(request.stop, str) else request.stop or []
    top = request.top_logprobs if isinstance(request, ChatRequest) else request.logprobs
    _at_most("n", request.n or 1, limits.answers)
    _at_most("stop", len(stops), limits.stops, " strings")
    _at_most("stop", max(map(len, stops), default=0), limits.stop_length, " characters a string")
    _at_most("stop_token_ids", len(request.stop_token_ids or ()), limits.stop_token_ids, " tokens")
    _at_most("logit_bias", len(request.logit_bias or ()), limits.logit_bias, " tokens")
    _at_most("top_logprobs" if isinstance(request, ChatRequest) else "logprobs", top or 0, limits.logprobs)
    _at_most("prompt_logprobs", request.prompt_logprobs or 0, limits.logprobs)
    if isinstance(request, CompletionRequest):
        several = isinstance(request.prompt, list) and not isinstance(request.prompt[0], int)
        prompts = len(request.prompt) if several else 1
        _at_most("prompt", prompts, min(limits.prompts, limits.queued), " prompts")
        _at_most("n", prompts * (request.n or 1), limits.answers_in_all, " answers to all prompts")


def _at_most(name: str, value: int, most: int, unit: str = "") -> None:
    if value > most:
        raise ApiError(400, f"{name} may be at most {most}{unit}, not {value}", param=name)


def _one_of(request: BaseModel, *names: str) -> Any:
    """The value of the one among these names that is given. Raises ApiError 400 if two differ."""
    values = {name: value for name in names if (value := getattr(request, name)) is not None}
    if len(set(values.values())) > 1:
        raise ApiError(400, f"{' and '.join(values)} are the same and differ", param=next(iter(values)))
    return next(iter(values.values()), None)


def _max_tokens(request: ChatRequest | CompletionRequest) -> int | None:
    """None: what the context has left. A completion without tokens, which is only echoed, computes one that
    is not shown."""
    if isinstance(request, ChatRequest):
        most: int | None = _one_of(request, "max_completion_tokens", "max_tokens", "max_new_tokens")
        return most
    most = _one_of(request, "max_tokens", "max_new_tokens")
    if most == 0 and request.echo:
        return 1
    return 16 if most is None else most


def _logit_bias(bias: Mapping[str, float] | None) -> dict[int, float]:
    for token in bias or {}:
        if not re.fullmatch(r"\d{1,10}", token, re.ASCII):
            raise ApiError(400, f"logit_bias: {token[:80]!r} is no token id", param="logit_bias")
    return {int(token): value for token, value in (bias or {}).items()}


def _logprobs(request: ChatRequest | CompletionRequest) -> int | None:
    if isinstance(request, CompletionRequest):
        return request.logprobs
    if request.top_logprobs and not request.logprobs:
        raise ApiError(400, "top_logprobs need logprobs: true", param="top_logprobs")
    return (request.top_logprobs or 0) if request.logprobs else None
