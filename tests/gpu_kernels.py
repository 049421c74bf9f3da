"""The CUDA backend's operations, held to float64 or to the CPU's reference kernels. tests/gpu.sh runs this file, where
there is a GPU; pytest alone does not collect it.

`Ops` poisons every output with NaN and fails if anything beyond the last column was written.
"""

import numpy as np
import pytest
import torch

from splitfuse import _core
from splitfuse._core import MoeConfig, SamplingParams
from test_kernels_rows import draw, normed

every_kind = pytest.mark.parametrize("kind", ["rms", "layer", "layer+bias", "none"])
COLUMNS = [1, 3, 4, 31, 88, 577, 1001, 1024, 1025, 2048, 3000, 4096, 5000, 8192, 9000, 16384, 20000]


@pytest.fixture(scope="module")
def gpu() -> _core.testing.Ops:
    return _core.testing.Ops(dtype="bfloat16", device="cuda")


@pytest.fixture(scope="module")
def cpu() -> _core.testing.Ops:
    return _core.testing.Ops(dtype="bfloat16", isa="ref")


def bfloat16(values: np.ndarray) -> np.ndarray:
    return torch.from_numpy(values.astype(np.float32)).bfloat16().float().numpy()


def normal(seed: int, *shape: int) -> np.ndarray:
    return np.random.default_rng(seed).standard_normal(shape).astype(np.float32)


# ---- Rows


@every_kind
@pytest.mark.parametrize("columns", COLUMNS)
def test_norms(gpu, kind: str, columns: int) -> None:
    y, how = draw(kind, columns)
    truth, error = normed(y, how)
    assert np.all(np.abs(gpu.norm(y, **how) - truth) <= error + 2.0**-8 * np.abs(truth))
    assert np.all(np.abs(gpu.norm_in_place(y, **how) - truth) <= error)
    x = normal(7, *y.shape)
    total = x + np.float64(np.float32(0.22)) * truth
    limit = error + 2.0**-23 * (np.abs(x) + np.abs(truth))
    assert np.all(np.abs(gpu.add(x, y, 0.22, **how) - total) <= limit)


@every_kind
def test_rows_of_a_norm_do_not_matter_to_each_other(gpu, kind: str) -> None:
    x, how = draw(kind, 87)
    x = np.concatenate([x * np.float32(i + 1) for i in range(40)])
    whole = gpu.norm(x, **how)
    for row in (0, 7, 199):
        assert gpu.norm(x[row : row + 1], **how).tobytes() == whole[row : row + 1].tobytes()
    chosen = np.sort(np.random.default_rng(0).permutation(200)[:150]).tolist()
    assert gpu.norm(x, rows=chosen, **how).tobytes() == whole[chosen].tobytes()
    x[3] = np.nan
    assert np.array_equal(np.isnan(gpu.norm(x, **how)).any(-1), np.arange(len(x)) == 3)


@pytest.mark.parametrize("softcap", [0.0, 30.0])
def test_scale_logits(gpu, softcap: float) -> None:
    logits = normal(1, 5, 1003) * 50
    truth = logits.astype(np.float64) * np.float32(0.3)
    truth = softcap * np.tanh(truth / softcap) if softcap else truth
    assert np.abs(gpu.scale_logits(logits, 0.3, softcap) - truth).max() <= 2.0**-20 * np.abs(truth).max()


@pytest.mark.parametrize("width", [8, 88, 1030])
def test_embed(gpu, width: int) -> None:
    table, x = bfloat16(normal(1, 331, width)), normal(2, 4, width)
    ids = [3, 330, 0, 3]
    assert np.array_equal(gpu.embed(table, ids, 1.5), table[ids] * np.float32(1.5))
    assert np.array_equal(gpu.embed_positions(table, [0, 5, 7, 200], 2, x), x + table[[2, 7, 9, 202]])


# ---- Linear layers


# (n, k): odd ones, one step of depth, many, and shapes whose depth is cut into parts.
LINEARS = [(8, 8), (33, 88), (116, 72), (331, 88), (64, 1024), (1000, 520), (2048, 4096), (4096, 576)]
ROWS = [1, 7, 8, 16, 17, 64, 65, 130, 300]


@pytest.mark.parametrize(("n", "k"), LINEARS)
def test_linears(gpu, n: int, k: int) -> None:
    w, bias = bfloat16(normal(1, n, k) / np.sqrt(k)), normal(2, n)
    x, acc = bfloat16(normal(3, 300, k)), normal(4, 300, n)
    truth = x.astype(np.float64) @ w.T.astype(np.float64)
    error = 2.0**-18 * (np.abs(x).astype(np.float64) @ np.abs(w).T + np.abs(bias) + 1)
    whole = gpu.linear(w, bias, x)
    added = gpu.linear_add(w, None, x, acc)
    assert np.all(np.abs(whole - (truth + bias)) <= error)
    assert np.all(np.abs(added - (truth + acc)) <= error + 2.0**-22 * np.abs(acc))
    for rows in ROWS:
        assert gpu.linear(w, bias, x[:rows]).tobytes() == whole[:rows].tobytes(), rows
        assert gpu.linear(w, bias, x[300 - rows :]).tobytes() == whole[300 - rows :].tobytes(), rows


@pytest.mark.parametrize("activation", ["none", "silu", "gelu", "gelu_tanh", "relu", "swiglu_clamped"])
@pytest.mark.parametrize(("n", "k"), LINEARS[:6])
def test_activations(gpu, cpu, activation: str, n: int, k: int) -> None:
    gate, up = bfloat16(normal(1, n, k) / np.sqrt(k)), bfloat16(normal(2, n, k) / np.sqrt(k))
    x, gate_bias, up_bias = bfloat16(normal(3, 70, k) * 4), normal(4, n), normal(5, n)
    pairs = []
    if activation != "swiglu_clamped":
        pairs.append([ops.linear_act(up, up_bias, x, activation) for ops in (gpu, cpu)])
    for biases in ((None, None), (gate_bias, up_bias)):
        pairs.append([ops.linear_gated(gate, up, *biases, x, activation) for ops in (gpu, cpu)])
    for ours, theirs in pairs:
        assert np.all(np.abs(ours - theirs) <= 2.0**-7 * np.abs(theirs) + 1e-4)


# ---- Sampling


def choices(seed: int) -> list[dict]:
    rng = np.random.default_rng(seed)
    rows = []
    for i in range(60):
        params = SamplingParams(
            temperature=float(rng.choice([0.0, 0.3, 1.0, 1.7, 50.0])),
            top_k=int(rng.choice([0, 1, 2, 50, 300])),
            top_p=float(rng.choice([1.0, 0.999, 0.9, 0.5, 1e-6])),
            min_p=float(rng.choice([0.0, 0.01, 0.3])),
            seed=seed,
            sample_index=i,
        )
        row = {"params": params, "tokens": rng.integers(0, 331, 40).tolist(), "prompt": 30}
        if i % 3 == 0:
            params.repetition_penalty, params.presence_penalty, params.frequency_penalty = 1.3, 0.5, 0.25
        if i % 4 == 0:
            params.logit_bias = [(int(token), 2.5) for token in rng.permutation(331)[:20]]
        if i % 5 == 0:
            row["stop_ids"] = rng.permutation(331)[:9].tolist()
        if i % 7 == 0:
            row["target"] = int(rng.integers(331))
        row["top"] = int(rng.choice([-1, 0, 1, 20]))
        rows.append(row)
    return rows


def assert_same_choices(ours: list[tuple], theirs: list[tuple], may_differ: int = 0) -> None:
    """But for rows, so many, where the random number falls next to the edge of a token's share."""
    assert sum(mine[0] != other[0] for mine, other in zip(ours, theirs, strict=True)) <= may_differ
    for mine, other in zip(ours, theirs, strict=True):
        assert [token for token, _ in mine[2]] == [token for token, _ in other[2]]
        assert np.allclose([p for _, p in mine[2]], [p for _, p in other[2]], atol=1e-5)
        if mine[0] == other[0]:
            assert mine[3] == other[3]
            assert np.allclose(mine[1], other[1], atol=1e-5)


@pytest.mark.parametrize("vocab", [331, 1024, 5003, 128256])
@pytest.mark.parametrize("spread", [0.0, 0.01, 3.0, 40.0])
def test_choices_are_the_reference_sampler_s(gpu, cpu, vocab: int, spread: float) -> None:
    logits = normal(vocab, 60, vocab) * np.float32(spread)
    logits[20:40] = np.round(logits[20:40])  # many ties, and both zeros
    rows = choices(vocab)
    assert_same_choices(gpu.sample(logits, rows), cpu.sample(logits, rows), may_differ=2)


def test_a_choice_depends_on_its_row_alone(gpu) -> None:
    logits = normal(5, 60, 5003) * 3
    rows = choices(9)
    whole = gpu.sample(logits, rows)
    for i in (0, 17, 59):
        assert gpu.sample(logits[i : i + 1], rows[i : i + 1]) == whole[i : i + 1]


def test_logits_that_are_not_finite(gpu, cpu) -> None:
    logits = normal(6, 6, 331)
    logits[0, 330] = np.nan
    logits[1] = -np.inf
    logits[2, 7] = np.inf
    logits[3, 5:] = -np.inf
    rows = [{"params": SamplingParams(seed=i), "top": 20} for i in range(6)]
    ours, theirs = gpu.sample(logits, rows), cpu.sample(logits, rows)
    assert [row[0] for row in ours[:3]] == [-1, -1, -1]
    assert_same_choices(ours, theirs)


# ---- Experts


ROUTERS = {
    "mixtral": MoeConfig(experts=8, top_k=2, scoring="softmax", normalize=True),
    "qwen": MoeConfig(experts=60, top_k=4, scoring="softmax", shared_intermediate_size=52, shared_gate=True),
    "deepseek": MoeConfig(
        experts=256,
        top_k=8,
        scoring="sigmoid",
        normalize=True,
        scale=2.5,
        groups=8,
        top_groups=4,
        correction=True,
        shared_intermediate_size=24,
    ),
    "gpt-oss": MoeConfig(experts=32, top_k=4, scoring="top_softmax", router_bias=True, expert_bias=True),
}


def experts_of(moe: MoeConfig, hidden: int, gated: bool, activation: str, **where) -> _core.testing.Experts:
    moe.intermediate_size = 29
    ours = _core.testing.Experts(
        moe, hidden, 700, gated=gated, activation=activation, dtype="bfloat16", **where
    )
    count = moe.experts + (1 if moe.shared_intermediate_size else 0)
    ours.set_router(
        bfloat16(normal(1, moe.experts + (1 if moe.shared_gate else 0), hidden)),
        normal(2, moe.experts) if moe.router_bias else None,
        normal(3, moe.experts) * 0.1 if moe.correction else None,
    )
    for e in range(count):
        width = moe.intermediate_size if e < moe.experts else moe.shared_intermediate_size
        gate, up = (bfloat16(normal(10 * e + i, width, hidden) / np.sqrt(hidden)) for i in (4, 5))
        down = bfloat16(normal(10 * e + 6, hidden, width) / np.sqrt(width))
        biases = [normal(10 * e + i, size) for i, size in ((7, width), (8, width), (9, hidden))]
        ours.set_expert(e, gate if gated else None, up, down, biases if moe.expert_bias else [])
    return ours


@pytest.mark.parametrize(("gated", "activation"), [(True, "silu"), (True, "swiglu_clamped"), (False, "gelu")])
@pytest.mark.parametrize("name", ROUTERS)
def test_experts(name: str, gated: bool, activation: str) -> None:
    moe, hidden = ROUTERS[name], 88
    gpu = experts_of(moe, hidden, gated, activation, device="cuda")
    cpu = experts_of(moe, hidden, gated, activation, isa="ref")
    x = bfloat16(normal(1, 700, hidden))
    ours, theirs = gpu.run(x), cpu.run(x)
    assert np.all(np.abs(ours - theirs) <= 2.0**-6 * np.abs(theirs).max(-1, keepdims=True))
    for rows in (1, 3, 40, 333):
        assert gpu.run(x[:rows]).tobytes() == ours[:rows].tobytes(), rows
    x[5] = np.nan
    assert np.array_equal(np.isnan(gpu.run(x)).any(-1), np.arange(len(x)) == 5)


# ---- Attention


def steps(ops, heads: int, kv_heads: int, dim: int, chunks: list[int]) -> np.ndarray:
    """A sequence of random rows in chunks of these lengths, beside another of the same; the first's output."""
    rows = normal(dim, sum(chunks), (heads + 2 * kv_heads) * dim)
    blocks = -(-len(rows) // 32)
    order = np.random.default_rng(1).permutation(2 * blocks).tolist()
    outs, done = [], 0
    for length in chunks:
        part = rows[done : done + length]
        seqs = [(done, length, order[:blocks]), (done, length, order[blocks:])]
        out = ops.paged(
            heads=heads,
            kv_heads=kv_heads,
            head_dim=dim,
            block_size=32,
            blocks=2 * blocks,
            inv_freq=(10000.0 ** -(np.arange(dim // 2) * 2.0 / dim)).tolist(),
            seqs=seqs,
            qkv=np.concatenate([part, part[::-1]]),
        )
        outs.append(out[:length])
        done += length
    return np.concatenate(outs)


@pytest.mark.parametrize(("heads", "kv_heads", "dim"), [(4, 4, 24), (4, 2, 64), (8, 1, 128), (6, 2, 256)])
def test_attention(gpu, cpu, heads: int, kv_heads: int, dim: int) -> None:
    whole = steps(gpu, heads, kv_heads, dim, [500])
    assert np.abs(whole - steps(cpu, heads, kv_heads, dim, [500])).max() <= 2.0**-5
    for chunks in ([1, 499], [33, 31, 64, 372], [490] + [1] * 10):
        assert steps(gpu, heads, kv_heads, dim, chunks).tobytes() == whole.tobytes(), chunks
