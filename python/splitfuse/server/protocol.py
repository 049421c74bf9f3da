"""The shapes of requests and answers, in vLLM's dialect of OpenAI's API: what /openapi.json declares.

Requests are typed strictly: no number is read out of text, and true is not 1. What these models don't name is
kept in `model_extra`, for params.py to refuse or to list as ignored. An explicit null is as if left out.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from pydantic import BaseModel, ConfigDict, Discriminator, Field, Tag, TypeAdapter, ValidationError

from .errors import ApiError

_INT32 = 2**31 - 1
_NOT_FIELDS = {"body", "as text", "as list", "as texts", "as ids", "as lists", "as chat"}  # alternatives

Count = Annotated[int, Field(ge=0, le=_INT32)]
Positive = Annotated[int, Field(ge=1, le=_INT32)]
TokenId = Annotated[int, Field(ge=0, le=_INT32)]
TokenIds = Annotated[list[TokenId], Field(fail_fast=True)]
Penalty = Annotated[float, Field(ge=-2, le=2)]
Finite = Annotated[float, Field(allow_inf_nan=False)]


def _text_or_list(value: Any) -> str | None:
    return "as text" if isinstance(value, str) else "as list" if isinstance(value, list) else None


# An error is about the alternative that was meant, not about each.
_TEXT_OR_LIST = Discriminator(
    _text_or_list, custom_error_type="text_or_list", custom_error_message="must be text or a list"
)


class _Model(BaseModel):
    model_config = ConfigDict(strict=True, extra="allow", protected_namespaces=())


class StreamOptions(_Model):
    include_usage: bool | None = None
    continuous_usage_stats: bool | None = None


class SamplingFields(_Model):
    """What both ways of asking have in common."""

    model: str | None = None
    n: Annotated[int, Field(ge=1, le=_INT32)] | None = None
    max_tokens: Count | None = None
    max_new_tokens: Count | None = Field(None, description="SGLang's name of max_tokens.")
    min_tokens: Count | None = None
    min_new_tokens: Count | None = Field(None, description="SGLang's name of min_tokens.")
    temperature: Annotated[float, Field(ge=0, allow_inf_nan=False)] | None = None
    top_p: Annotated[float, Field(gt=0, le=1)] | None = None
    top_k: Annotated[int, Field(ge=-1, le=_INT32)] | None = Field(None, description="0 or -1: all.")
    min_p: Annotated[float, Field(ge=0, le=1)] | None = None
    repetition_penalty: Annotated[float, Field(gt=0, allow_inf_nan=False)] | None = None
    presence_penalty: Penalty | None = None
    frequency_penalty: Penalty | None = None
    seed: Annotated[int, Field(ge=-1, lt=2**64)] | None = Field(None, description="-1: a fresh one.")
    sampling_seed: Annotated[int, Field(ge=-1, lt=2**64)] | None = Field(
        None, description="SGLang's name of seed."
    )
    stop: (
        Annotated[
            Annotated[str, Tag("as text")] | Annotated[list[str], Field(fail_fast=True), Tag("as list")],
            _TEXT_OR_LIST,
        ]
        | None
    ) = None
    stop_token_ids: TokenIds | None = None
    ignore_eos: bool | None = None
    include_stop_str_in_output: bool | None = None
    no_stop_trim: bool | None = Field(None, description="SGLang's name of include_stop_str_in_output.")
    skip_special_tokens: bool | None = None
    logit_bias: dict[str, Finite] | None = Field(None, description="Token id, as text, to what is added.")
    prompt_logprobs: Annotated[int, Field(ge=0, le=_INT32)] | None = None
    echo: bool | None = None
    add_special_tokens: bool | None = None
    truncate_prompt_tokens: Annotated[int, Field(ge=-1, le=_INT32)] | None = Field(
        None, description="Keep this many of the prompt's last tokens; -1: as many as the context takes."
    )
    priority: Annotated[int, Field(ge=-_INT32, le=_INT32)] | None = Field(None, description="Lower is first.")
    cache_salt: Annotated[str, Field(min_length=1, max_length=1024)] | None = None
    return_token_ids: bool | None = None
    return_tokens_as_token_ids: bool | None = None
    stream: bool | None = None
    stream_options: StreamOptions | None = None


class TextPart(_Model):
    type: str
    text: str | None = None


class Message(_Model):
    role: Annotated[str, Field(min_length=1)]
    content: (
        Annotated[
            Annotated[str, Tag("as text")] | Annotated[list[TextPart], Field(fail_fast=True), Tag("as list")],
            _TEXT_OR_LIST,
        ]
        | None
    ) = None


class ChatFields(_Model):
    """How a conversation becomes a prompt."""

    messages: Annotated[list[Message], Field(min_length=1, fail_fast=True)]
    add_generation_prompt: bool | None = None
    continue_final_message: bool | None = None
    chat_template: str | None = None
    chat_template_kwargs: dict[str, Any] | None = None


class ChatRequest(ChatFields, SamplingFields):
    max_tokens: Positive | None = None
    max_new_tokens: Positive | None = Field(None, description="SGLang's name of max_tokens.")
    max_completion_tokens: Positive | None = None
    logprobs: bool | None = None
    top_logprobs: Count | None = None


def _kind_of_prompt(value: Any) -> str | None:
    """Which of the four shapes is meant, so that an error is about that one."""
    if isinstance(value, str):
        return "as text"
    if not isinstance(value, list) or not value:
        return None
    if isinstance(value[0], str):
        return "as texts"
    return "as lists" if isinstance(value[0], list) else "as ids"


Prompt = Annotated[
    Annotated[str, Tag("as text")]
    | Annotated[list[str], Field(fail_fast=True), Tag("as texts")]
    | Annotated[TokenIds, Tag("as ids")]
    | Annotated[list[TokenIds], Field(fail_fast=True), Tag("as lists")],
    Discriminator(
        _kind_of_prompt,
        custom_error_type="prompt",
        custom_error_message="must be text, a list of token ids, or a list of either, not empty",
    ),
]


class CompletionRequest(SamplingFields):
    prompt: Prompt
    logprobs: Count | None = None


class TokenizeText(_Model):
    model: str | None = None
    prompt: str
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


class TokenizeChat(ChatFields):
    model: str | None = None
    add_special_tokens: bool | None = None
    return_token_strs: bool | None = None


def _kind_of_tokenize(value: Any) -> str:
    return "as chat" if isinstance(value, (dict, Mapping)) and "messages" in value else "as text"


TokenizeRequest = Annotated[
    Annotated[TokenizeText, Tag("as text")] | Annotated[TokenizeChat, Tag("as chat")],
    Discriminator(_kind_of_tokenize),
]


class DetokenizeRequest(_Model):
    model: str | None = None
    tokens: TokenIds


# ---------------------------------------------------------------- answers


class ErrorInfo(BaseModel):
    message: str
    type: str
    param: str | None
    code: int


class ErrorEnvelope(BaseModel):
    error: ErrorInfo


class ModelCard(BaseModel):
    id: str
    object: Literal["model"]
    created: int
    owned_by: str
    root: str
    parent: str | None
    max_model_len: int
    permission: list[dict[str, Any]]


class ModelList(BaseModel):
    object: Literal["list"]
    data: list[ModelCard]


class Usage(BaseModel):
    prompt_tokens: int
    completion_tokens: int
    total_tokens: int
    prompt_tokens_details: dict[str, int]


class Choice(BaseModel):
    model_config = ConfigDict(extra="allow")
    index: int
    finish_reason: Literal["stop", "length", "abort"]
    stop_reason: str | int | None


class ChatMessage(BaseModel):
    role: str
    content: str


class ChatChoice(Choice):
    message: ChatMessage


class CompletionChoice(Choice):
    text: str


class ChatAnswer(BaseModel):
    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["chat.completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[ChatChoice]
    usage: Usage


class CompletionAnswer(BaseModel):
    model_config = ConfigDict(extra="allow")
    id: str
    object: Literal["text_completion"]
    created: int
    model: str
    system_fingerprint: str
    choices: list[CompletionChoice]
    usage: Usage


class TokenizeAnswer(BaseModel):
    count: int
    max_model_len: int
    tokens: list[int]
    token_strs: list[str] | None


class DetokenizeAnswer(BaseModel):
    prompt: str


# ---------------------------------------------------------------- reading


def read(shape: type[BaseModel] | TypeAdapter[Any], body: Any) -> Any:
    """`body` as a request of this shape. Raises ApiError 400 that names the field."""
    adapter = shape if isinstance(shape, TypeAdapter) else TypeAdapter(shape)
    try:
        return adapter.validate_python(body)
    except ValidationError as error:
        raise invalid(error.errors(include_url=False, include_input=False)) from None


def invalid(errors: Sequence[Any]) -> ApiError:
    """What pydantic, or FastAPI around it, found wrong: one line about the first of it. Little of what was sent is
    repeated, as it could be long."""
    if not errors:
        return ApiError(400, "the request is not valid")
    first = errors[0]
    if first["type"] == "json_invalid":
        return ApiError(
            400, f"the body is not JSON: {first.get('ctx', {}).get('error', 'it can not be read')}"
        )
    where = [ascii(part)[:80].strip("'") for part in first["loc"] if part not in _NOT_FIELDS]
    field = where[0] if where else None
    place = ".".join(where)[:200] or "the body"
    more = f" (and {len(errors) - 1} more)" if len(errors) > 1 else ""
    return ApiError(400, f"{place}: {first['msg'][:200]}{more}", param=field)
