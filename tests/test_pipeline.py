"""splitfuse.pipeline: MII's names do what they do in MII."""

import inspect

import pytest

import splitfuse
from splitfuse import InvalidArgument, SamplingParams, StateError

pytestmark = pytest.mark.machine_independent
SMALL = {"dtype": "float32", "kv_memory": "16MiB", "token_budget": 48, "verbose": False}


@pytest.fixture(scope="module")
def pipe(tiny_llama):
    pipe = splitfuse.pipeline(tiny_llama(), **SMALL)
    yield pipe
    pipe.destroy()


def test_defaults_are_miis():
    parameters = inspect.signature(splitfuse.Pipeline.__call__).parameters
    defaults = {name: p.default for name, p in parameters.items() if name not in ("self", "prompts")}
    assert defaults == {
        "max_length": None, "max_new_tokens": None, "min_new_tokens": 0, "do_sample": True, "top_p": 0.9,
        "top_k": None, "temperature": None, "stop": (), "ignore_eos": False, "return_full_text": False,
        "streaming_fn": None,
    }  # fmt: skip


def test_one_response_a_prompt(pipe):
    texts = ["the cat", "over the hills"]
    responses = pipe(texts, max_new_tokens=9, do_sample=False)
    outputs = pipe.llm.generate(texts, SamplingParams(max_tokens=9, temperature=0.0))
    assert [r.generated_text for r in responses] == [o.text for o in outputs]
    assert [r.prompt_length for r in responses] == [len(o.prompt_token_ids) for o in outputs]
    assert [r.generated_length for r in responses] == [len(o.token_ids) for o in outputs]
    assert [r.finish_reason for r in responses] == [o.finish_reason for o in outputs]
    assert pipe("the cat", max_new_tokens=9, do_sample=False) == responses[:1]
    assert str(responses[0]) == responses[0].generated_text


def test_full_text_begins_with_the_prompt(pipe):
    plain = pipe("the cat", max_new_tokens=9, do_sample=False)[0]
    full = pipe("the cat", max_new_tokens=9, do_sample=False, return_full_text=True)[0]
    assert full.generated_text == "the cat" + plain.generated_text
    assert full.generated_length == plain.generated_length


def test_max_length_counts_the_prompt(pipe):
    prompt = "the cat"
    used = len(pipe.llm.tokenizer.encode(prompt))
    greedy = {"do_sample": False, "ignore_eos": True}
    assert pipe(prompt, max_length=used + 5, **greedy)[0].generated_length == 5
    assert pipe(prompt, max_length=used + 5, max_new_tokens=3, **greedy)[0].generated_length == 3
    with pytest.raises(InvalidArgument, match="max_length"):
        pipe(prompt, max_length=used, **greedy)
    context = pipe.llm.max_model_len
    assert pipe(prompt, **greedy)[0].generated_length == context - used


def test_sampling_follows_its_parameters(pipe):
    greedy = pipe("the cat", max_new_tokens=12, do_sample=False, temperature=5.0, top_k=3)[0]
    assert greedy == pipe("the cat", max_new_tokens=12, do_sample=False)[0]
    assert greedy == pipe("the cat", max_new_tokens=12, top_k=1)[0]
    drawn = {
        pipe("the cat", max_new_tokens=12, temperature=2.0, top_p=1.0)[0].generated_text for _ in range(4)
    }
    assert len(drawn) > 1


def test_min_new_tokens_and_stop(pipe):
    whole = pipe("the cat", max_new_tokens=30, do_sample=False, ignore_eos=True)[0]
    stop = whole.generated_text[8:10]
    cut = pipe("the cat", max_new_tokens=30, do_sample=False, ignore_eos=True, stop=[stop])[0]
    assert cut.generated_text == whole.generated_text[: whole.generated_text.index(stop)]
    assert cut.finish_reason == "stop"
    held = pipe(
        "the cat", max_new_tokens=30, min_new_tokens=30, do_sample=False, ignore_eos=True, stop=[stop]
    )
    assert held[0].generated_text == whole.generated_text


@pytest.mark.parametrize("full", [False, True])
def test_streaming_fn_gets_the_pieces(pipe, full):
    pieces = []
    kwargs = {"max_new_tokens": 15, "do_sample": False, "ignore_eos": True, "return_full_text": full}
    whole = pipe("the cat", streaming_fn=lambda responses: pieces.extend(responses), **kwargs)
    assert whole == pipe("the cat", **kwargs)
    assert "".join(p.generated_text for p in pieces) == whole[0].generated_text
    assert sum(p.generated_length for p in pieces) == 15
    assert [p.finish_reason for p in pieces] == [None] * 14 + ["length"]


def test_bad_calls(pipe):
    with pytest.raises(InvalidArgument, match="single prompt"):
        pipe(["a", "b"], streaming_fn=print)
    with pytest.raises(InvalidArgument, match="top_p"):
        pipe("a", top_p=2.0)
    with pytest.raises(TypeError, match="num_beams"):
        pipe("a", num_beams=4)
    with pytest.raises(ZeroDivisionError):
        pipe("a", max_new_tokens=5, streaming_fn=lambda responses: 1 / 0)
    assert pipe("the", max_new_tokens=1)[0].generated_length == 1


def test_destroy(tiny_llama):
    pipe = splitfuse.pipeline(tiny_llama(), max_length=64, **SMALL)
    assert pipe.llm.max_model_len == 64
    pipe.destroy()
    with pytest.raises(StateError):
        pipe("the")
