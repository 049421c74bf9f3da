"""From a request's fields to sampling parameters: what is taken, what is refused by name, what is ignored."""

from __future__ import annotations

from typing import Any

import pytest
from pydantic import TypeAdapter

from splitfuse import SamplingParams
from splitfuse.llm import advised
from splitfuse.server.errors import ApiError
from splitfuse.server.params import ignored, ignored_header, sampling_params
from splitfuse.server.protocol import ChatRequest, CompletionRequest, TokenizeRequest, read
from splitfuse.server.settings import Limits

pytestmark = pytest.mark.machine_independent
LIMITS = Limits()
CHAT = {"messages": [{"role": "user", "content": "a"}]}
COMPLETION = {"prompt": "a"}


def of_chat(**fields: Any) -> SamplingParams:
    return sampling_params(read(ChatRequest, {**CHAT, **fields}), LIMITS, {})


def of_completion(**fields: Any) -> SamplingParams:
    return sampling_params(read(CompletionRequest, {**COMPLETION, **fields}), LIMITS, {})


def refusal(call: Any, *arguments: Any, **fields: Any) -> ApiError:
    with pytest.raises(ApiError) as caught:
        call(*arguments, **fields)
    assert caught.value.status == 400
    assert "\n" not in caught.value.message
    return caught.value


# ---------------------------------------------------------------- taken

SAMPLING: dict[str, Any] = {
    "n": 3,
    "max_tokens": 30,
    "min_tokens": 3,
    "temperature": 0.5,
    "top_p": 0.9,
    "top_k": 7,
    "min_p": 0.1,
    "seed": 2**64 - 1,
    "stop": ["x", "yz"],
    "stop_token_ids": [3, 4],
    "ignore_eos": True,
    "include_stop_str_in_output": True,
    "skip_special_tokens": False,
    "repetition_penalty": 1.1,
    "presence_penalty": -2,
    "frequency_penalty": 2.0,
    "prompt_logprobs": 2,
}


def test_every_parameter_arrives() -> None:
    expected = {**SAMPLING, "logit_bias": {12: -100.0}}
    fields = {**SAMPLING, "logit_bias": {"12": -100}}
    assert of_chat(**fields, logprobs=True, top_logprobs=5) == SamplingParams(**expected, logprobs=5)
    assert of_completion(**fields, logprobs=4) == SamplingParams(**expected, logprobs=4)


def test_silence_and_null_are_the_defaults() -> None:
    assert of_chat() == SamplingParams(max_tokens=None)
    assert of_completion() == SamplingParams(max_tokens=16)
    names = [*ChatRequest.model_fields.keys() - {"messages"}]
    assert len(names) > 30
    assert of_chat(**dict.fromkeys(names)) == SamplingParams(max_tokens=None)
    names = [*CompletionRequest.model_fields.keys() - {"prompt"}]
    assert of_completion(**dict.fromkeys(names)) == SamplingParams(max_tokens=16)


def test_the_makers_advice_is_the_default() -> None:
    config = {"do_sample": True, "temperature": 0.6, "top_p": 0.9, "top_k": None, "max_length": 5}
    assert advised(config) == {"temperature": 0.6, "top_p": 0.9}
    assert advised({"do_sample": False, "temperature": 0.6})["temperature"] == 0
    params = sampling_params(read(ChatRequest, {**CHAT, "top_p": 0.5}), LIMITS, advised(config))
    assert (params.temperature, params.top_p) == (0.6, 0.5)


@pytest.mark.parametrize(
    ("alias", "name", "value"),
    [
        ("max_new_tokens", "max_tokens", 5),
        ("min_new_tokens", "min_tokens", 5),
        ("sampling_seed", "seed", 5),
        ("no_stop_trim", "include_stop_str_in_output", True),
    ],
)
def test_aliases(alias: str, name: str, value: Any) -> None:
    for of in (of_chat, of_completion):
        assert getattr(of(**{alias: value}), name) == value
        assert getattr(of(**{alias: value, name: value}), name) == value
        other = not value if value is True else value + 1
        error = refusal(of, **{alias: value, name: other})
        assert alias in error.message
        assert name in error.message


def test_lengths() -> None:
    assert of_chat(max_completion_tokens=4).max_tokens == 4
    assert of_chat(max_completion_tokens=4, max_tokens=4).max_tokens == 4
    assert refusal(of_chat, max_completion_tokens=4, max_tokens=5).param == "max_completion_tokens"
    assert refusal(of_chat, max_tokens=0).param == "max_tokens"
    assert refusal(of_completion, max_tokens=0).param == "max_tokens"
    assert of_completion(max_tokens=0, echo=True).max_tokens == 1  # computed, and not shown
    assert refusal(of_completion, min_tokens=17).param == "min_tokens"


def test_logprobs() -> None:
    assert of_chat(logprobs=True).logprobs == 0
    assert of_chat(logprobs=False).logprobs is None
    assert of_chat(top_logprobs=0).logprobs is None
    assert refusal(of_chat, top_logprobs=1).param == "top_logprobs"
    assert of_completion(logprobs=0).logprobs == 0
    echoed = of_completion(logprobs=3, echo=True)
    assert (echoed.logprobs, echoed.prompt_logprobs) == (3, 3)


def test_a_seed_of_minus_one_is_none() -> None:
    assert of_chat(seed=-1).seed is None


# ---------------------------------------------------------------- types and ranges


@pytest.mark.parametrize("name", [n for n in SAMPLING if n != "stop"])
@pytest.mark.parametrize("value", ["1", [], {}, [[]], "true", -3, 1e999, 10**400, float("nan")], ids=repr)
def test_types_are_strict(name: str, value: Any) -> None:
    if name == "stop_token_ids" and value == []:
        value = [True]
    for of in (of_chat, of_completion):
        assert refusal(of, **{name: value}).param == name


@pytest.mark.parametrize(
    "name",
    ["n", "max_tokens", "top_k", "seed", "temperature", "presence_penalty", "priority", "prompt_logprobs"],
)
def test_true_is_no_number(name: str) -> None:
    assert refusal(of_chat, **{name: True}).param == name


@pytest.mark.parametrize("name", ["stream", "logprobs", "ignore_eos", "skip_special_tokens", "echo"])
def test_one_is_not_true(name: str) -> None:
    assert refusal(of_chat, **{name: 1}).param == name


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 0),
        ("n", 1.0),
        ("max_tokens", 2**31),
        ("temperature", -0.1),
        ("top_p", 0),
        ("top_p", 1.01),
        ("top_k", -2),
        ("min_p", 1.5),
        ("repetition_penalty", 0),
        ("presence_penalty", 2.1),
        ("frequency_penalty", -2.1),
        ("seed", -2),
        ("seed", 2**64),
        ("stop_token_ids", [-1]),
        ("priority", 2**31),
        ("cache_salt", ""),
        ("truncate_prompt_tokens", -2),
        ("logit_bias", {"5": "much"}),
        ("logit_bias", {"x": 1}),
        ("logit_bias", {"-1": 1}),
        ("logit_bias", {"1" * 400: 1}),
        ("logit_bias", {"٣": 1}),
        ("stop", ""),
        ("stop", ["a", ""]),
        ("stop", [1]),
    ],
    ids=str,
)
def test_ranges(name: str, value: Any) -> None:
    error = refusal(of_completion, **{name: value})
    assert error.param == name
    assert len(error.message) < 300


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("n", 129),
        ("stop", ["x"] * 17),
        ("stop", "x" * 257),
        ("stop_token_ids", [1] * 257),
        ("logit_bias", {str(i): 0 for i in range(1025)}),
        ("logprobs", 21),
        ("prompt_logprobs", 21),
        ("prompt", ["x"] * 1025),
    ],
    ids=lambda value: value if isinstance(value, str) and len(value) < 20 else "",
)
def test_limits(name: str, value: Any) -> None:
    assert refusal(of_completion, **{name: value}).param == name


def test_the_limits_are_those_of_the_settings() -> None:
    request = read(CompletionRequest, {"prompt": ["a", "b"], "n": 3})
    assert sampling_params(request, Limits(answers_in_all=6), {}).n == 3
    assert "5" in refusal(sampling_params, request, Limits(answers_in_all=5), {}).message
    assert refusal(sampling_params, request, Limits(prompts=1), {}).param == "prompt"


@pytest.mark.parametrize(
    "prompt", [[], [[]], ["a", 1], [1, "a"], [[1], "a"], [1, True], [1.0], [-1], 5, None, {"a": 1}], ids=str
)
def test_prompts_of_no_kind(prompt: Any) -> None:
    if prompt == [[]]:
        read(CompletionRequest, {"prompt": prompt})  # an empty prompt is found where it is number so-and-so
        return
    error = refusal(read, CompletionRequest, {"prompt": prompt})
    assert error.param == "prompt"


def test_a_long_list_of_mistakes_is_told_shortly() -> None:
    error = refusal(read, CompletionRequest, {"prompt": ["a", *[1] * 100_000]})
    assert len(error.message) < 200
    error = refusal(read, ChatRequest, {"messages": [{}] * 100_000})
    assert len(error.message) < 200


@pytest.mark.parametrize(
    "message",
    [
        {},
        {"content": "a"},
        {"role": "", "content": "a"},
        {"role": 5, "content": "a"},
        {"role": "a", "content": 5},
        "a",
    ],
    ids=str,
)
def test_messages_of_no_kind(message: Any) -> None:
    assert refusal(read, ChatRequest, {"messages": [message]}).param == "messages"


def test_a_hostile_name_is_quoted_safely() -> None:
    error = refusal(of_completion, logit_bias={"\ud800\n" * 90: "x"})
    assert error.message.isascii()
    assert len(error.message) < 300


def test_tokenize_takes_text_or_a_conversation() -> None:
    adapter = TypeAdapter(TokenizeRequest)
    assert read(adapter, {"prompt": "a"}).prompt == "a"
    assert read(adapter, CHAT).messages[0].content == "a"
    assert refusal(read, adapter, {"messages": []}).param == "messages"
    assert refusal(read, adapter, {}).param == "prompt"


# ---------------------------------------------------------------- refused or ignored

CONSTRAINTS: dict[str, Any] = {
    "tools": [{"type": "function"}],
    "tool_choice": "required",
    "functions": [{}],
    "function_call": {"name": "f"},
    "response_format": {"type": "json_object"},
    "structured_outputs": {"regex": "a"},
    "guided_json": {"type": "object"},
    "guided_regex": "a+",
    "guided_choice": ["a"],
    "guided_grammar": "g",
    "guided_whitespace_pattern": " ",
    "regex": "a",
    "ebnf": "a",
    "grammar": "g",
    "json_schema": "{}",
    "structural_tag": "{}",
    "stop_regex": "a",
    "suffix": "end",
    "bad_words": ["x"],
    "allowed_token_ids": [1],
    "logits_processors": ["x"],
    "use_beam_search": True,
    "num_beams": 4,
    "best_of": 2,
    "documents": [{}],
    "prompt_embeds": "AAAA",
    "lora_path": "x",
    "typical_p": 0.5,
    "mirostat": 2,
    "dry_multiplier": 0.8,
    "xtc_probability": 0.5,
    "no_repeat_ngram_size": 3,
    "repeat_penalty": 1.1,
    "truncation_side": "right",
    "modalities": ["text", "audio"],
    "audio": {"voice": "x"},
    "thinking_token_budget": 5,
}
NEUTRAL: dict[str, Any] = {
    "tools": [],
    "tool_choice": "auto",
    "functions": [],
    "function_call": "none",
    "response_format": {"type": "text"},
    "suffix": "",
    "use_beam_search": False,
    "num_beams": 1,
    "best_of": 1,
    "guided_json": None,
    "bad_words": [],
    "typical_p": 1.0,
    "mirostat": 0,
    "repeat_penalty": 1.0,
    "truncation_side": "left",
    "modalities": ["text"],
}


@pytest.mark.parametrize("name", CONSTRAINTS)
@pytest.mark.parametrize("shape", [ChatRequest, CompletionRequest])
def test_what_would_constrain_the_answer_is_refused(name: str, shape: Any) -> None:
    request = read(shape, {**CHAT, **COMPLETION, name: CONSTRAINTS[name]})
    error = refusal(ignored, request)
    assert error.param == name
    assert name in error.message


@pytest.mark.parametrize("name", NEUTRAL)
def test_what_constrains_nothing_is_taken(name: str) -> None:
    for value in (NEUTRAL[name], None):
        assert ignored(read(CompletionRequest, {**COMPLETION, name: value})) == []


def test_best_of_n_is_n() -> None:
    assert ignored(read(CompletionRequest, {**COMPLETION, "best_of": 3, "n": 3})) == []
    assert refusal(ignored, read(CompletionRequest, {**COMPLETION, "best_of": 3, "n": 2})).param == "best_of"


def test_tools_that_may_not_be_called_are_ignored() -> None:
    request = read(ChatRequest, {**CHAT, "tools": [{}], "tool_choice": "none"})
    assert ignored(request) == ["tools"]


def test_the_rest_is_ignored_by_name() -> None:
    harmless = {"user": "me", "metadata": {"a": 1}, "store": True, "service_tier": "auto", "of_no_meaning": 0}
    request = read(ChatRequest, {**CHAT, **harmless, "stream_options": {"include_obfuscation": True}})
    assert ignored(request) == [*harmless, "stream_options.include_obfuscation"]
    assert ignored_header(ignored(request)) == {
        "X-Ignored-Params": "user, metadata, store, service_tier, of_no_meaning, stream_options.include_obfuscation"
    }
    assert ignored_header([]) == {}


def test_the_header_is_safe_and_short() -> None:
    names = ["a\r\nX-Evil: 1", "é" * 1000, "\ud800", "", *(f"name{i}" * 20 for i in range(1000))]
    (header,) = ignored_header(names).values()
    assert header.isascii()
    assert header.isprintable()
    assert ":" not in header
    assert len(header) < 4096
    assert header.endswith("...")


def test_streams() -> None:
    assert refusal(of_chat, stream_options={"include_usage": True}).param == "stream_options"
    assert refusal(of_chat, stream=True, prompt_logprobs=1).param == "prompt_logprobs"
    assert refusal(of_chat, stream=True, stream_options={"include_usage": 1}).param == "stream_options"
