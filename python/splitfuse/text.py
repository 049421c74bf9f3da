"""Text out, token by token: incremental detokenisation, and stop strings across token borders."""

from __future__ import annotations

from codecs import utf_8_decode
from collections.abc import Iterable, Sequence
from typing import TYPE_CHECKING

from ._core import InvalidArgument

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_REPLACEMENT = "\ufffd"
# Tokens decoded again with each new one. Each has at least one byte, and four bytes hold any code point, so
# what the cut at the window's start garbles has been given out long before.
_KEPT = 8
_WINDOW = 2 * _KEPT
_LONGEST_CODE_POINT = 4  # bytes


def detokenizer(
    tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
) -> ByteDetokenizer | WindowDetokenizer:
    """Turns the tokens of an answer into text as they come: `add` each, then `finish`.

    The pieces, joined, are what the tokenizer makes of prompt and answer together, less the prompt's part: so
    a word that follows the prompt keeps its leading space. A piece never ends inside a code point.
    """
    kind = ByteDetokenizer if tokenizer.joins_bytes else WindowDetokenizer
    return kind(tokenizer, prompt_ids, skip_special_tokens)


class ByteDetokenizer:
    """For tokenizers whose text is their tokens' bytes in a row: a token costs the decoding of its own bytes."""

    __slots__ = ("_pending", "_skip", "_tokenizer")

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._pending = b""  # of a code point that is not complete
        tail = b""
        for token in reversed(prompt_ids):
            if len(tail) >= _LONGEST_CODE_POINT:
                break
            tail = self._shown(token) + tail
        self._decode(tail)

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often the token's own, sometimes nothing."""
        return self._decode(self._pending + self._shown(token))

    def finish(self) -> str:
        """What was held back. Further tokens may still be added."""
        text, self._pending = self._pending.decode(errors="replace"), b""
        return text

    def _decode(self, data: bytes) -> str:
        text, used = utf_8_decode(data, "replace")
        self._pending = data[used:]
        return text

    def _shown(self, token: int) -> bytes:
        if self._skip and self._tokenizer.is_special(token):
            return b""
        return self._tokenizer.token_bytes(token)


class WindowDetokenizer:
    """For all others: a token costs the decoding of a short window, whatever came before."""

    __slots__ = ("_given", "_skip", "_tokenizer", "_window")

    def __init__(
        self, tokenizer: Tokenizer, prompt_ids: Sequence[int] = (), skip_special_tokens: bool = True
    ) -> None:
        self._tokenizer = tokenizer
        self._skip = skip_special_tokens
        self._window = self._tail(prompt_ids)
        self._given = self._settled(self._window)

    def add(self, token: int) -> str:
        """The text that is certain now and was not before; often the token's own, sometimes nothing."""
        if not self._shows(token):
            return ""
        self._window.append(token)
        if self._tokenizer.is_byte(token):
            return ""  # bytes in a row are decoded as a whole, and the row may go on
        return self._advance(final=False)

    def finish(self) -> str:
        """What was held back. Further tokens may still be added."""
        return self._advance(final=True)

    def _advance(self, final: bool) -> str:
        text = self._decode(self._window)
        end = len(text)
        if not final and text.endswith(_REPLACEMENT):
            end -= 1  # the next token may complete the code point
        piece = text[self._given : end]
        self._given = max(self._given, end)
        if len(self._window) > _WINDOW:
            held = len(text) - self._given
            self._window = self._window[-_KEPT:]
            self._given = len(self._decode(self._window)) - held
        return piece

    def _tail(self, prompt_ids: Sequence[int]) -> list[int]:
        """The last tokens of the prompt that show, never cut inside a row of byte tokens."""
        tail: list[int] = []
        for token in reversed(prompt_ids):
            if not self._shows(token):
                continue
            if len(tail) >= _KEPT and not self._tokenizer.is_byte(token):
                break
            tail.append(token)
        tail.reverse()
        return tail

    def _settled(self, tokens: list[int]) -> int:
        """Characters of the prompt's tail that the answer cannot change."""
        text = self._decode(tokens)
        if not text.endswith(_REPLACEMENT):
            return len(text)
        if not self._tokenizer.is_byte(tokens[-1]):
            return len(text) - 1
        end = len(tokens)
        while end > 0 and self._tokenizer.is_byte(tokens[end - 1]):
            end -= 1
        return len(self._decode(tokens[:end]))

    def _shows(self, token: int) -> bool:
        if self._skip and self._tokenizer.is_special(token):
            return False
        return self._tokenizer.id_to_token(token) is not None

    def _decode(self, tokens: list[int]) -> str:
        return self._tokenizer.decode(tokens, skip_special_tokens=False) if tokens else ""


class StopChecker:
    """Finds stop strings in a stream of text pieces, wherever they are cut.

    Of several stop strings the one that is complete first wins, and of those complete at the same character
    the longest: so the result does not depend on how the text is cut.
    """

    __slots__ = ("_held", "_include", "_longest", "_stops")

    def __init__(self, stop: Iterable[str], include_stop_str_in_output: bool = False) -> None:
        self._stops = tuple(dict.fromkeys(stop))
        if not all(self._stops):
            raise InvalidArgument("a stop string is empty; it would end every answer before it begins")
        self._include = include_stop_str_in_output
        self._longest = max(map(len, self._stops), default=0)
        self._held = ""

    def feed(self, text: str) -> tuple[str, str | None]:
        """(what may be shown, the stop string that was found or None). Nothing may be fed after a stop
        string."""
        text = self._held + text
        found = min(
            ((start + len(stop), start, stop) for stop in self._stops if (start := text.find(stop)) >= 0),
            default=None,
        )
        if found is not None:
            end, start, stop = found
            self._held = ""
            return text[: end if self._include else start], stop
        held = self._unsure(text)
        self._held = text[len(text) - held :]
        return text[: len(text) - held], None

    def flush(self) -> str:
        """What was held back, at the end of a text in which no stop string came."""
        text, self._held = self._held, ""
        return text

    def _unsure(self, text: str) -> int:
        """Length of the longest suffix that a stop string begins with."""
        for length in range(min(len(text), self._longest - 1), 0, -1):
            suffix = text[-length:]
            if any(stop.startswith(suffix) for stop in self._stops):
                return length
        return 0
