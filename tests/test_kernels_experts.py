"""Mixtures of experts, on every rung of the ISA ladder: held to transformers' own blocks, to float64, and bit for bit
to the linear layers that they are made of.

`Experts` poisons its output with NaN and fails if anything beyond the last column was written.
"""

import functools

import numpy as np
import pytest
import torch
from transformers import (
    DeepseekV2Config,
    DeepseekV3Config,
    GptOssConfig,
    MixtralConfig,
    Qwen2MoeConfig,
    Qwen3MoeConfig,
)
from transformers.models.deepseek_v2 import modeling_deepseek_v2 as deepseek_v2
from transformers.models.deepseek_v3 import modeling_deepseek_v3 as deepseek_v3
from transformers.models.gpt_oss import modeling_gpt_oss as gpt_oss
from transformers.models.mixtral import modeling_mixtral as mixtral
from transformers.models.qwen2_moe import modeling_qwen2_moe as qwen2
from transformers.models.qwen3_moe import modeling_qwen3_moe as qwen3

from splitfuse import _core
from splitfuse._core import MoeConfig

pytestmark = pytest.mark.machine_independent  # each test names its instruction set

ISAS = _core.cpu_isas()
HIDDEN = 40
WIDTH = 24
SHARED = 50

every_isa = pytest.mark.parametrize("isa", ISAS)


def same_bits(a: np.ndarray, b: np.ndarray) -> bool:
    return a.shape == b.shape and np.array_equal(a.view(np.uint32), b.view(np.uint32))


# ---- What transformers makes, and the same in our words


def grouped(experts: int, top_k: int, groups: int, top_groups: int, **more):
    names = {
        "n_group": groups,
        "topk_group": top_groups,
        "num_experts_per_tok": top_k,
        "n_routed_experts": experts,
    }
    sizes = {"hidden_size": HIDDEN, "num_attention_heads": 4, "moe_intermediate_size": WIDTH}
    return {**names, **sizes, **more}


def mixtral_block(experts: int, top_k: int):
    config = MixtralConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=experts, num_experts_per_tok=top_k
    )
    return mixtral.MixtralSparseMoeBlock(config), MoeConfig(scoring="softmax", normalize=True)


def qwen_sizes(experts: int, top_k: int, normalize: bool):
    sizes = {"hidden_size": HIDDEN, "moe_intermediate_size": WIDTH, "num_experts": experts}
    return {**sizes, "num_experts_per_tok": top_k, "norm_topk_prob": normalize}


def qwen2_block(experts: int, top_k: int, normalize: bool = False):
    config = Qwen2MoeConfig(**qwen_sizes(experts, top_k, normalize), shared_expert_intermediate_size=SHARED)
    ours = MoeConfig(
        scoring="softmax", normalize=normalize, shared_intermediate_size=SHARED, shared_gate=True
    )
    return qwen2.Qwen2MoeSparseMoeBlock(config), ours


def qwen3_block(experts: int, top_k: int, normalize: bool = True):
    config = Qwen3MoeConfig(**qwen_sizes(experts, top_k, normalize))
    return qwen3.Qwen3MoeSparseMoeBlock(config), MoeConfig(scoring="softmax", normalize=normalize)


def deepseek_v2_block(experts: int, top_k: int, groups: int = 1, top_groups: int = 1):
    method = "group_limited_greedy" if groups > 1 else "greedy"
    sizes = grouped(experts, top_k, groups, top_groups, topk_method=method, n_shared_experts=2)
    config = DeepseekV2Config(**sizes, routed_scaling_factor=2.5, mlp_bias=False, hidden_act="silu")
    ours = MoeConfig(scoring="softmax", scale=2.5, groups=groups, top_groups=top_groups)
    ours.shared_intermediate_size = 2 * WIDTH
    return deepseek_v2.DeepseekV2Moe(config), ours


def deepseek_v3_block(experts: int, top_k: int, groups: int = 1, top_groups: int = 1, normalize: bool = True):
    sizes = grouped(experts, top_k, groups, top_groups, norm_topk_prob=normalize, n_shared_experts=1)
    config = DeepseekV3Config(**sizes, routed_scaling_factor=1.5)
    ours = MoeConfig(scoring="sigmoid", normalize=normalize, scale=1.5, groups=groups, top_groups=top_groups)
    ours.correction, ours.shared_intermediate_size = True, WIDTH
    return deepseek_v3.DeepseekV3MoE(config), ours


def gpt_oss_block(experts: int, top_k: int):
    config = GptOssConfig(
        hidden_size=HIDDEN, intermediate_size=WIDTH, num_local_experts=experts, num_experts_per_tok=top_k
    )
    block = gpt_oss.GptOssMLP(config)
    block.gate = block.router
    return block, MoeConfig(scoring="top_softmax", router_bias=True)


def sized(moe: MoeConfig, experts: int, top_k: int) -> MoeConfig:
    moe.experts, moe.top_k, moe.intermediate_size = experts, top_k, WIDTH
    return moe


# (name, how to make it, experts, top_k, more)
BLOCKS = [
    ("mixtral", mixtral_block, 8, 2, {}),
    ("qwen2", qwen2_block, 60, 4, {}),
    ("qwen2-normalized", qwen2_block, 12, 3, {"normalize": True}),
    ("qwen3", qwen3_block, 128, 8, {}),
    ("qwen3-of-many", qwen3_block, 130, 2, {"normalize": False}),
    ("deepseek-v2-lite", deepseek_v2_block, 64, 6, {}),
    ("deepseek-v2", deepseek_v2_block, 160, 6, {"groups": 8, "top_groups": 3}),
    ("deepseek-v3", deepseek_v3_block, 256, 8, {"groups": 8, "top_groups": 4}),
    ("deepseek-v3-of-one-group", deepseek_v3_block, 16, 5, {"normalize": False}),
]
ROUTERS = [*BLOCKS, ("gpt-oss", gpt_oss_block, 32, 4, {}), ("gpt-oss-of-many", gpt_oss_block, 128, 2, {})]

every_block = pytest.mark.parametrize("case", BLOCKS, ids=lambda case: case[0])
every_router = pytest.mark.parametrize("case", ROUTERS, ids=lambda case: case[0])


def make(case, rng: np.random.Generator):
    """transformers' block with random weights, and its configuration in our words."""
    _, build, experts, top_k, more = case
    block, moe = build(experts, top_k, **more)
    with torch.no_grad():
        for name, tensor in [*block.named_parameters(), *block.named_buffers()]:
            size = 0.2 if "bias" in name else 1.5 / np.sqrt(tensor.shape[-1])
            tensor.copy_(torch.from_numpy(rng.standard_normal(tuple(tensor.shape)) * size))
    return block.eval(), sized(moe, experts, top_k)


def array(tensor: torch.Tensor) -> np.ndarray:
    return tensor.detach().float().numpy()


def weights_of(block, moe: MoeConfig):
    """router, correction, [(gate, up, down)], the shared expert last."""
    router, correction = array(block.gate.weight), None
    if moe.correction:
        correction = array(block.gate.e_score_correction_bias)
    experts = []
    for both, down in zip(block.experts.gate_up_proj, block.experts.down_proj, strict=True):
        gate, up = array(both).reshape(2, WIDTH, HIDDEN)
        experts.append((gate, up, array(down)))
    if moe.shared_intermediate_size > 0:
        shared = block.shared_expert if moe.shared_gate else block.shared_experts
        experts.append(
            tuple(array(part.weight) for part in (shared.gate_proj, shared.up_proj, shared.down_proj))
        )
    if moe.shared_gate:
        router = np.concatenate([router, array(block.shared_expert_gate.weight)])
    return router, correction, experts


def ours_of(block, moe: MoeConfig, max_rows: int, **where) -> _core.testing.Experts:
    router, correction, experts = weights_of(block, moe)
    run = _core.testing.Experts(moe, HIDDEN, max_rows, **where)
    run.set_router(router, None, correction)
    for e, (gate, up, down) in enumerate(experts):
        run.set_expert(e, gate, up, down)
    return run


def routing(moe: MoeConfig, correction: np.ndarray | None, logits: np.ndarray) -> np.ndarray:
    """Weights [rows, experts (+ 1)] from logits [rows, experts (+ 1)], as the native router has them: the router is the
    identity, and what expert e makes of a row is a one at column e."""
    columns = moe.experts + (moe.shared_intermediate_size > 0)
    alone = MoeConfig(
        **{name: getattr(moe, name) for name in ("experts", "top_k", "scoring", "normalize", "scale")}
    )
    alone.groups, alone.top_groups, alone.correction = moe.groups, moe.top_groups, moe.correction
    alone.shared_gate, alone.shared_intermediate_size = moe.shared_gate, int(moe.shared_intermediate_size > 0)
    alone.intermediate_size, alone.expert_bias = 1, True
    run = _core.testing.Experts(alone, columns, len(logits), isa="ref", threads=2)
    router = np.eye(moe.experts + moe.shared_gate, columns, dtype=np.float32)
    run.set_router(router, None, correction)
    nothing, one = np.zeros((1, columns), np.float32), np.zeros(1, np.float32)
    for e in range(columns):
        run.set_expert(e, nothing, nothing, nothing.T, [one, one, np.eye(columns, dtype=np.float32)[e]])
    padded = np.zeros((len(logits), columns), np.float32)
    padded[:, : logits.shape[1]] = logits
    return run.run(padded)


# ---- Routing


@every_router
@pytest.mark.parametrize("ties", [True, False], ids=["ties", "no-ties"])
def test_experts_are_chosen_and_weighed_as_transformers_does(case, ties):
    rng = np.random.default_rng(len(case[0]) + 100 * ties)
    block, moe = make(case, rng)
    rows = 400
    logits = rng.integers(0, 4, (rows, moe.experts)) if ties else 3 * rng.standard_normal((rows, moe.experts))
    logits = logits.astype(np.float32)
    correction = None
    if moe.correction:
        correction = rng.integers(0, 3, moe.experts) / 4 if ties else rng.standard_normal(moe.experts) / 4
        correction = correction.astype(np.float32)
    router = block.gate
    with torch.no_grad():
        router.hidden_dim = moe.experts
        router.weight = torch.nn.Parameter(torch.eye(moe.experts))
        if correction is not None:
            router.e_score_correction_bias.copy_(torch.from_numpy(correction))
        if moe.router_bias:
            router.bias.zero_()
        _, weights, chosen = router(torch.from_numpy(logits))
    truth = np.zeros((rows, moe.experts))
    np.put_along_axis(truth, chosen.numpy(), weights.numpy(), 1)
    out = routing(moe, correction, np.pad(logits, ((0, 0), (0, int(moe.shared_gate)))))
    if moe.shared_intermediate_size > 0:
        assert (out[:, -1] == (0.5 if moe.shared_gate else 1)).all()
        out = out[:, :-1]
    assert ((out != 0).sum(1) == moe.top_k).all()
    assert np.array_equal(out != 0, truth != 0)
    assert np.allclose(out, truth, rtol=2e-6, atol=0)


@pytest.mark.parametrize(
    ("experts", "top_k"), [(5, 5), (63, 1), (64, 1), (65, 1), (127, 2), (256, 4), (300, 3)]
)
def test_ties_at_the_edge_of_either_algorithm(experts, top_k):
    rng = np.random.default_rng(experts)
    logits = rng.integers(0, 3, (300, experts)).astype(np.float32)
    moe = MoeConfig(experts=experts, top_k=top_k, scoring="softmax")
    chosen = torch.topk(torch.from_numpy(logits).softmax(-1), top_k).indices.numpy()
    out = routing(moe, None, logits)
    assert np.array_equal(np.sort(chosen), np.nonzero(out)[1].reshape(300, top_k))


def test_weights_that_are_all_zero_stay_zero():
    moe = MoeConfig(experts=6, top_k=2, scoring="sigmoid", normalize=True)
    out = routing(moe, None, np.full((2, 6), -200, np.float32))
    assert (out == 0).all()


# ---- The whole of it


@functools.cache
def answer(name: str):
    """A block of that name, some rows, and what transformers makes of them in float32 and in float64."""
    rng = np.random.default_rng(7)
    block, moe = make(next(case for case in BLOCKS if case[0] == name), rng)
    x = rng.standard_normal((37, HIDDEN)).astype(np.float32)
    with torch.no_grad():
        expected = array(block(torch.from_numpy(x)[None])[0])
        truth = block.double()(torch.from_numpy(x).double()[None])[0].numpy()
    return block.float(), moe, x, expected, truth


@every_block
@every_isa
def test_is_near_transformers(case, isa):
    block, moe, x, expected, truth = answer(case[0])
    size = np.abs(truth).max(1, keepdims=True)
    for threads in (1, 2):
        out = ours_of(block, moe, len(x), isa=isa, threads=threads).run(x)
        assert (np.abs(out - expected) <= 2e-5 * size).all()
        assert (np.abs(out - truth) <= 2e-5 * size).all()


def truth_of(moe: MoeConfig, weights: np.ndarray, experts, biases, x: np.ndarray) -> np.ndarray:
    """In float64, from the weights [rows, experts] of the rows' experts."""
    out = np.zeros(x.shape)
    for e, (gate, up, down) in enumerate(experts):
        gb, ub, db = (part.astype(np.float64) for part in biases[e])
        g = x.astype(np.float64) @ gate.T.astype(np.float64) + gb
        inner = g / (1 + np.exp(-g)) * (x @ up.T.astype(np.float64) + ub)
        out += weights[:, e : e + 1] * (inner @ down.T.astype(np.float64) + db)
    return out


@every_isa
def test_biases_of_router_and_experts(isa):
    rng = np.random.default_rng(8)
    moe = MoeConfig(experts=9, top_k=3, intermediate_size=WIDTH, scoring="top_softmax", router_bias=True)
    moe.expert_bias = True

    def normal(*shape):
        return rng.standard_normal(shape).astype(np.float32)

    router, bias, x = normal(9, HIDDEN), 3 * normal(9), normal(21, HIDDEN)
    experts = [(normal(WIDTH, HIDDEN), normal(WIDTH, HIDDEN), normal(HIDDEN, WIDTH)) for _ in range(9)]
    biases = [[normal(WIDTH), normal(WIDTH), normal(HIDDEN)] for _ in range(9)]
    run = _core.testing.Experts(moe, HIDDEN, len(x), isa=isa, threads=2)
    run.set_router(router, bias)
    for e, parts in enumerate(experts):
        run.set_expert(e, *parts, biases[e])
    logits = x.astype(np.float64) @ router.T + bias
    chosen = np.argsort(-logits, 1)[:, :3]
    weights = np.zeros(logits.shape)
    np.put_along_axis(weights, chosen, np.exp(np.take_along_axis(logits, chosen, 1)), 1)
    truth = truth_of(moe, weights / weights.sum(1, keepdims=True), experts, biases, x)
    assert (np.abs(run.run(x) - truth) <= 2e-5 * np.abs(truth).max(1, keepdims=True)).all()


@every_isa
@pytest.mark.parametrize("format", ["dense", "int8", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_is_bit_for_bit_its_linear_layers(dtype, format, isa):
    rng = np.random.default_rng(9)
    block, moe = make(("", qwen2_block, 12, 3, {}), rng)
    router, _, experts = weights_of(block, moe)
    x = rng.standard_normal((70, HIDDEN)).astype(np.float32)
    logits = _core.testing.Ops(dtype=dtype, isa=isa).linear(router, None, x)
    weights = routing(moe, None, logits)
    linears = _core.testing.Ops(dtype=dtype, isa=isa, format=format)
    expected = np.zeros_like(x)
    for e, (gate, up, down) in enumerate(experts):
        y = linears.linear(down, None, linears.linear_gated(gate, up, None, None, x))
        expected += np.where(weights[:, e : e + 1] != 0, weights[:, e : e + 1] * y, np.float32(0))
    for threads in (1, 2, 3):
        run = ours_of(block, moe, len(x), dtype=dtype, isa=isa, threads=threads, format=format)
        assert same_bits(run.run(x) + np.float32(0), expected + np.float32(0))


@every_isa
@pytest.mark.parametrize("format", ["dense", "int4"])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_row_has_the_same_bits_in_any_company(dtype, format, isa):
    rng = np.random.default_rng(10)
    block, moe = make(("", deepseek_v3_block, 32, 4, {"groups": 4, "top_groups": 2}), rng)
    x = rng.standard_normal((130, HIDDEN)).astype(np.float32)
    alike = np.repeat(x[:1], len(x), 0)  # all have the same experts, and most experts have none
    alone = ours_of(block, moe, len(x), dtype=dtype, isa=isa, format=format)
    expected = alone.run(x)
    for threads in (1, 2, 3):
        run = ours_of(block, moe, len(x), dtype=dtype, isa=isa, threads=threads, format=format)
        assert same_bits(run.run(alike), np.repeat(expected[:1], len(x), 0))
        assert same_bits(run.run(x), expected)
        for count in (1, 2, 3, 9, 40):
            rows = rng.choice(len(x), count, replace=False)
            assert same_bits(run.run(x[rows]), expected[rows])
    assert run.run(x[:0]).shape == (0, HIDDEN)


@every_block
@every_isa
def test_not_a_number_and_infinity_stay_in_their_row(case, isa):
    rng = np.random.default_rng(11)
    block, moe = make(case, rng)
    x = rng.standard_normal((20, HIDDEN)).astype(np.float32)
    run = ours_of(block, moe, len(x), isa=isa, threads=2)
    clean = run.run(x)
    for broken in (np.nan, np.inf, -np.inf):
        bad = x.copy()
        bad[[3, 17], 5] = broken
        out = run.run(bad)
        assert np.isnan(out[[3, 17]]).all() if np.isnan(broken) else not np.isfinite(out[[3, 17]]).any()
        others = [r for r in range(len(x)) if r not in (3, 17)]
        assert same_bits(out[others], clean[others])


@every_router
def test_logits_that_are_not_numbers_make_their_row_so(case):
    rng = np.random.default_rng(12)
    _, moe = make(case, rng)
    correction = rng.standard_normal(moe.experts).astype(np.float32) if moe.correction else None
    logits = rng.standard_normal((9, moe.experts + moe.shared_gate)).astype(np.float32)
    clean = routing(moe, correction, logits)
    bad = logits.copy()
    bad[[4, 6]] = np.nan
    out = routing(moe, correction, bad)
    others = [0, 1, 2, 3, 5, 7, 8]
    assert np.isnan(out[[4, 6]]).all()
    assert same_bits(out[others], clean[others])


def test_threads_wait_for_each_other_a_few_times_however_many_experts_there_are():
    rng = np.random.default_rng(13)
    block, moe = make(("", qwen3_block, 128, 8, {}), rng)
    x = rng.standard_normal((64, HIDDEN)).astype(np.float32)
    run = ours_of(block, moe, len(x), threads=2)
    for rows, most in [(1, 6), (64, 8)]:  # twice for the memory of the rows that go in and come out
        before = run.barriers()
        run.run(x[:rows])
        assert 1 <= run.barriers() - before <= most
