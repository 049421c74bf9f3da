"""A model's tokenizer, over the `tokenizers` library alone wherever its files allow."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ._core import CheckpointError, ConfigError

if TYPE_CHECKING:
    import tokenizers

_NAMED = ("bos_token", "eos_token", "unk_token", "sep_token", "pad_token", "cls_token", "mask_token")

# Any of these makes a tokenizer, the later ones with what lies beside them.
_FILES = ("tokenizer.json", "tokenizer.model", "vocab.json", "tokenizer_config.json")

_REPLACEMENT = "\ufffd"
# The letters that byte-level BPE writes the 256 bytes with: printable ones as themselves, the others in order.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_BYTE_OF_LETTER = {chr(byte): byte for byte in _PRINTABLE} | {
    chr(256 + place): byte for place, byte in enumerate(b for b in range(256) if b not in _PRINTABLE)
}


class Tokenizer:
    """Text to token ids and back, and conversations to text. Safe to use from several threads."""

    def __init__(
        self,
        backend: tokenizers.Tokenizer,
        special_tokens: Mapping[str, str] | None = None,
        chat_template: str | None = None,
    ) -> None:
        """`special_tokens`: by role, such as "bos_token"; a chat template may use them."""
        from tokenizers import decoders

        backend.no_truncation()
        backend.no_padding()
        self._backend = backend
        self.special_tokens = dict(special_tokens or {})
        self.chat_template = chat_template
        self.bos_token_id = self._named_id("bos_token")
        self.eos_token_id = self._named_id("eos_token")
        added = backend.get_added_tokens_decoder()
        self._special = frozenset(index for index, token in added.items() if token.special)
        ids = [backend.token_to_id(f"<0x{byte:02X}>") for byte in range(256)]
        # A vocabulary that spells bytes out has all of them.
        self._bytes = frozenset() if None in ids else frozenset(ids)
        self.joins_bytes = isinstance(backend.decoder, decoders.ByteLevel)
        """Whether a text is the bytes of its tokens, one after the other."""
        # By token: streams and log-probabilities name the same few again and again.
        self._text_of: dict[int, str] = {}
        self._bytes_of: dict[int, bytes] = {}

    @staticmethod
    def from_directory(path: str | Path) -> Tokenizer:
        """From Hugging Face files. Raises CheckpointError if there are none or they can't be read."""
        folder = Path(path)
        if (folder / "tokenizer.json").is_file():
            return _from_files(folder)
        return _from_transformers(folder)

    def save(self, path: str | Path) -> None:
        """Writes tokenizer.json and tokenizer_config.json, from which from_directory and transformers make
        the same."""
        folder = Path(path)
        self._backend.save(str(folder / "tokenizer.json"))
        config: dict[str, Any] = {"tokenizer_class": "PreTrainedTokenizerFast", **self.special_tokens}
        if self.chat_template is not None:
            config["chat_template"] = self.chat_template
        text = json.dumps(config, indent=2, ensure_ascii=False) + "\n"
        (folder / "tokenizer_config.json").write_text(text, encoding="utf-8")

    @property
    def vocab_size(self) -> int:
        """Ids run from 0 to below this; a model may have more rows than its tokenizer has tokens."""
        return self._backend.get_vocab_size(with_added_tokens=True)

    @cached_property
    def longest_token(self) -> int:
        """Characters of text that a token can stand for, at most."""
        return max(map(len, self._backend.get_vocab(with_added_tokens=True)), default=1)

    @property
    def eos_token_ids(self) -> list[int]:
        return [] if self.eos_token_id is None else [self.eos_token_id]

    def id_to_token(self, token_id: int) -> str | None:
        return self._backend.id_to_token(token_id) if token_id >= 0 else None

    def token_to_id(self, token: str) -> int | None:
        return self._backend.token_to_id(token)

    def is_special(self, token_id: int) -> bool:
        """Whether it is a control token, which decode() leaves out."""
        return token_id in self._special

    def is_byte(self, token_id: int) -> bool:
        """Whether it is one byte of a code point that the vocabulary lacks."""
        return token_id in self._bytes

    def token_text(self, token_id: int) -> str:
        """What a token adds to a text it goes on with, the space before a word included. Decoded once."""
        text = self._text_of.get(token_id)
        if text is None:
            text = self._text_of[token_id] = self._decode_added(token_id)
        return text

    def token_bytes(self, token_id: int) -> bytes:
        """What a token stands for, exactly, also where it is part of a code point, so no text of its own. Found
        once."""
        exact = self._bytes_of.get(token_id)
        if exact is None:
            exact = self._bytes_of[token_id] = self._spell(token_id)
        return exact

    def _decode_added(self, token_id: int) -> str:
        alone = self.decode([token_id], skip_special_tokens=False)
        if _REPLACEMENT in alone:
            return alone
        # Some decoders strip the space that a text begins with.
        return self.decode([token_id, token_id], skip_special_tokens=False)[len(alone) :]

    def _spell(self, token_id: int) -> bytes:
        text = self.token_text(token_id)
        token = self.id_to_token(token_id)
        if token is None or _REPLACEMENT not in text:
            return text.encode()
        if self.is_byte(token_id):
            return bytes([int(token[3:5], 16)])
        spelled = [_BYTE_OF_LETTER.get(letter) for letter in token]
        return text.encode() if None in spelled else bytes(byte for byte in spelled if byte is not None)

    def encode(self, text: str, add_special_tokens: bool = True) -> list[int]:
        """Token ids of `text`. A text that begins with the BOS token does not get a second one."""
        ids = self._backend.encode(text, add_special_tokens=add_special_tokens).ids
        doubled = self.bos_token_id is not None and ids[:2] == [self.bos_token_id] * 2
        if add_special_tokens and doubled and text.startswith(self.special_tokens["bos_token"]):
            return ids[1:]
        return ids

    def decode(self, ids: Sequence[int], skip_special_tokens: bool = True) -> str:
        return self._backend.decode(ids, skip_special_tokens=skip_special_tokens)

    def render_chat(
        self,
        messages: Sequence[Mapping[str, Any]],
        add_generation_prompt: bool = True,
        *,
        continue_final_message: bool = False,
        chat_template: str | None = None,
        **kwargs: Any,
    ) -> str:
        """The conversation as text, by the model's chat template or the one given. `continue_final_message`: it
        ends with the last message's text, for the model to go on with. `kwargs` are handed to the template.

        Raises ConfigError if there is no template, InvalidArgument if the template refuses the messages.
        """
        template = chat_template if chat_template is not None else self.chat_template
        if template is None:
            raise ConfigError("this model has no chat template: give it a prompt as plain text instead")
        from .chat_template import render, render_open

        variables = {**self.special_tokens, **kwargs}
        if continue_final_message:
            return render_open(template, messages, variables=variables)
        return render(template, messages, add_generation_prompt=add_generation_prompt, variables=variables)

    def encode_chat(self, messages: Sequence[Mapping[str, Any]], **kwargs: Any) -> list[int]:
        """Token ids of render_chat(); the template writes BOS itself."""
        return self.encode(self.render_chat(messages, **kwargs), add_special_tokens=False)

    def _named_id(self, role: str) -> int | None:
        token = self.special_tokens.get(role)
        return None if token is None else self._backend.token_to_id(token)


def find_tokenizer(folder: Path) -> Tokenizer | None:
    """The tokenizer whose files lie in `folder`; None if there are none."""
    if not any((folder / name).is_file() for name in _FILES):
        return None
    return Tokenizer.from_directory(folder)


def read_json(path: Path, what: str) -> dict[str, Any]:
    """The JSON object in `path`. Raises CheckpointError, naming the file, on anything else."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CheckpointError(f"{path}: {what} can't be read: {error}") from error
    if not isinstance(value, dict):
        raise CheckpointError(f"{path}: {what} must be a JSON object, not a {type(value).__name__}")
    return value


def _from_files(folder: Path) -> Tokenizer:
    """tokenizer.json as it stands: how text is cut and what is put around it is written there. (transformers
    5 builds Llama 2's anew, and then cuts text that begins with a space otherwise than SentencePiece did in
    training.)"""
    import tokenizers

    file = folder / "tokenizer.json"
    try:
        backend = tokenizers.Tokenizer.from_file(str(file))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{file}: the tokenizer can't be read: {error}") from error
    config: dict[str, Any] = {}
    if (folder / "special_tokens_map.json").is_file():
        config |= read_json(folder / "special_tokens_map.json", "the map of special tokens")
    if (folder / "tokenizer_config.json").is_file():
        config |= read_json(folder / "tokenizer_config.json", "the tokenizer configuration")
    special = {role: text for role in _NAMED if (text := _token_text(config.get(role)))}
    _add_tokens(backend, config, special, folder)
    return Tokenizer(backend, special, _find_template(folder, config))


def _token_text(value: Any) -> str | None:
    """A special token is written as text, or as an object with its text in "content"."""
    return value.get("content") if isinstance(value, dict) else value


def _add_tokens(
    backend: tokenizers.Tokenizer, config: dict[str, Any], special: dict[str, str], folder: Path
) -> None:
    """Tokens that tokenizer_config.json has beyond tokenizer.json, and the marking of special ones."""
    from tokenizers import AddedToken

    known = {index: token.content for index, token in backend.get_added_tokens_decoder().items()}
    listed = config.get("added_tokens_decoder") or {}
    for key in sorted(listed, key=int):
        entry, index = listed[key], int(key)
        if known.get(index) == entry["content"]:
            continue
        flags = {
            flag: bool(entry[flag])
            for flag in ("single_word", "lstrip", "rstrip", "normalized", "special")
            if flag in entry
        }
        backend.add_tokens([AddedToken(entry["content"], **flags)])
        if backend.token_to_id(entry["content"]) != index:
            raise CheckpointError(
                f"{folder / 'tokenizer_config.json'}: added token {entry['content']!r} has id {index}, "
                f"but the vocabulary gives it {backend.token_to_id(entry['content'])}"
            )
    already = {token.content for token in backend.get_added_tokens_decoder().values() if token.special}
    extra = [_token_text(token) for token in config.get("additional_special_tokens") or []]
    missing = [text for text in dict.fromkeys([*special.values(), *extra]) if text and text not in already]
    # A named token that the vocabulary lacks would get a new id, one that the model has no row for.
    present = [
        AddedToken(text, normalized=False, special=True)
        for text in missing
        if backend.token_to_id(text) is not None
    ]
    if present:
        backend.add_special_tokens(present)


def _find_template(folder: Path, config: dict[str, Any]) -> str | None:
    """The default chat template: a file of its own wins over the one in tokenizer_config.json."""
    file = folder / "chat_template.jinja"
    if file.is_file():
        return file.read_text(encoding="utf-8")
    template = config.get("chat_template")
    if template is None and (folder / "chat_template.json").is_file():
        template = read_json(folder / "chat_template.json", "the chat template").get("chat_template")
    if isinstance(template, list):  # several, by name
        template = {entry["name"]: entry["template"] for entry in template}.get("default")
    return template


def _from_transformers(folder: Path) -> Tokenizer:
    """Files of other kinds (a SentencePiece model, vocab.json with merges.txt), by way of transformers."""
    from transformers import AutoTokenizer

    try:
        slow = AutoTokenizer.from_pretrained(str(folder), local_files_only=True, trust_remote_code=False)
    except Exception as error:  # transformers raises whatever its parts raise
        reason = str(error).strip().splitlines()
        raise CheckpointError(
            f"{folder}: no tokenizer.json, and transformers makes no tokenizer of the files there: "
            f"{reason[0] if reason else type(error).__name__}"
        ) from error
    backend = getattr(slow, "backend_tokenizer", None)
    if backend is None:
        raise CheckpointError(f"{folder}: {type(slow).__name__} has no fast form; add a tokenizer.json")
    special = {role: str(text) for role, text in slow.special_tokens_map.items() if isinstance(text, str)}
    template = slow.chat_template
    return Tokenizer(backend, special, template.get("default") if isinstance(template, dict) else template)
