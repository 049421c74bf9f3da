"""Rotary embeddings: frequencies and magnitudes of published models' parameters are those of transformers' own
modules, bad ones are refused by name, and an engine takes the frequencies that its longest sequence calls for."""

import importlib
from typing import NamedTuple

import numpy as np
import pytest
import torch

from splitfuse import ConfigError, _core
from splitfuse.models.family import Fields
from splitfuse.models.rope import rope

pytestmark = pytest.mark.machine_independent

LLAMA31 = {
    "rope_type": "llama3",
    "factor": 8.0,
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}
YARN4 = {"type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768}
DEEPSEEK = {
    "type": "yarn",
    "factor": 40,
    "beta_fast": 32,
    "beta_slow": 1,
    "mscale": 1.0,
    "mscale_all_dim": 1.0,
    "original_max_position_embeddings": 4096,
}
GPT_OSS = {
    "rope_type": "yarn",
    "factor": 32.0,
    "beta_fast": 32.0,
    "beta_slow": 1.0,
    "truncate": False,
    "original_max_position_embeddings": 4096,
}


def long(count):
    """Divisors that grow as those of Phi-3 do."""
    return {
        "type": "longrope",
        "short_factor": np.linspace(1.05, 3.05, count).round(2).tolist(),
        "long_factor": np.geomspace(1.07, 64.0, count).round(2).tolist(),
    }


LONG = {**long(64), "original_max_position_embeddings": 1024}


class Case(NamedTuple):
    module: str  # of transformers.models
    name: str  # of its classes
    head_dim: int
    longest: int
    fields: dict  # of config.json
    partial: float | None = None  # what the family takes where the file says nothing


CASES = {
    "llama 2": Case("llama", "Llama", 128, 4096, {}),
    "smollm2": Case("llama", "Llama", 64, 8192, {"rope_theta": 100000}),
    "llama 3.1": Case("llama", "Llama", 128, 131072, {"rope_theta": 500000.0, "rope_scaling": LLAMA31}),
    "llama 3.2": Case(
        "llama", "Llama", 64, 131072, {"rope_theta": 500000.0, "rope_scaling": {**LLAMA31, "factor": 32.0}}
    ),
    "deepseek coder": Case(
        "llama",
        "Llama",
        128,
        16384,
        {"rope_theta": 100000, "rope_scaling": {"type": "linear", "factor": 4.0}},
    ),
    "dynamic": Case("llama", "Llama", 128, 4096, {"rope_scaling": {"type": "dynamic", "factor": 2.0}}),
    "qwen 2.5": Case("qwen2", "Qwen2", 128, 131072, {"rope_theta": 1000000.0, "rope_scaling": YARN4}),
    "yarn, attention factor": Case(
        "llama", "Llama", 128, 65536, {"rope_scaling": {**YARN4, "attention_factor": 1.5, "beta_fast": 0}}
    ),
    "yarn, nothing between": Case(
        "llama",
        "Llama",
        64,
        65536,
        {"rope_scaling": {**YARN4, "truncate": False, "beta_fast": 8, "beta_slow": 8, "finetuned": True}},
    ),
    "deepseek 3": Case("deepseek_v3", "DeepseekV3", 64, 163840, {"rope_scaling": DEEPSEEK}),
    "deepseek 2": Case(
        "llama",
        "Llama",
        64,
        163840,
        {"rope_scaling": {**DEEPSEEK, "mscale": 0.707, "mscale_all_dim": 0.5}},
    ),
    "gpt-oss": Case("gpt_oss", "GptOss", 64, 131072, {"rope_theta": 150000, "rope_scaling": GPT_OSS}),
    "phi 3 128k": Case(
        "phi3",
        "Phi3",
        96,
        131072,
        {"original_max_position_embeddings": 4096, "rope_scaling": long(48)},
        1.0,
    ),
    "phi 4 mini": Case(
        "phi3",
        "Phi3",
        128,
        131072,
        {
            "original_max_position_embeddings": 4096,
            "partial_rotary_factor": 0.75,
            "rope_scaling": long(48),
        },
        1.0,
    ),
    "longrope, factor": Case(
        "llama",
        "Llama",
        96,
        131072,
        {"rope_scaling": {**long(48), "factor": 16.0, "original_max_position_embeddings": 8192}},
    ),
    "longrope, attention factor": Case(
        "llama", "Llama", 96, 32768, {"rope_scaling": {**long(48), "attention_factor": 1.25}}
    ),
    "phi 2": Case("phi", "Phi", 80, 2048, {"partial_rotary_factor": 0.4}, 0.5),
    "stablelm": Case("stablelm", "StableLm", 64, 4096, {}, 0.25),
    "pythia": Case("gpt_neox", "GPTNeoX", 64, 2048, {"rope_theta": 10000}, 0.25),
    "glm 4": Case("glm4", "Glm4", 128, 32768, {"rope_theta": 10000.0}, 0.5),
}
every_case = pytest.mark.parametrize("case", CASES.values(), ids=CASES)


def read(fields, head_dim=128, longest=4096, **options):
    return rope(Fields({"max_position_embeddings": longest, **fields}, "config.json"), head_dim, **options)


def of_transformers(module, name, head_dim, longest, fields):
    """The rotary module of a tiny configuration, and the configuration."""
    folder = f"transformers.models.{module}"
    config = getattr(importlib.import_module(f"{folder}.configuration_{module}"), f"{name}Config")(
        **{
            "hidden_size": 2 * head_dim,
            "num_attention_heads": 2,
            "head_dim": head_dim,
            "max_position_embeddings": longest,
            **({"qk_rope_head_dim": head_dim} if module == "deepseek_v3" else {}),
            **{key: dict(value) if isinstance(value, dict) else value for key, value in fields.items()},
        }
    )
    return getattr(importlib.import_module(f"{folder}.modeling_{module}"), f"{name}RotaryEmbedding")(
        config
    ), config


def floats(values):
    return np.array(values, dtype=np.float32)


def ulps(a, b):
    """Steps of float32 between two lists, at most."""
    return int(np.abs(floats(a).view(np.int32).astype(np.int64) - floats(b).view(np.int32)).max())


@pytest.fixture
def exact_powers(monkeypatch):
    """torch's powers of float32 may be one step off, differently on each processor; here they are rounded once."""
    monkeypatch.setattr(
        torch.Tensor, "__rpow__", lambda self, base: torch.pow(float(np.float32(base)), self.double()).float()
    )


@every_case
def test_every_step_is_that_of_transformers(case, exact_powers):
    """Given the same powers, to the bit."""
    theirs, _ = of_transformers(*case[:5])
    ours = read(case.fields, case.head_dim, case.longest, partial=case.partial)
    np.testing.assert_array_equal(floats(ours.inv_freq), theirs.inv_freq.numpy())
    assert ours.magnitude == np.float32(theirs.attention_scaling)


@every_case
def test_angles_are_those_of_transformers(case):
    """Frequencies with the powers that torch has on this machine; and up to the longest sequence cosines and sines of
    what an engine multiplies."""
    theirs, _ = of_transformers(*case[:5])
    ours = read(case.fields, case.head_dim, case.longest, partial=case.partial)
    assert ulps(ours.inv_freq, theirs.inv_freq.numpy()) <= 1
    first = ours.long_from or case.longest
    positions = np.unique(np.linspace(0, first - 1, 4000).astype(np.int64))
    cos, sin = theirs(torch.zeros(1), torch.from_numpy(positions)[None])
    angles = positions.astype(np.float32)[:, None] * floats(ours.inv_freq)
    half = len(ours.inv_freq)
    # Libraries differ in the last bit of a cosine; a step in a frequency counts as often as there are positions.
    differ = floats(ours.inv_freq) != theirs.inv_freq.numpy()
    steps = positions[:, None] * np.spacing(floats(ours.inv_freq)) + np.spacing(angles)
    allowed = ours.magnitude * (differ * steps + 3e-7)
    for function, value in ((np.cos, cos), (np.sin, sin)):
        mine = function(angles) * np.float32(ours.magnitude)
        assert (np.abs(mine - value[0, :, :half].numpy()) <= allowed).all()


@pytest.mark.parametrize("name", ["phi 3 128k", "phi 4 mini", "longrope, factor"])
def test_longer_sequences_have_the_frequencies_that_transformers_takes_for_them(name, exact_powers):
    case = CASES[name]
    theirs, config = of_transformers(*case[:5])
    ours = read(case.fields, case.head_dim, case.longest, partial=case.partial)
    assert ours.long_from == config.rope_parameters["original_max_position_embeddings"]
    for longest, expected in ((ours.long_from, ours.inv_freq), (ours.long_from + 1, ours.long_inv_freq)):
        theirs(torch.zeros(1), torch.tensor([[0, longest - 1]]))
        np.testing.assert_array_equal(floats(expected), theirs.inv_freq.numpy())
    assert ours.long_inv_freq != ours.inv_freq
    assert ours.long_magnitude == ours.magnitude == np.float32(theirs.attention_scaling)


def test_dynamic_scaling_is_that_of_sequences_up_to_the_trained_length(exact_powers):
    case = CASES["dynamic"]
    theirs, _ = of_transformers(*case[:5])
    theirs(torch.zeros(1), torch.tensor([[case.longest - 1]]))
    ours = read(case.fields, case.head_dim, case.longest)
    np.testing.assert_array_equal(floats(ours.inv_freq), theirs.inv_freq.numpy())
    assert ours.long_from == 0


@pytest.mark.parametrize("kind", ["full_attention", "sliding_attention"])
def test_gemma_3_has_one_for_each_kind_of_layer(kind, exact_powers):
    from transformers import Gemma3TextConfig
    from transformers.models.gemma3.modeling_gemma3 import Gemma3RotaryEmbedding

    both = {
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 1e6},
        "sliding_attention": {"rope_type": "default", "rope_theta": 1e4, "factor": None},
    }
    fields = {"rope_parameters": {key: dict(value) for key, value in both.items()}, "num_hidden_layers": 6}
    config = Gemma3TextConfig(hidden_size=512, num_attention_heads=2, head_dim=256, **fields)
    theirs = Gemma3RotaryEmbedding(config)
    ours = read({}, 256, 131072, values=both[kind])
    np.testing.assert_array_equal(floats(ours.inv_freq), getattr(theirs, f"{kind}_inv_freq").numpy())


@pytest.mark.parametrize("name", [name for name, case in CASES.items() if "rope_scaling" in case.fields])
def test_today_and_older_spellings_say_the_same(name):
    case = CASES[name]
    scaling = dict(case.fields["rope_scaling"])
    kind = scaling.pop("rope_type", None) or scaling.pop("type")
    theta = case.fields.get("rope_theta", 10000.0)
    rest = {key: value for key, value in case.fields.items() if key not in ("rope_theta", "rope_scaling")}
    expected = read(case.fields, case.head_dim, case.longest, partial=case.partial)
    for words in (
        {"rope_theta": theta, "rope_scaling": {"type": kind, **scaling}},
        {"rope_theta": theta, "rope_scaling": {"rope_type": kind, "type": kind, "mscale": None, **scaling}},
        {"rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}},
        {"rope_theta": 7.0, "rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling}},
        {
            "rope_scaling": {"type": kind, **scaling},
            "rope_parameters": {"rope_type": kind, "rope_theta": theta, **scaling},
        },
    ):
        assert read({**rest, **words}, case.head_dim, case.longest, partial=case.partial) == expected


def test_what_a_family_takes_where_the_file_says_nothing():
    assert read({}, theta=5e5) == read({"rope_theta": 5e5})
    assert read({}, 64, partial=0.5) == read({"partial_rotary_factor": 0.5}, 64, partial=1.0)
    assert read({"rope_parameters": {"partial_rotary_factor": 0.25}}, 64, partial=0.5) == read(
        {}, 64, partial=0.25
    )
    assert len(read({}, 64, partial=0.25).inv_freq) == 8
    assert read({"rope_scaling": {"rope_type": "default", "factor": 8.0, "beta_fast": 32}}) == read({})
    assert read({"rope_scaling": {"rope_type": "none"}}) == read({})
    assert read({"rope_scaling": {**LONG, "type": "su"}}) == read({"rope_scaling": LONG})


def test_both_languages_have_the_same_plain_frequencies():
    for theta in (10000.0, 150000.0, 500000.0, 1e6, 8e6, 10000.1):
        for dims in (2, 8, 32, 64, 96, 128, 256, 1024):
            assert read({"rope_theta": theta}, dims).inv_freq == _core.rope_frequencies(theta, dims)


HUGE = 10**400


@pytest.mark.parametrize(
    ("fields", "named"),
    [
        ({"rope_theta": 1}, "rope_theta is 1; expected a number above 1"),
        ({"rope_theta": -10000.0}, r"rope_theta is -10000\.0; expected a number from"),
        ({"rope_theta": "10000"}, "rope_theta is '10000'; expected a number"),
        ({"rope_theta": True}, "rope_theta is True"),
        ({"rope_theta": float("inf")}, "rope_theta is inf"),
        ({"rope_theta": HUGE}, "rope_theta is 1000"),
        ({"rope_scaling": [1]}, r"rope_scaling is \[1\]; expected an object"),
        ({"rope_parameters": "yarn"}, "rope_parameters is 'yarn'; expected an object"),
        ({"rope_scaling": {"type": ["yarn"]}}, r"RoPE scaling \['yarn'\] is not supported; supported: default"),
        ({"rope_scaling": {"type": "mrope"}}, "RoPE scaling mrope is not supported"),
        ({"rope_scaling": {"type": "yarn", "rope_type": "linear", "factor": 2}}, "RoPE scaling linear, yarn"),
        (
            {"rope_scaling": {"rope_type": "linear", "factor": 2}, "rope_parameters": {"rope_type": "default"}},
            "rope_scaling and rope_parameters give different values of rope_type",
        ),
        ({"rope_scaling": {"type": "linear", "factor": 2, "beta_fast": 1}}, "RoPE field beta_fast is not"),
        ({"rope_scaling": {"mrope_section": [16, 24, 24]}}, "RoPE field mrope_section is not supported"),
        ({"rope_parameters": {"full_attention": {}}}, "RoPE field full_attention is not supported"),
        ({"partial_rotary_factor": 0.5}, r"partial_rotary_factor is 0\.5; only 1 is supported"),
        ({"rope_parameters": {"partial_rotary_factor": 0.5}}, "partial_rotary_factor is 0.5; only 1"),
        *[
            ({"rope_scaling": {**values, "factor": factor}}, f"factor is {shown}")
            for values in ({"type": "linear"}, {"type": "dynamic"}, LLAMA31, YARN4)
            for factor, shown in ((0, "0; expected a number from"), (-2.0, "-2.0"), ("8", "'8'"), (1e300, "1e"))
        ],
        *[
            ({"rope_scaling": {key: value for key, value in values.items() if key != gone}}, f"lacks {gone}")
            for values, gone in (
                ({"type": "linear"}, "factor"),
                ({"type": "dynamic"}, "factor"),
                (LLAMA31, "factor"),
                (LLAMA31, "low_freq_factor"),
                (LLAMA31, "high_freq_factor"),
                (YARN4, "factor"),
                (LONG, "short_factor"),
                (LONG, "long_factor"),
            )
        ],
        *[
            ({"rope_scaling": {**values, "original_max_position_embeddings": bad}}, f"original_.* is {bad}")
            for values in (LLAMA31, YARN4, LONG)
            for bad in (0, 1, -4096, 4096.5)
        ],
        ({"rope_scaling": {**LLAMA31, "low_freq_factor": 4}}, "low_freq_factor is 4; expected less than"),
        ({"rope_scaling": {**LLAMA31, "high_freq_factor": []}}, r"high_freq_factor is \[\]"),
        ({"rope_scaling": {**YARN4, "truncate": 1}}, "truncate is 1; expected true or false"),
        ({"rope_scaling": {**YARN4, "beta_fast": -1}}, "beta_fast is -1"),
        ({"rope_scaling": {**YARN4, "beta_slow": 64}}, "beta_fast is 32; expected no less than beta_slow, 64"),
        ({"rope_scaling": {**YARN4, "attention_factor": 0}}, "attention_factor is 0"),
        ({"rope_scaling": {**YARN4, "mscale": -1, "mscale_all_dim": 1}}, "mscale is -1"),
        ({"rope_scaling": {**YARN4, "mscale_all_dim": "1"}}, "mscale_all_dim is '1'"),
        ({"rope_scaling": {**LONG, "attention_factor": -1}}, "attention_factor is -1"),
        ({"rope_scaling": {**LONG, "factor": 0}}, "factor is 0"),
        ({"rope_scaling": {**LONG, "short_factor": [1.0] * 63}}, "short_factor: expected a list of 64 numbers"),
        ({"rope_scaling": {**LONG, "long_factor": 64}}, "long_factor: expected a list of 64"),
        ({"rope_scaling": {**LONG, "long_factor": [1.0] * 63 + [0]}}, r"long_factor\[63\] is 0"),
        ({"rope_scaling": {**LONG, "short_factor": [None] + [1.0] * 63}}, r"short_factor\[0\] is missing"),
        ({"rope_scaling": LONG, "max_position_embeddings": None}, "max_position_embeddings is missing"),
        ({"rope_scaling": {**YARN4, "original_max_position_embeddings": None}, "max_position_embeddings": None},
         "max_position_embeddings is missing"),
    ],
)  # fmt: skip
def test_a_bad_field_is_named(fields, named):
    with pytest.raises(ConfigError, match=rf"^config\.json: .*{named}"):
        read(fields)


@pytest.mark.parametrize(
    ("head_dim", "share", "named"),
    [
        (80, 0.3375, "27 of 80 dimensions; expected an even number of them"),
        (64, 0.01, "0 of 64"),
        (64, 2, "128 of 64"),
        (64, 0, "partial_rotary_factor is 0"),
        (64, "half", "partial_rotary_factor is 'half'"),
        (2**31 - 1, 1, "head_dim is 2147483647; expected at most 1024"),
    ],
)
def test_a_bad_part_of_a_head_is_named(head_dim, share, named):
    with pytest.raises(ConfigError, match=named):
        read({"partial_rotary_factor": share}, head_dim, partial=1.0)


# The engine's choice


def first_logits(ropes, **engine):
    """Of 60 tokens, by an engine of a tiny random model."""
    model = _core.ModelConfig(
        vocab_size=61, hidden_size=32, num_layers=2, num_heads=2, num_kv_heads=1, head_dim=16,
        intermediate_size=48, max_position=4096, ropes=ropes,
    )  # fmt: skip
    rng = np.random.default_rng(5)
    weights = {
        name: rng.normal(0, 0.3, shape).astype(np.float32) for name, shape in _core.canonical_names(model)
    }
    config = _core.EngineConfig(dtype="float32", threads=1, token_budget=64, **engine)
    made, probe = _core.testing.probed_engine(
        model, _core.callback_source(list(weights), weights.__getitem__), config
    )
    probe.capture = True
    made.put(0, rng.integers(0, 61, 60).tolist(), _core.SamplingParams(temperature=0.0, max_tokens=1))
    made.step()
    [(position, logits)] = probe.take()
    assert position == 60
    return logits


@pytest.mark.parametrize(
    ("engine", "far"),
    [
        ({"max_model_len": 127, "kv_bytes": 1 << 22}, False),
        ({"max_model_len": 128, "kv_bytes": 1 << 22}, False),
        ({"max_model_len": 129, "kv_bytes": 1 << 22}, True),
        ({"kv_bytes": 1 << 22}, True),
    ],
)
def test_an_engine_takes_the_frequencies_of_its_longest_sequence(engine, far):
    """Whatever the length of the sequence at hand: the same sequence has the same keys all its life."""
    near = {"inv_freq": _core.rope_frequencies(10000.0, 16), "magnitude": 1.25}
    long = {"inv_freq": [value / 8 for value in near["inv_freq"]], "magnitude": 1.5}
    both = _core.RopeConfig(
        **near, long_from=128, long_inv_freq=long["inv_freq"], long_magnitude=long["magnitude"]
    )
    found = first_logits([both], **engine)
    expected = [first_logits([_core.RopeConfig(**kind)], **engine) for kind in (near, long)]
    assert not np.array_equal(*expected)
    np.testing.assert_array_equal(found, expected[far])
