"""What attention may have beside the plain: sliding windows, partial and missing rotation, norms of queries and keys,
softcapped and biased scores, sinks. On every rung of the ISA ladder, against float64; what must not matter, to
bits.

Blocks behind the window of all rows to come are given away: they hold NaN, and the block table names none.
"""

from dataclasses import replace

import numpy as np
import pytest

from paged import Cache, Kernel, Kind, Model, assert_close, own_kernels

pytestmark = pytest.mark.machine_independent  # each test names its instruction set

# Heads, kv_heads, head_dim, block_size, and the kind.
KINDS = {
    "rope_of_12": ((4, 2, 24, 16), Kind(pairs=6)),
    "rope_of_20": ((5, 1, 80, 32), Kind(pairs=10, magnitude=1.3)),
    "rope_of_24": ((3, 3, 64, 16), Kind(pairs=12)),
    "rope_of_2": ((2, 1, 8, 16), Kind(pairs=1)),
    "no_rope": ((6, 2, 40, 32), Kind(pairs=0)),
    "head_norm": ((6, 2, 24, 32), Kind(qk_norm="head", norm_eps=1e-6)),
    "row_norm": ((7, 1, 80, 16), Kind(qk_norm="row")),
    "layer_head_norm": ((4, 4, 64, 32), Kind(qk_norm="head", norm_kind="layer", norm_eps=1e-2)),
    "layer_row_norm": ((3, 1, 40, 48), Kind(qk_norm="row", norm_kind="layer")),
    "hard_cap": ((9, 3, 64, 32), Kind(softcap=0.5)),
    "soft_cap": ((8, 1, 128, 16), Kind(softcap=30.0)),
    "far_cap": ((4, 2, 24, 16), Kind(softcap=1e4)),
    "alibi": ((6, 1, 40, 32), Kind(alibi=True, pairs=0)),
    "alibi_capped": ((12, 3, 24, 16), Kind(alibi=True, softcap=2.0, window=50)),
    "sinks": ((8, 2, 64, 16), Kind(sinks=True)),
    "sinks_in_windows": ((8, 1, 64, 16), Kind(sinks=True, window=20)),
    "wide_heads": ((4, 2, 256, 16), Kind(window=60, softcap=50.0, qk_norm="head", pairs=20)),
    "all": (
        (10, 2, 80, 32),
        Kind(77, 10, 0.9, 5.0, True, True, "row", "layer", 1e-3),
    ),
}
every_kind = pytest.mark.parametrize("name", KINDS)
WINDOWS = [1, 7, 16, 100, 256, 300, 512, 1000]


def a_model(name: str) -> tuple[Model, int]:
    (heads, kv_heads, head_dim, block_size), kind = KINDS[name]
    return Model(heads, kv_heads, head_dim, kind=kind), block_size


class Forgetful(Cache):
    """Gives away what lies behind the window."""

    def chunk(self, table: list[int], qkv: np.ndarray, begin: int, length: int) -> np.ndarray:
        window = self.model.kind.window or begin + 1
        gone = max(begin - window + 1, 0) // self.block_size
        lost = [block for block in table[:gone] if block >= 0]
        if lost:
            spoilt = np.full((len(lost) * self.block_size, qkv.shape[1]), np.nan, np.float32)
            self.step([(0, spoilt, lost)])
            table[:gone] = [-1] * gone
        return self.step([(begin, qkv[begin : begin + length], table)])[0]

    def all(self, qkv: np.ndarray, lengths: list[int]) -> np.ndarray:
        """The whole sequence in chunks of these lengths, the last of them again and again."""
        table = self.table(len(qkv))
        outs, done = [], 0
        while done < len(qkv):
            length = min(lengths.pop(0) if len(lengths) > 1 else lengths[0], len(qkv) - done)
            outs.append(self.chunk(table, qkv, done, length))
            done += length
        return np.concatenate(outs)


@own_kernels
@every_kind
def test_truth(kernel: Kernel, name: str) -> None:
    model, block_size = a_model(name)
    rng = np.random.default_rng(20)
    cache = Cache(model, kernel, block_size=block_size, blocks=64)
    sequences = [model.qkv(rng, length) for length in (1, 17, 100, 290)]
    outs = cache.run(sequences, rng, 90)
    for rows, out, table in zip(sequences, outs, cache.tables, strict=True):
        assert_close(out, rows, cache, table)


@own_kernels
@pytest.mark.parametrize("window", WINDOWS)
def test_truth_in_windows(kernel: Kernel, window: int) -> None:
    rng = np.random.default_rng(21)
    shape = [(3, 1, 24), (4, 4, 8), (5, 1, 40), (6, 2, 16)][window % 4]
    model = Model(*shape, kind=Kind(window))
    qkv = model.qkv(rng, 620 if kernel.isa == "ref" else 1300)
    cache = Cache(model, kernel, blocks=48)
    (out,) = cache.run([qkv], rng, 600)
    assert_close(out, qkv, cache, cache.tables[0])


@own_kernels
@pytest.mark.parametrize("window", WINDOWS)
def test_bits_in_windows(kernel: Kernel, window: int) -> None:
    """Whole, token by token and in odd chunks, on one thread and on many, over blocks that are gone."""
    ref = kernel.isa == "ref"
    length = min(300 if ref else 1400, window + (100 if ref else 400))
    kind = KINDS["all"][1] if window % 3 == 0 else Kind()
    model = Model(4, 2, 24, kind=replace(kind, window=window))
    qkv = model.qkv(np.random.default_rng(22), length)
    want = Forgetful(model, kernel, threads=1, block_size=16, blocks=96).all(qkv, [1000])
    assert np.isfinite(want).all()
    half = max(length - 60, 2) // 2  # token by token at the end alone, where the window is full
    for threads, lengths in ((1, [half, half, 1]), (3, [5, 31]), (2, [333, 77]), (4, [1, half, half, 3])):
        cache = Forgetful(
            model, kernel, threads=threads, block_size=[16, 48][threads % 2], blocks=96, seed=threads
        )
        assert cache.all(qkv, lengths).tobytes() == want.tobytes(), (threads, lengths)


@own_kernels
@every_kind
def test_bits_of_kinds(kernel: Kernel, name: str) -> None:
    model, block_size = a_model(name)
    qkv = model.qkv(np.random.default_rng(23), 150)
    want = Forgetful(model, kernel, threads=1, block_size=block_size).all(qkv, [150])
    cache = Forgetful(model, kernel, threads=3, block_size=block_size, seed=1)
    assert cache.all(qkv, [40, 7, 33, 1]).tobytes() == want.tobytes()


@own_kernels
@pytest.mark.parametrize("window", [0, 1100])
def test_bits_of_split_contexts(kernel: Kernel, window: int) -> None:
    """Sinks join once, after all segments, whoever worked on them."""
    model = Model(6, 2, 16, kind=Kind(window, sinks=True, softcap=20.0, alibi=True))
    length = 1100 if kernel.isa == "ref" else 2600
    qkv = model.qkv(np.random.default_rng(24), length)
    results = set()
    for threads in (1, 2, 7):
        cache = Forgetful(model, kernel, threads=threads, blocks=96, seed=threads)
        outs = cache.all(qkv, [1000] * (length // 1000) + [1 if length % 1000 < 200 else 598, 1])
        results.add(outs.tobytes())
        if threads == 2 and window == 0 and kernel.isa != "ref":
            assert_close(outs, qkv, cache, cache.tables[0])
    assert len(results) == 1


@own_kernels
@pytest.mark.parametrize("window", [1, 6, 31, 140, 300])
def test_a_broken_row_reaches_its_window_alone(kernel: Kernel, window: int) -> None:
    """Nor the row beside it, which shares a pair of values with it."""
    model = Model(3, 1, 24, kind=Kind(window))
    qkv = model.qkv(np.random.default_rng(25), 600)
    table = list(range(20))
    (want,) = Cache(model, kernel).step([(0, qkv, table)])
    for row in (0, 13, 130, 255, 256, 257):
        bad = qkv.copy()
        bad[row] = np.nan
        (out,) = Cache(model, kernel).step([(0, bad, table)])
        sees = slice(row, row + window)
        assert np.isnan(out[sees]).all()
        clean = np.ones(600, bool)
        clean[sees] = False
        assert out[clean].tobytes() == want[clean].tobytes()


@own_kernels
def test_layers_have_their_own_windows_and_rotations(kernel: Kernel) -> None:
    rng = np.random.default_rng(26)
    model = Model(4, 2, 24)
    qkv = model.qkv(rng, 200)
    ropes = [(model.inv_freq.tolist(), 1.0), ([1.0, 0.3, 0.2], 1.1)]
    # The window of layer 3 is as long as the longest context: none.
    layers = {"layers": 4, "windows": [0, 30, 7, 48 * 32], "layer_ropes": [0, 1, -1, 1], "ropes": ropes}
    cache = Cache(model, kernel)
    table = cache.table(200)
    for layer in range(4):
        outs = [
            cache.step([(at, qkv[at : at + 50], table)], layer=layer, **layers)[0] for at in range(0, 200, 50)
        ]
        alone = {"windows": [layers["windows"][layer] % 1000], "layer_ropes": [layers["layer_ropes"][layer]]}
        if layer == 3:
            alone["windows"] = [0]
        (want,) = Cache(model, kernel).step([(0, qkv, list(range(7)))], ropes=ropes, **alone)
        assert np.concatenate(outs).tobytes() == want.tobytes()
