"""Log-probabilities as answers show them: OpenAI's two shapes, and vLLM's of a prompt."""

from __future__ import annotations

from collections.abc import Callable, Iterable
from typing import Any

from ..request import Logprob, TokenLogprobs
from ..tokenizer import Tokenizer

_LEAST = -9999.0  # JSON has no infinity

Name = Callable[[Logprob], str]


def name_of(entry: Logprob) -> str:
    """The token's text; its id where it has none."""
    return id_of(entry) if entry.text is None else entry.text


def id_of(entry: Logprob) -> str:
    return f"token_id:{entry.token_id}"


def _value(entry: Logprob) -> float:
    return max(entry.logprob, _LEAST)


def _best(entries: TokenLogprobs, count: int) -> list[Logprob]:
    """The `count` most likely, best first; the chosen token is one of them only if it is that likely."""
    return sorted((entry for entry in entries.values() if entry.rank <= count), key=lambda entry: entry.rank)


def chat_logprobs(
    positions: Iterable[TokenLogprobs], top: int, name: Name, tokenizer: Tokenizer | None
) -> dict[str, Any]:
    """{"content": [{"token", "logprob", "bytes", "top_logprobs"}]}."""

    def shown(entry: Logprob) -> dict[str, Any]:
        exact = None if tokenizer is None else list(tokenizer.token_bytes(entry.token_id))
        return {"token": name(entry), "logprob": _value(entry), "bytes": exact}

    content = []
    for entries in positions:
        chosen = next(iter(entries.values()))
        content.append({**shown(chosen), "top_logprobs": [shown(entry) for entry in _best(entries, top)]})
    return {"content": content}


def completion_logprobs(
    positions: Iterable[TokenLogprobs | None],
    ids: Iterable[int],
    top: int,
    name: Name,
    tokenizer: Tokenizer | None,
    offset: int,
) -> tuple[dict[str, Any], int]:
    """({"text_offset", "token_logprobs", "tokens", "top_logprobs"}, the offset of what follows). `offset`:
    characters of the tokens before, as they are shown. A prompt's first token has no probability."""
    tokens: list[str] = []
    offsets: list[int] = []
    values: list[float | None] = []
    tops: list[dict[str, float] | None] = []
    for entries, token in zip(positions, ids, strict=True):
        if entries is None:
            text = None if tokenizer is None else tokenizer.token_text(token)
            chosen = Logprob(token, 0.0, 0, text)
        else:
            chosen = next(iter(entries.values()))
        tokens.append(name(chosen))
        offsets.append(offset)
        offset += len(tokens[-1])
        values.append(None if entries is None else _value(chosen))
        # Tokens that look alike are one here: the chosen one, else the likelier.
        likely = None if entries is None else [*reversed(_best(entries, top)), chosen]
        tops.append(None if likely is None else {name(entry): _value(entry) for entry in likely})
    return {"text_offset": offsets, "token_logprobs": values, "tokens": tokens, "top_logprobs": tops}, offset


def prompt_logprobs(
    positions: Iterable[TokenLogprobs | None], top: int
) -> list[dict[str, dict[str, Any]] | None]:
    """One entry a token, None for the first: token id to {"logprob", "rank", "decoded_token"}, of the chosen
    token and the `top` most likely."""
    return [None if entries is None else _ranked(entries, top) for entries in positions]


def _ranked(entries: TokenLogprobs, top: int) -> dict[str, dict[str, Any]]:
    chosen = next(iter(entries.values()))
    shown = {entry.token_id: entry for entry in (chosen, *_best(entries, top))}
    return {
        str(token): {"logprob": _value(entry), "rank": entry.rank, "decoded_token": entry.text}
        for token, entry in shown.items()
    }
