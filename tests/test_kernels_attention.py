"""Rotary embedding, KV writes and paged attention of the CPU backend, on every rung of the ISA ladder.

Truth is plain attention in float64; over an int8 cache, of the keys and values that lie in it. Everything that must not
matter (chunking, batch-mates, block placement, stale blocks, threads, the future) is held to bits.
"""

from dataclasses import replace

import numpy as np
import pytest

from paged import ISAS, Cache, Kernel, Model, assert_close, every_kernel, int8_kernels, rounded

pytestmark = pytest.mark.machine_independent  # each test names its instruction set

# heads, kv_heads, head_dim, block_size: every GQA ratio that a register tile meets differently, head sizes with and
# without a half-filled register, block sizes that do and do not divide a tile.
SHAPES = [
    (9, 3, 64, 32),
    (1, 1, 8, 16),
    (2, 2, 24, 16),
    (4, 1, 40, 48),
    (5, 1, 56, 64),
    (6, 1, 72, 16),
    (14, 2, 80, 32),
    (8, 1, 128, 16),
    (16, 1, 16, 80),
    (11, 1, 144, 32),
    (3, 3, 264, 16),
]
every_shape = pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "x".join(map(str, s)))


@every_kernel
@every_shape
def test_truth(kernel: Kernel, shape: tuple[int, int, int, int]) -> None:
    rng = np.random.default_rng(sum(shape))
    model = Model(*shape[:3])
    cache = Cache(model, kernel, block_size=shape[3], blocks=64)
    sequences = [model.qkv(rng, length) for length in (1, 17, 100, 131, 280)]
    outs = cache.run(sequences, rng, 90)
    for rows, out, table in zip(sequences, outs, cache.tables, strict=True):
        assert_close(out, rows, cache, table)


@every_kernel
def test_truth_over_tiles_and_segments(kernel: Kernel) -> None:
    """A context of several segments: a long prompt, then single tokens."""
    rng = np.random.default_rng(1)
    model = Model(3, 1, 32)
    qkv = model.qkv(rng, 1200)
    cache = Cache(model, kernel, threads=3)
    table = cache.table(1200)
    outs = [cache.step([(0, qkv[:900], table)])[0]]
    outs += [cache.step([(at, qkv[at : at + 1], table)])[0] for at in range(900, 1030)]
    outs += [cache.step([(1030, qkv[1030:], table)])[0]]
    assert_close(np.concatenate(outs), qkv, cache, table)


@every_kernel
@pytest.mark.parametrize("scale", [1e-3, 5.0])
def test_flat_and_peaked_weights(kernel: Kernel, scale: float) -> None:
    """At scale 5 scores reach hundreds and one key takes all: exponents may neither overflow nor lose it."""
    rng = np.random.default_rng(2)
    model = Model(4, 2, 64, scale)
    qkv = model.qkv(rng, 300)
    cache = Cache(model, kernel)
    (out,) = cache.run([qkv], rng, 120)
    if scale < 1:
        assert_close(out, qkv, cache, cache.tables[0])
        return
    truth, size = model.truth(qkv, kernel.dtype, cache.stored(cache.tables[0], len(qkv)))
    # Scores of some hundreds, rounded: exponents are off by as much as 1e-4 in float32. Where bfloat16 queries or keys
    # were rounded the other way than in float64, or queries to 16 bits, a near tie of two keys may turn.
    fine = kernel.dtype == "float32" and kernel.exact_cache
    near = np.abs(out - truth) <= (2e-3 if fine else 0.1) * (size + 1e-3)
    assert near.mean() > (0.9999 if fine else 0.995)


@every_kernel
def test_one_key_gives_its_value_exactly(kernel: Kernel) -> None:
    model = Model(6, 2, 48)
    qkv = model.qkv(np.random.default_rng(3), 1)
    cache = Cache(model, kernel)
    (out,) = cache.step([(0, qkv, [5])])
    stored = cache.stored([5], 1)
    values = rounded(qkv, kernel.dtype).reshape(-1, 48)[8:] if stored is None else stored[1][0]
    allowed = np.abs(values) * (0 if kernel.exact_cache else 2e-7 if kernel.dtype == "float32" else 2.0**-8)
    assert np.all(np.abs(out.reshape(2, 3, 48) - values[:, None]) <= allowed[:, None])


@every_kernel
def test_near_the_scalar_kernel(kernel: Kernel) -> None:
    rng = np.random.default_rng(4)
    model = Model(6, 2, 64)
    sequences = [model.qkv(rng, length) for length in (40, 333)]
    ref = replace(kernel, isa="ref")
    outs = [Cache(model, k).run(sequences, np.random.default_rng(5), 64) for k in (ref, kernel)]
    for ref, out in zip(*outs, strict=True):
        fine = 1e-5 if kernel.exact_cache else 2.0**-12 * (np.abs(ref) + 1)
        allowed = fine if kernel.dtype == "float32" else 2.0**-8 * (np.abs(ref) + 1)
        assert np.all(np.abs(ref - out) <= allowed)


@every_kernel
@pytest.mark.parametrize(
    "shape", [(9, 3, 64, 32), (2, 2, 24, 16), (7, 1, 80, 48)], ids=lambda s: "x".join(map(str, s))
)
def test_bits_depend_on_the_sequence_alone(kernel: Kernel, shape: tuple[int, int, int, int]) -> None:
    """Chunk sizes, batch-mates, block placement and thread count, all drawn anew each time."""
    rng = np.random.default_rng(6)
    model = Model(*shape[:3])
    sequences = [model.qkv(rng, length) for length in (61, 300, 530 if kernel.isa == "ref" else 1100)]
    expected = []
    for rows in sequences:
        cache = Cache(model, kernel, threads=1, block_size=shape[3], blocks=80)
        expected += cache.step([(0, rows[:1024], cache.table(1024))])
    for trial, largest in enumerate([7, 200] if kernel.isa == "ref" else [7, 64, 257, 1000]):
        mates = [model.qkv(rng, int(rng.integers(1, 200))) for _ in range(trial)]
        cache = Cache(model, kernel, threads=1 + trial, block_size=shape[3], blocks=128, seed=trial)
        outs = cache.run(sequences + mates, rng, largest)
        for rows, out, want in zip(sequences, outs, expected, strict=False):
            assert out[: len(want)].tobytes() == want.tobytes(), (largest, len(rows))


@every_kernel
@pytest.mark.parametrize("shape", [(9, 3, 64, 32), (1, 1, 16, 16)], ids=lambda s: "x".join(map(str, s)))
def test_bits_token_by_token(kernel: Kernel, shape: tuple[int, int, int, int]) -> None:
    model = Model(*shape[:3])
    qkv = model.qkv(np.random.default_rng(13), 290)
    (want,) = Cache(model, kernel, block_size=shape[3]).step([(0, qkv, list(range(20)))])
    cache = Cache(model, kernel, block_size=shape[3])
    table = cache.table(290)
    outs = [cache.step([(at, qkv[at : at + 1], table)])[0] for at in range(290)]
    assert np.concatenate(outs).tobytes() == want.tobytes()


@every_kernel
def test_bits_of_split_contexts(kernel: Kernel) -> None:
    """A single long decode is split over threads at segments; many of them are not. The bits are the same."""
    rng = np.random.default_rng(7)
    model = Model(6, 2, 32)
    length = 1400 if kernel.isa == "ref" else 3000
    qkv = model.qkv(rng, length + 40)
    results = []
    for threads in (1, 2, 3, 8):
        cache = Cache(model, kernel, threads=threads, blocks=128, seed=threads)
        table = cache.table(length + 40)
        for at in range(0, length, 1000):
            cache.step([(at, qkv[at : min(at + 1000, length)], table)])
        outs = [cache.step([(at, qkv[at : at + 1], table)])[0] for at in range(length, length + 3)]
        # The same rows again beside others, some of them chunks of many rows with long pasts.
        mates = [(at, qkv[at : at + 3], table) for at in range(length + 3, length + 12, 3)]
        outs.append(cache.step([(length, qkv[length : length + 3], table), *mates])[0])
        outs.append(cache.step([(length + 12, qkv[length + 12 :], table)])[0])
        assert np.concatenate(outs[:3]).tobytes() == outs[3].tobytes()
        results.append(np.concatenate(outs).tobytes())
    assert len(set(results)) == 1


@every_kernel
@pytest.mark.parametrize("stale", [np.nan, np.inf, -np.inf])
def test_stale_blocks_reach_nothing(kernel: Kernel, stale: float) -> None:
    rng = np.random.default_rng(8)
    model = Model(6, 2, 40)
    sequences = [model.qkv(rng, length) for length in (1, 2, 33, 270)]
    clean = Cache(model, kernel, block_size=16, blocks=32).run(sequences, np.random.default_rng(9), 50)
    cache = Cache(model, kernel, block_size=16, blocks=32)
    cache.step([(0, np.full_like(model.qkv(rng, 512), stale), list(range(32)))])
    for out, want in zip(cache.run(sequences, np.random.default_rng(9), 50), clean, strict=True):
        assert np.isfinite(want).all()
        assert out.tobytes() == want.tobytes()


@every_kernel
@pytest.mark.parametrize("future", [np.nan, np.inf])
def test_the_future_reaches_nothing(kernel: Kernel, future: float) -> None:
    """A broken row breaks itself and what follows, never what came before it in the same chunk."""
    rng = np.random.default_rng(10)
    model = Model(3, 1, 64)
    qkv = model.qkv(rng, 300)
    (want,) = Cache(model, kernel).step([(0, qkv, list(range(10)))])
    for broken in (1, 2, 7, 130, 255, 256, 299):
        bad = qkv.copy()
        bad[broken] = future
        (out,) = Cache(model, kernel).step([(0, bad, list(range(10)))])
        assert out[:broken].tobytes() == want[:broken].tobytes()
        assert np.isnan(out[broken:]).all()


@every_kernel
def test_one_broken_number_breaks_who_sees_it(kernel: Kernel) -> None:
    """NaN in a key reaches the queries of its head that see it; in a query, that query alone."""
    model = Model(4, 2, 40)
    qkv = model.qkv(np.random.default_rng(14), 300)
    table = list(range(10))
    (want,) = Cache(model, kernel).step([(0, qkv, table)])
    want = want.reshape(300, 4, 40)
    for column, rows, heads in (
        (40 * 5 + 7, slice(280, None), slice(2, 4)),
        (40 * 1 + 9, slice(280, 281), 1),
    ):
        bad = qkv.copy()
        bad[280, column] = np.nan
        (out,) = Cache(model, kernel).step([(0, bad, table)])
        out = out.reshape(300, 4, 40)
        assert np.isnan(out[rows, heads]).all()
        clean = np.ones((300, 4), bool)
        clean[rows, heads] = False
        assert out[clean].tobytes() == want[clean].tobytes()


@int8_kernels
@pytest.mark.parametrize("broken", [np.nan, np.inf, -np.inf])
def test_a_broken_value_in_int8_breaks_its_position(kernel: Kernel, broken: float) -> None:
    model = Model(2, 1, 24)
    qkv = model.qkv(np.random.default_rng(15), 70)
    (want,) = Cache(model, kernel).step([(0, qkv, [0, 1, 2])])
    qkv[50, 3 * 24 + 5] = broken
    (out,) = Cache(model, kernel).step([(0, qkv, [0, 1, 2])])
    assert out[:50].tobytes() == want[:50].tobytes()
    assert np.isnan(out[50:]).all()


@int8_kernels
@pytest.mark.parametrize("size", [1e-12, 1.0, 1e12])
def test_int8_is_the_nearest_of_a_scale_that_just_reaches_the_largest(kernel: Kernel, size: float) -> None:
    model = Model(3, 3, 24)
    qkv = model.qkv(np.random.default_rng(16), 100) * np.float32(size)
    qkv[20, 4 * 24 : 5 * 24] = 0  # a key of zeros
    cache = Cache(model, kernel, block_size=48)
    cache.step([(0, qkv, [4, 0, 2])])
    k, v, k_scale, v_scale = cache.int8([4, 0, 2], 100)
    for truth, ints, scale in zip(
        model.keys_and_values(qkv, "float32"), (k, v), (k_scale, v_scale), strict=True
    ):
        assert np.allclose(scale * 127, np.abs(truth).max(-1), rtol=3e-6, atol=0)
        error = np.abs(truth - ints * scale[..., None].astype(np.float64))
        assert np.all(error <= scale[..., None] * 0.50001)
    assert np.all(np.abs(v).max(-1) == 127)
    assert (k_scale[20, 1], np.abs(k[20, 1]).max()) == (0, 0)


@int8_kernels
def test_int8_is_the_same_on_every_instruction_set(kernel: Kernel) -> None:
    model = Model(2, 2, 72)
    qkv = model.qkv(np.random.default_rng(17), 90)
    caches = []
    for one in (kernel, replace(kernel, isa="ref")):
        cache = Cache(model, one, blocks=3)
        cache.step([(0, qkv, [2, 0, 1])])
        caches.append(cache.ops.kv_cache().tobytes())
    assert caches[0] == caches[1]


@int8_kernels
def test_wide_heads_overflow_no_sum(kernel: Kernel) -> None:
    """The greatest scores there are, in the widest heads; and the greatest sums of values, over a whole tile."""
    model = Model(1, 1, 1024, scale=1e-3)
    model.inv_freq[:] = 0
    qkv = np.ones((256, 3 * 1024), np.float32)
    qkv[0, 1024:] = -1
    cache = Cache(model, kernel, blocks=8)
    (out,) = cache.step([(0, qkv, list(range(8)))])
    assert_close(out, qkv, cache, list(range(8)))


@int8_kernels
def test_few_values_of_very_different_sizes(kernel: Kernel) -> None:
    """A value that outweighs all others in its tile, and is not looked at, costs them nothing of note."""
    model = Model(1, 1, 16)
    qkv = model.qkv(np.random.default_rng(18), 600)
    qkv[100, 32:] *= 50
    cache = Cache(model, kernel)
    (out,) = cache.step([(0, qkv, cache.table(600))])
    truth, size = model.truth(qkv, kernel.dtype, cache.stored(cache.tables[0], 600))
    assert np.all(np.abs(out - truth) <= 2.0**-7 * (size + 1e-3))


@every_kernel
def test_layers_and_blocks_are_apart(kernel: Kernel) -> None:
    rng = np.random.default_rng(11)
    model = Model(4, 2, 24)
    first, second = model.qkv(rng, 50), model.qkv(rng, 50)
    cache = Cache(model, kernel, blocks=4)
    for layer, rows in enumerate((first, second)):
        cache.step([(0, rows[:49], [3, 1])], layers=2, layer=layer)
    for layer, rows in enumerate((first, second)):
        (out,) = cache.step([(49, rows[49:], [3, 1])], layers=2, layer=layer)
        (want,) = Cache(model, kernel, blocks=4).step([(0, rows, [0, 2])])
        assert out.tobytes() == want[49:].tobytes()


@pytest.mark.parametrize("isa", ISAS)
def test_rotation_is_that_of_exact_positions(isa: str) -> None:
    """Far positions, without computing the past: it was never written, so its keys score zero and its values add
    nothing, and all that matters is how the last rows turn against each other."""
    model = Model(1, 1, 64)
    cache = Cache(model, Kernel("float32", isa), blocks=300)
    table = cache.table(9000)
    rng = np.random.default_rng(12)
    qkv = model.qkv(rng, 64)
    start = 8900
    # Everything before `start` was never written: zero keys and values, scores of zero.
    (out,) = cache.step([(start, qkv, table)])
    x = qkv.astype(np.float64).reshape(64, 3, 64)
    angle = (np.arange(start, start + 64, dtype=np.float32)[:, None] * model.inv_freq).astype(np.float64)

    def rotate(y: np.ndarray) -> np.ndarray:
        low, high = np.split(y, 2, axis=-1)
        return np.concatenate(
            [low * np.cos(angle) - high * np.sin(angle), high * np.cos(angle) + low * np.sin(angle)], -1
        )

    scores = rotate(x[:, 0]) @ rotate(x[:, 1]).T / 8
    weights = np.tril(np.exp(scores))
    truth = weights @ x[:, 2] / (start + weights.sum(-1, keepdims=True))
    assert np.abs(out - truth).max() <= 1e-5 * np.abs(truth).max()
