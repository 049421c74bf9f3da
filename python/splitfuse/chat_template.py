"""Chat templates: the Jinja dialect that models ship with, rendered in a sandbox as transformers renders
it."""

from __future__ import annotations

import json
import secrets
from collections.abc import Mapping, Sequence
from datetime import datetime
from functools import lru_cache
from typing import Any

import jinja2
from jinja2 import nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.sandbox import ImmutableSandboxedEnvironment

from ._core import ConfigError, InvalidArgument


class _Generation(Extension):
    """`{% generation %}` marks the assistant's words for training; here its body is rendered as it is."""

    tags = {"generation"}  # noqa: RUF012

    def parse(self, parser: Parser) -> nodes.Node | list[nodes.Node]:
        line = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=line)


def _raise_exception(message: str) -> None:
    raise jinja2.TemplateError(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)


def _tojson(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | str | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # Jinja's own filter escapes for HTML.
    return json.dumps(
        value, ensure_ascii=ensure_ascii, indent=indent, separators=separators, sort_keys=sort_keys
    )


@lru_cache(maxsize=16)
def _compile(template: str) -> jinja2.Template:
    environment = ImmutableSandboxedEnvironment(
        trim_blocks=True, lstrip_blocks=True, extensions=[_Generation, loopcontrols]
    )
    environment.filters["tojson"] = _tojson
    environment.globals["raise_exception"] = _raise_exception
    environment.globals["strftime_now"] = _strftime_now
    try:
        return environment.from_string(template)
    except jinja2.TemplateError as error:
        raise ConfigError(f"the model's chat template is not valid: {error}") from error


def _plain(value: Any) -> Any:
    """`value` as plain data: a template comes with the model and must not reach methods of a caller's
    objects."""
    if value is None or type(value) in (str, int, float, bool):
        return value
    if isinstance(value, str):
        return str.__str__(value)
    if isinstance(value, Mapping):
        return {_plain(key): _plain(item) for key, item in value.items()}
    if isinstance(value, Sequence):
        return [_plain(item) for item in value]
    if callable(dump := getattr(value, "model_dump", None)):
        return _plain(dump())
    raise InvalidArgument(f"a chat holds a {type(value).__name__}; expected text, numbers, lists and dicts")


def _check_messages(messages: Any) -> list[dict[str, Any]]:
    if isinstance(messages, (str, Mapping)) or not isinstance(messages, Sequence):
        raise InvalidArgument('messages must be a list such as [{"role": "user", "content": "Hello"}]')
    if not messages:
        raise InvalidArgument("messages is empty; expected at least one")
    checked = []
    for index, message in enumerate(messages):
        plain = _plain(message)
        if not isinstance(plain, dict) or not isinstance(plain.get("role"), str):
            raise InvalidArgument(
                f'message {index} has no "role"; expected {{"role": "user", "content": "..."}}'
            )
        # Many templates write a None out as text, and do the right thing when the key is missing.
        checked.append({key: value for key, value in plain.items() if value is not None})
    return checked


def render(template: str, messages: Any, *, add_generation_prompt: bool, variables: Mapping[str, Any]) -> str:
    """The conversation as the text the model was trained on. `variables` are further names the template may
    use.

    Raises ConfigError if the template is broken, InvalidArgument if it refuses the messages.
    """
    compiled = _compile(template)
    values = {"tools": None, "documents": None, **_plain(variables)}
    plain = _check_messages(messages)
    try:
        return compiled.render(messages=plain, add_generation_prompt=add_generation_prompt, **values)
    except (
        jinja2.TemplateError, TypeError, ValueError, LookupError, AttributeError, ArithmeticError, RecursionError
    ) as error:  # fmt: skip
        raise InvalidArgument(f"the model's chat template refuses these messages: {error}") from error


def render_open(template: str, messages: Any, *, variables: Mapping[str, Any]) -> str:
    """As `render`, up to the end of the last message's text, so that an answer goes on with it."""
    *earlier, last = _check_messages(messages)
    if not isinstance(last.get("content"), str):
        raise InvalidArgument("the last message has no text to go on with")
    # A template may trim, move or repeat what it is given: only a mark tells where the text ended.
    mark = secrets.token_hex(16)
    marked = [*earlier, {**last, "content": last["content"] + mark}]
    text = render(template, marked, add_generation_prompt=False, variables=variables)
    end = text.rfind(mark)
    if end < 0:
        raise InvalidArgument(
            "the model's chat template leaves the last message out, so nothing can go on with it"
        )
    return text[:end].replace(mark, "")
