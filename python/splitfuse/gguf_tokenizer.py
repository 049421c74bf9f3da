"""The tokenizer that a GGUF file describes in its metadata, made with the `tokenizers` library alone."""

from __future__ import annotations

from typing import Any

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors

from . import tokenizer as splitfuse_tokenizer
from ._core import CheckpointError, ConfigError
from .gguf_file import GgufFile

_UNKNOWN, _CONTROL, _USER_DEFINED = 2, 3, 4  # values of tokenizer.ggml.token_type

# How text is cut before byte-level BPE, by tokenizer.ggml.pre. These are facts of the models: one that was
# trained with another pattern gets other tokens.
_GPT2 = r"'s|'t|'re|'ve|'m|'ll|'d| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+"
_WORDS = (
    r"(?i:'s|'t|'re|'ve|'m|'ll|'d)|[^\r\n\p{L}\p{N}]?\p{L}+|\p{N}%s"
    r"| ?[^\s\p{L}\p{N}]+[\r\n]*|\s*[\r\n]+|\s+(?!\S)|\s+"
)
_LLAMA3 = [_WORDS % "{1,3}"]
_QWEN2 = [_WORDS % ""]
_DIGITS_APART = [r"\p{N}", _GPT2]
_PATTERNS = {
    "gpt-2": [_GPT2],
    "llama-bpe": _LLAMA3,
    "llama3": _LLAMA3,
    "llama-v3": _LLAMA3,
    "qwen2": _QWEN2,
    "smollm": _DIGITS_APART,
    "starcoder": _DIGITS_APART,
    "refact": _DIGITS_APART,
    "default": [r"[\p{P}\$\+<=>\^~\|]+", _GPT2, r"\p{N}+", r"[0-9][0-9][0-9]"],
}
# These look a whole piece up in the vocabulary before they merge, and begin with BOS unless the file says no.
_LLAMA3_NAMES = ("llama-bpe", "llama3", "llama-v3")
_SPACE = "\u2581"  # what SentencePiece writes for a space


def read_tokenizer(file: GgufFile) -> splitfuse_tokenizer.Tokenizer | None:
    """None if the file describes none. Raises ConfigError for a kind of tokenizer that is not supported,
    CheckpointError if its data is bad."""
    if "tokenizer.ggml.model" not in file.metadata:
        return None
    data = _Metadata(file)
    kind = data.get("model")
    if kind == "gpt2":
        backend, bos_by_default = _byte_level(data)
    elif kind == "llama":
        backend, bos_by_default = _sentencepiece(data), True
    else:
        raise ConfigError(
            f"{file.path}: tokenizer.ggml.model is {kind!r}; supported: 'gpt2' (byte-level BPE), 'llama'"
        )
    _add_tokens(backend, data)
    special = data.special_tokens()
    begin = (
        [special["bos_token"]] if data.get("add_bos_token", bos_by_default) and "bos_token" in special else []
    )
    end = [special["eos_token"]] if data.get("add_eos_token", False) and "eos_token" in special else []
    if begin or end:
        ids = [(token, data.vocabulary[token]) for token in dict.fromkeys(begin + end)]
        backend.post_processor = processors.TemplateProcessing(
            single=[*begin, "$A", *end], pair=[*begin, "$A", *end, *begin, "$B", *end], special_tokens=ids
        )
    return splitfuse_tokenizer.Tokenizer(backend, special, file.metadata.get("tokenizer.chat_template"))


class _Metadata:
    def __init__(self, file: GgufFile) -> None:
        self.path = file.path
        self._metadata = file.metadata
        self.tokens: list[str] = self._list("tokens", str, None)
        self.types: list[int] = self._list("token_type", int, len(self.tokens)) or [1] * len(self.tokens)
        self.vocabulary = {token: index for index, token in enumerate(self.tokens)}
        if len(self.vocabulary) != len(self.tokens):
            twice = next(token for index, token in enumerate(self.tokens) if self.vocabulary[token] != index)
            raise CheckpointError(f"{self.path}: tokenizer.ggml.tokens has {twice!r} twice")

    def get(self, key: str, default: Any = None) -> Any:
        return self._metadata.get("tokenizer.ggml." + key, default)

    def scores(self) -> list[float]:
        return self._list("scores", float, len(self.tokens))

    def merges(self) -> list[tuple[str, str]]:
        merges = []
        for merge in self._list("merges", str, None):
            cut = merge.find(" ", 1)
            if cut < 0:
                raise CheckpointError(f"{self.path}: tokenizer.ggml.merges has {merge!r}; expected two parts")
            merges.append((merge[:cut], merge[cut + 1 :]))
        return merges

    def special_tokens(self) -> dict[str, str]:
        special = {}
        for role, key in (("bos", "bos"), ("eos", "eos"), ("unk", "unknown"), ("pad", "padding")):
            index = self.get(f"{key}_token_id")
            if index is None:
                continue
            if not isinstance(index, int) or not 0 <= index < len(self.tokens):
                raise CheckpointError(
                    f"{self.path}: tokenizer.ggml.{key}_token_id is {index}, beyond the vocabulary"
                )
            special[f"{role}_token"] = self.tokens[index]
        return special

    def _list(self, key: str, kind: type, length: int | None) -> list[Any]:
        values: list[Any] = self.get(key)
        if values is None and key == "token_type":
            return []
        fine = isinstance(values, list) and (not values or isinstance(values[0], kind))
        if not fine or (length is not None and len(values) != length):
            raise CheckpointError(f"{self.path}: tokenizer.ggml.{key} is missing or is not what it should be")
        return values


def _byte_level(data: _Metadata) -> tuple[Tokenizer, bool]:
    """(the tokenizer, whether it adds BOS unless told)"""
    name = data.get("pre", "default")
    patterns = _PATTERNS.get(name)
    if patterns is None:
        raise ConfigError(
            f"{data.path}: tokenizer.ggml.pre is {name!r}, a way to cut text that is not supported; "
            f"supported: {', '.join(sorted(_PATTERNS))}"
        )
    llama3 = name in _LLAMA3_NAMES
    backend = _bpe(data, data.merges(), ignore_merges=llama3)
    cuts = [pre_tokenizers.Split(Regex(pattern), behavior="isolated") for pattern in patterns]
    bytes_only = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    backend.pre_tokenizer = pre_tokenizers.Sequence([*cuts, bytes_only])
    backend.decoder = decoders.ByteLevel()
    return backend, llama3


def _sentencepiece(data: _Metadata) -> Tokenizer:
    """SentencePiece BPE merges whatever pair makes the piece with the best score: written out as a list of
    merges."""
    vocabulary, scores = data.vocabulary, data.scores()
    merges = []
    for index, piece in enumerate(data.tokens):
        if data.types[index] in (_UNKNOWN, _CONTROL, _USER_DEFINED):
            continue
        pairs = [(piece[:cut], piece[cut:]) for cut in range(1, len(piece))]
        known = [pair for pair in pairs if pair[0] in vocabulary and pair[1] in vocabulary]
        known.sort(key=lambda pair: (vocabulary[pair[0]], vocabulary[pair[1]]))
        merges += [(-scores[index], index, pair) for pair in known]
    merges.sort(key=lambda merge: merge[:2])
    unknown = data.get("unknown_token_id", 0)
    backend = _bpe(
        data,
        [pair for _, _, pair in merges],
        unk_token=data.tokens[unknown] if 0 <= unknown < len(data.tokens) else None,
        fuse_unk=True,
        byte_fallback=True,
    )
    # SentencePiece puts a space before every text, also one that begins with a space.
    prefix = bool(data.get("add_space_prefix", True))
    escape = normalizers.Replace(" ", _SPACE)
    backend.normalizer = normalizers.Sequence([normalizers.Prepend(_SPACE), escape]) if prefix else escape
    steps = [decoders.Replace(_SPACE, " "), decoders.ByteFallback(), decoders.Fuse()]
    backend.decoder = decoders.Sequence([*steps, decoders.Strip(content=" ", left=1)] if prefix else steps)
    return backend


def _bpe(data: _Metadata, merges: list[tuple[str, str]], **options: Any) -> Tokenizer:
    try:
        return Tokenizer(models.BPE(vocab=data.vocabulary, merges=merges, **options))
    except Exception as error:  # the library raises nothing narrower
        raise CheckpointError(f"{data.path}: the tokenizer's merges don't fit its tokens: {error}") from error


def _add_tokens(backend: Tokenizer, data: _Metadata) -> None:
    """Control tokens and the model's own are matched whole in a text."""
    control, own = [], []
    for token, kind in zip(data.tokens, data.types, strict=True):
        if kind == _CONTROL or (kind == _UNKNOWN and data.get("model") == "llama"):
            control.append(AddedToken(token, normalized=False, special=True))
        elif kind == _USER_DEFINED:
            own.append(AddedToken(token, normalized=False, special=False))
    backend.add_special_tokens(control)
    backend.add_tokens(own)
