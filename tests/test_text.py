"""Text out: pieces that make up the whole, no broken code points, and stop strings across any border."""

from itertools import pairwise

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from tokenizers import Tokenizer as Backend
from tokenizers import decoders, models, normalizers, pre_tokenizers

from conftest import byte_level_tokenizer
from splitfuse import InvalidArgument
from splitfuse.text import StopChecker, WindowDetokenizer, detokenizer
from splitfuse.tokenizer import Tokenizer

SPACE = "\u2581"
SPECIAL = {"bos_token": "<s>", "eos_token": "</s>"}


def sentencepiece_tokenizer(metaspace: bool) -> Backend:
    """Byte fallback and the leading space of SentencePiece, in both forms that tokenizer.json files have."""
    tokens = ["<unk>", "<s>", "</s>", *(f"<0x{byte:02X}>" for byte in range(256))]
    tokens += [SPACE, SPACE * 2, "h", "i", SPACE + "h", SPACE + "hi", "hi", "a", "\ufffd", ".", SPACE + "."]
    vocab = {token: index for index, token in enumerate(tokens)}
    merges = [(SPACE, SPACE), (SPACE, "h"), (SPACE + "h", "i"), ("h", "i"), (SPACE, ".")]
    backend = Backend(
        models.BPE(vocab=vocab, merges=merges, unk_token="<unk>", byte_fallback=True, fuse_unk=True)
    )
    steps = [
        decoders.Replace(SPACE, " "),
        decoders.ByteFallback(),
        decoders.Fuse(),
        decoders.Strip(" ", 1, 0),
    ]
    if metaspace:
        backend.pre_tokenizer = pre_tokenizers.Metaspace(prepend_scheme="first", split=False)
    else:
        backend.normalizer = normalizers.Sequence(
            [normalizers.Prepend(SPACE), normalizers.Replace(" ", SPACE)]
        )
    backend.decoder = decoders.Sequence(steps)
    backend.add_special_tokens(["<unk>", "<s>", "</s>"])
    return backend


BYTE_LEVEL = {"bos_token": "<|bos|>", "eos_token": "<|eos|>"}
TOKENIZERS = {
    "byte-level": Tokenizer(byte_level_tokenizer(), BYTE_LEVEL),
    "byte-level, by windows": Tokenizer(byte_level_tokenizer(), BYTE_LEVEL),
    "sentencepiece": Tokenizer(sentencepiece_tokenizer(metaspace=False), SPECIAL),
    "metaspace": Tokenizer(sentencepiece_tokenizer(metaspace=True), SPECIAL),
}
TOKENIZERS["byte-level, by windows"].joins_bytes = False
every_tokenizer = pytest.mark.parametrize("tokenizer", TOKENIZERS.values(), ids=TOKENIZERS)
ids = st.lists(st.integers(0, 290), max_size=60)  # beyond the smaller vocabulary too


def stream(tokenizer, tokens, prompt=(), skip=True):
    text = detokenizer(tokenizer, prompt, skip)
    return [*map(text.add, tokens), text.finish()]


def shown(tokenizer, tokens, skip):
    known = [token for token in tokens if tokenizer.id_to_token(token) is not None]
    return [token for token in known if not (skip and tokenizer.is_special(token))]


@every_tokenizer
@given(tokens=ids, skip=st.booleans())
def test_the_pieces_are_the_whole(tokenizer, tokens, skip):
    assert "".join(stream(tokenizer, tokens, skip=skip)) == tokenizer.decode(tokens, skip_special_tokens=skip)


@every_tokenizer
@given(prompt=ids, tokens=ids, skip=st.booleans())
def test_after_a_prompt_the_pieces_are_what_it_lacked(tokenizer, prompt, tokens, skip):
    before = tokenizer.decode(prompt, skip_special_tokens=skip)
    seen = shown(tokenizer, prompt, skip)
    if before.endswith("\ufffd") or (seen and tokenizer.is_byte(seen[-1])):
        prompt, before = [*prompt, tokenizer.encode("hi", add_special_tokens=False)[-1]], None
        before = tokenizer.decode(prompt, skip_special_tokens=skip)
    whole = tokenizer.decode([*prompt, *tokens], skip_special_tokens=skip)
    assert before + "".join(stream(tokenizer, tokens, prompt, skip)) == whole


@every_tokenizer
@given(text=st.text(max_size=40), cut=st.integers(0, 40))
def test_no_piece_breaks_a_code_point(tokenizer, text, cut):
    text = text.replace("\ufffd", "")
    tokens = tokenizer.encode(text, add_special_tokens=False)
    whole = tokenizer.decode(tokens)  # the text, but for a leading space that Metaspace takes for its own
    pieces = stream(tokenizer, tokens)
    assert "".join(pieces) == whole
    assert not any("\ufffd" in piece for piece in pieces)
    # A prompt may end inside a code point: its missing bytes come with the answer, which then shows it whole.
    tail = "".join(stream(tokenizer, tokens[cut:], tokens[:cut]))
    assert whole.endswith(tail)
    assert "\ufffd" not in tail


def test_an_emoji_comes_whole_with_its_last_byte():
    tokenizer = TOKENIZERS["byte-level"]
    tokens = tokenizer.encode("a🙂b", add_special_tokens=False)
    assert len(tokens) > 3
    assert [piece for piece in stream(tokenizer, tokens) if piece] == ["a", "🙂", "b"]


def test_which_tokenizers_join_bytes():
    assert TOKENIZERS["byte-level"].joins_bytes
    assert not TOKENIZERS["sentencepiece"].joins_bytes
    assert not TOKENIZERS["metaspace"].joins_bytes


def test_text_whose_tokens_join_bytes_is_decoded_no_more_than_once_a_token(monkeypatch):
    tokenizer = Tokenizer(byte_level_tokenizer(), BYTE_LEVEL)
    tokens = tokenizer.encode("the theory 🙂", add_special_tokens=False)
    first = stream(tokenizer, tokens, prompt=tokens)
    monkeypatch.setattr(tokenizer, "decode", None)
    assert stream(tokenizer, tokens, prompt=tokens) == first


def test_a_prompt_that_ends_in_a_code_point_is_gone_on_with():
    tokenizer = TOKENIZERS["byte-level"]
    tokens = tokenizer.encode("a🙂", add_special_tokens=False)
    for cut in range(1, len(tokens) + 1):
        tail = "".join(stream(tokenizer, tokens[cut:], prompt=tokens[:cut]))
        assert tail == ("🙂" if cut < len(tokens) else "")
        with_end = [*tokens[:cut], tokenizer.eos_token_id]  # a special token between shows nothing
        assert "".join(stream(tokenizer, tokens[cut:], prompt=with_end)) == tail


def test_ascii_is_never_held():
    tokenizer = TOKENIZERS["byte-level"]
    text = detokenizer(tokenizer)
    for token in tokenizer.encode("the  theory of the thing.", add_special_tokens=False):
        assert text.add(token) == tokenizer.decode([token])


@pytest.mark.parametrize("name", ["sentencepiece", "metaspace"])
def test_the_space_after_the_prompt_is_kept(name):
    tokenizer = TOKENIZERS[name]
    hi = tokenizer.token_to_id(SPACE + "hi")
    bos = tokenizer.bos_token_id
    assert stream(tokenizer, [hi], prompt=[bos, hi]) == [" hi", ""]
    assert stream(tokenizer, [hi], prompt=[bos]) == ["hi", ""]
    assert stream(tokenizer, [hi, bos, hi]) == ["hi", "", " hi", ""]


@every_tokenizer
def test_the_texts_of_tokens_are_what_they_add(tokenizer):
    begin = tokenizer.encode("hi", add_special_tokens=False)
    for token in range(tokenizer.vocab_size):
        text = tokenizer.token_text(token)
        if "\ufffd" in text:
            continue
        before = tokenizer.decode(begin, skip_special_tokens=False)
        assert tokenizer.decode([*begin, token], skip_special_tokens=False) == before + text
        assert tokenizer.token_bytes(token) == text.encode()


def test_what_a_token_stands_for_is_decoded_once(monkeypatch):
    tokenizer = Tokenizer(byte_level_tokenizer())
    tokens = range(tokenizer.vocab_size)
    first = [(tokenizer.token_text(token), tokenizer.token_bytes(token)) for token in tokens]
    monkeypatch.setattr(tokenizer, "decode", None)
    monkeypatch.setattr(tokenizer, "id_to_token", None)
    again = [(tokenizer.token_text(token), tokenizer.token_bytes(token)) for token in tokens]
    assert again == first


@every_tokenizer
def test_a_token_costs_a_short_window(tokenizer):
    class Counting:
        longest = 0

        def __getattr__(self, name):
            return getattr(tokenizer, name)

        def decode(self, ids, skip_special_tokens=True):
            self.longest = max(self.longest, len(ids))
            return tokenizer.decode(ids, skip_special_tokens)

    counting = Counting()
    known = [token for token in range(300) if tokenizer.id_to_token(token) is not None]
    broken = [token for token in known if "\ufffd" in tokenizer.decode([token])]
    prompt = tokenizer.encode("hi " * 2000)
    text = WindowDetokenizer(counting, prompt)
    letters = tokenizer.encode("hi.", add_special_tokens=False)
    for token in letters * 300 + ([] if tokenizer.is_byte(broken[0]) else broken * 10):
        text.add(token)
    assert counting.longest <= 20


@settings(deadline=None)
@given(seed=st.integers(0, 2**32), length=st.integers(1, 200))
def test_random_tokens_of_a_real_model(smollm2_tokenizer, seed, length):
    import random

    rng = random.Random(seed)
    tokens = [rng.randrange(smollm2_tokenizer.vocab_size) for _ in range(length)]
    assert "".join(stream(smollm2_tokenizer, tokens)) == smollm2_tokenizer.decode(tokens)


@pytest.fixture(scope="module")
def smollm2_tokenizer(smollm2):
    return Tokenizer.from_directory(smollm2)


# Stop strings

words = st.text(alphabet="abc", min_size=1, max_size=5)


def cut(text, borders):
    points = sorted({min(border, len(text)) for border in borders} | {0, len(text)})
    return [text[start:end] for start, end in pairwise(points)]


def expected_stop(text, stops):
    """The stop string that is complete first, then the longest: (start, end, stop) or None."""
    matches = [(text.find(stop) + len(stop), text.find(stop), stop) for stop in stops if stop in text]
    return min(matches, default=None)


@given(
    text=st.text(alphabet="abc", max_size=40),
    stops=st.lists(words, max_size=4),
    borders=st.lists(st.integers(0, 40), max_size=20),
    include=st.booleans(),
)
def test_a_stop_string_is_found_wherever_the_text_is_cut(text, stops, borders, include):
    checker = StopChecker(stops, include)
    match = expected_stop(text, stops)
    fed, out, stopped = "", "", None
    for piece in cut(text, borders):
        emitted, stopped = checker.feed(piece)
        fed, out = fed + piece, out + emitted
        if stopped is not None:
            break
        possible = [
            n
            for n in range(len(fed) + 1)
            if any(len(s) > n and s.startswith(fed[len(fed) - n :]) for s in stops)
        ]
        held = max(possible, default=0)
        assert out == fed[: len(fed) - held], "held back more or less than may begin a stop string"
    if match is None:
        assert stopped is None
        assert out + checker.flush() == text
    else:
        end, start, stop = match
        assert stopped == stop
        assert out == text[: end if include else start]
        assert checker.flush() == ""


def test_a_stop_string_across_three_pieces():
    checker = StopChecker(["\nUser:"])
    assert checker.feed("Yes.\n") == ("Yes.", None)
    assert checker.feed("Use") == ("", None)
    assert checker.feed("r: what") == ("", "\nUser:")


def test_what_only_looked_like_a_stop_string_is_given_back():
    checker = StopChecker(["STOP"])
    assert checker.feed("S") == ("", None)
    assert checker.feed("STO") == ("S", None)
    assert checker.flush() == "STO"


def test_of_two_stop_strings_the_first_complete_wins():
    assert StopChecker(["abcd", "bc"]).feed("xabcdx") == ("xa", "bc")
    assert StopChecker(["c", "bc"]).feed("abc") == ("a", "bc")


def test_an_empty_stop_string_is_refused():
    with pytest.raises(InvalidArgument, match="empty"):
        StopChecker(["a", ""])
