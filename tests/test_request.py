"""SamplingParams: defaults are vLLM's, every value out of range is refused by name."""

import dataclasses
import math
import pickle

import numpy as np
import pytest

from splitfuse import Completion, InvalidArgument, RequestOutput, SamplingParams

pytestmark = pytest.mark.machine_independent
NAN, INF = math.nan, math.inf


def test_defaults_are_vllms():
    params = SamplingParams()
    assert dataclasses.asdict(params) == {
        "n": 1, "max_tokens": 16, "min_tokens": 0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "min_p": 0.0,
        "seed": None, "stop": (), "stop_token_ids": (), "ignore_eos": False, "skip_special_tokens": True,
        "include_stop_str_in_output": False, "repetition_penalty": 1.0, "presence_penalty": 0.0,
        "frequency_penalty": 0.0, "logit_bias": {}, "logprobs": None, "prompt_logprobs": None,
    }  # fmt: skip


@pytest.mark.parametrize(
    ("name", "values"),
    [
        ("n", [0, -1, 1.5, "2", True, None]),
        ("max_tokens", [0, -1, 1.5, "16", False, 2**31]),
        ("min_tokens", [-1, 0.0, None]),
        ("temperature", [-0.1, NAN, INF, -INF, "1", None, True, [1.0]]),
        ("top_p", [0, -0.5, 1.01, NAN, INF, "x", None, 1e-50]),
        ("top_k", [-2, 1.0, "1", None]),
        ("min_p", [-0.01, 1.01, NAN, None]),
        ("seed", [-1, 2**64, 0.5, "7", True]),
        ("stop", [[""], "", ["a", 1], 3, {"a": 1}]),
        ("stop_token_ids", [[-1], ["a"], 5, "ab", [1.5]]),
        ("ignore_eos", [1, None, "yes"]),
        ("include_stop_str_in_output", [0]),
        ("skip_special_tokens", ["no"]),
        ("repetition_penalty", [0, -1, NAN, INF]),
        ("presence_penalty", [-2.1, 2.1, NAN]),
        ("frequency_penalty", [-2.1, 2.1, NAN, "0"]),
        ("logit_bias", [[1, 2], {"a": 1.0}, {-1: 1.0}, {1: NAN}, {1: INF}, {1: "x"}]),
        ("logprobs", [-1, 21, 1.0, True]),
        ("prompt_logprobs", [-1, 21, "0"]),
    ],
)
def test_refuses_by_name(name, values):
    for value in values:
        with pytest.raises(InvalidArgument, match=name) as caught:
            SamplingParams(**{name: value})
        assert isinstance(caught.value, ValueError)
        assert "\n" not in str(caught.value)


def test_edges_are_accepted():
    SamplingParams(
        temperature=0, top_p=1, top_k=1, min_p=1, seed=2**64 - 1, presence_penalty=-2, frequency_penalty=2,
        logprobs=20, prompt_logprobs=0, max_tokens=None, min_tokens=5, n=3, logit_bias={0: -100},
        stop_token_ids=[0],
    )  # fmt: skip
    assert SamplingParams(top_k=-1).top_k == 0
    assert SamplingParams(stop="a").stop == ("a",)
    assert SamplingParams(stop=None, stop_token_ids=None, logit_bias=None).stop == ()
    assert SamplingParams(max_tokens=np.int64(3), temperature=np.float32(0.5), seed=0).max_tokens == 3


def test_min_tokens_above_max_tokens_is_refused():
    with pytest.raises(InvalidArgument, match="min_tokens"):
        SamplingParams(min_tokens=17)
    SamplingParams(min_tokens=17, max_tokens=None)


def test_unknown_name_is_refused():
    with pytest.raises(TypeError, match="beam_width"):
        SamplingParams(beam_width=4)


def test_is_immutable_and_copies():
    params = SamplingParams(stop=["a"], seed=3)
    with pytest.raises(dataclasses.FrozenInstanceError):
        params.seed = 4
    assert dataclasses.replace(params, seed=4).stop == ("a",)
    assert pickle.loads(pickle.dumps(params)) == params


def test_to_native_carries_every_field():
    params = SamplingParams(
        temperature=0.5, top_p=0.75, top_k=40, min_p=0.25, stop_token_ids=[7], ignore_eos=True, min_tokens=2,
        repetition_penalty=1.5, presence_penalty=0.5, frequency_penalty=-0.5, logit_bias={3: -1.5},
        logprobs=4, prompt_logprobs=2, n=2, max_tokens=None,
    )  # fmt: skip
    native = params.to_native(max_tokens=9, seed=2**64 - 1, sample_index=0)
    expected = {
        "max_tokens": 9, "temperature": 0.5, "top_p": 0.75, "top_k": 40, "min_p": 0.25, "seed": 2**64 - 1,
        "sample_index": 0, "repetition_penalty": 1.5, "presence_penalty": 0.5, "frequency_penalty": -0.5,
        "logit_bias": [(3, -1.5)], "stop_token_ids": [7], "ignore_eos": True, "min_tokens": 2, "logprobs": 4,
        "prompt_logprobs": 2,
    }  # fmt: skip
    assert {name: getattr(native, name) for name in expected} == expected
    second = params.to_native(max_tokens=9, seed=5, sample_index=1)
    assert (second.sample_index, second.prompt_logprobs, second.seed) == (1, -1, 5)
    assert SamplingParams().to_native(max_tokens=1, seed=0).logprobs == -1


def test_shortcuts_are_those_of_the_first_answer():
    calls = []

    def decode() -> str:
        calls.append(1)
        return "late"

    first = Completion(0, [1, 2], "stop", None, [{}], -1.0, _text=decode)
    output = RequestOutput("r", None, [9], [first, Completion(1, [3], "length")])
    assert (output.token_ids, output.finish_reason, output.logprobs) == ([1, 2], "stop", [{}])
    assert not calls
    assert output.text == output.text == "late"
    assert calls == [1]
