"""What a request asks about, as token ids: conversations, texts and ids made into prompts."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from .._core import ConfigError, InvalidArgument
from .errors import ApiError
from .protocol import ChatFields, Message
from .runtime import Runtime

if TYPE_CHECKING:
    from ..tokenizer import Tokenizer

# What a template gets from us, and what would make it another template.
_OURS = {
    "messages", "tools", "documents", "add_generation_prompt", "continue_final_message", "chat_template",
    "tokenize", "raise_exception", "strftime_now", "self",
}  # fmt: skip


@dataclass(frozen=True, slots=True)
class Prompt:
    text: str | None
    """None where it came as token ids."""
    ids: Sequence[int]


class Texts:
    """A runtime's tokenizer and template, for its text workers: any of these methods may take a while. Raises
    ApiError 400 if the model has no tokenizer, and for what can't be tokenised."""

    def __init__(self, runtime: Runtime) -> None:
        self._tokenizer: Tokenizer = runtime.tokenizer
        self._settings = runtime.settings
        self._max_model_len = runtime.max_model_len

    def encode(self, text: str, add_special_tokens: bool = True) -> Prompt:
        if len(text) > self.most_characters:
            raise ApiError(
                400,
                f"a text of {len(text)} characters can't fit into the context of {self._max_model_len} tokens",
            )
        try:
            text.encode()
        except UnicodeEncodeError:
            raise ApiError(400, "the text holds half a surrogate pair, which is no character") from None
        return Prompt(text, self._tokenizer.encode(text, add_special_tokens=add_special_tokens))

    def encode_chat(self, request: ChatFields, add_special_tokens: bool = False) -> Prompt:
        """By the template, which writes the special tokens itself."""
        return self.encode(self._render(request), add_special_tokens)

    def decode(self, ids: Sequence[int], skip_special_tokens: bool) -> str:
        if len(ids) > self.most_characters:
            raise ApiError(
                400, f"tokens may be at most {self.most_characters}, not {len(ids)}", param="tokens"
            )
        return self._tokenizer.decode(ids, skip_special_tokens=skip_special_tokens)

    def spell(self, ids: Sequence[int]) -> list[str]:
        """The tokens as the vocabulary writes them."""
        return [self._tokenizer.id_to_token(token) or "" for token in ids]

    @property
    def most_characters(self) -> int:
        """Of a text: no tokens could make a longer one fit into the context. To tokenise it would only take
        time."""
        return self._tokenizer.longest_token * self._max_model_len

    def _render(self, request: ChatFields) -> str:
        template = self._settings.chat_template
        if request.chat_template is not None:
            if not self._settings.trust_request_chat_template:
                said = "chat_template is refused: this server uses its own (--trust-request-chat-template)"
                raise ApiError(400, said, param="chat_template")
            template = request.chat_template
        extra = request.chat_template_kwargs or {}
        if taken := extra.keys() & (_OURS | self._tokenizer.special_tokens.keys()):
            said = f"chat_template_kwargs may not set {min(taken)}"
            raise ApiError(400, said, param="chat_template_kwargs")
        open_end = bool(request.continue_final_message)
        begins = request.add_generation_prompt
        if open_end and begins:
            said = "continue_final_message and add_generation_prompt exclude each other"
            raise ApiError(400, said, param="continue_final_message")
        try:
            return self._tokenizer.render_chat(
                [_plain(index, message) for index, message in enumerate(request.messages)],
                add_generation_prompt=begins is None or begins,
                continue_final_message=open_end,
                chat_template=template,
                **extra,
            )
        except (ConfigError, InvalidArgument) as error:
            raise ApiError(400, str(error), param="messages") from None


def _plain(index: int, message: Message) -> dict[str, Any]:
    """A message as a template expects it: its content as one text."""
    plain = message.model_dump(exclude_unset=True)
    if isinstance(message.content, list):
        for part in message.content:
            if part.type != "text" or part.text is None:
                said = (
                    f"messages.{index}.content: a part of type {part.type[:80]!a} is not supported, only text"
                )
                raise ApiError(400, said, param="messages")
        plain["content"] = "\n".join(part.text or "" for part in message.content)
    return plain


def truncate(prompt: Prompt, wanted: int | None, most: int) -> Prompt:
    """The last `wanted` tokens of it; -1 are `most`, None are all."""
    if wanted is None:
        return prompt
    kept = max(1, most) if wanted == -1 else wanted
    if len(prompt.ids) <= kept:
        return prompt
    return Prompt(None, prompt.ids[len(prompt.ids) - kept :])
