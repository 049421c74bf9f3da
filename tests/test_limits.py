"""The roofline's formulas, held to numbers worked out by hand for models whose shapes are published."""

import pytest

from splitfuse import ModelConfig
from splitfuse.bench.common import percentile
from splitfuse.bench.limits import Costs, Roof, Work

pytestmark = pytest.mark.machine_independent

ROOF = Roof(read_gbps=4300.0, peak_gflops=790e3)


def llama(hidden, layers, heads, kv_heads, head_dim, wide, vocab=128256):
    return ModelConfig(
        vocab_size=vocab, hidden_size=hidden, num_layers=layers, num_heads=heads, num_kv_heads=kv_heads,
        head_dim=head_dim, intermediate_size=wide, max_position=131072,
    )  # fmt: skip


LLAMA_8B = llama(4096, 32, 32, 8, 128, 14336)
LLAMA_1B = llama(2048, 16, 32, 8, 64, 8192)


@pytest.mark.parametrize(
    ("model", "gigabytes", "kv_bytes", "decode_ms"),
    [(LLAMA_8B, 15.01, 131072, 3.491), (LLAMA_1B, 2.47, 32768, 0.575)],
)
def test_weights_and_cache(model, gigabytes, kv_bytes, decode_ms):
    costs = Costs.of(model, "bfloat16")
    assert costs.weight_bytes == pytest.approx(gigabytes * 1e9, rel=2e-3)
    assert costs.kv_bytes_per_token == kv_bytes
    assert 1e3 * ROOF.seconds(costs.decode(1, 0)) == pytest.approx(decode_ms, rel=2e-3)
    wide = Costs.of(model, "float32")
    assert (wide.weight_bytes, wide.kv_bytes_per_token) == (2 * costs.weight_bytes, 2 * kv_bytes)
    small = Costs.of(model, "bfloat16", kv_dtype="int8")
    scales = 2 * model.num_layers * model.num_kv_heads * 4
    assert (small.weight_bytes, small.kv_bytes_per_token) == (costs.weight_bytes, kv_bytes // 2 + scales)


def test_decode_reads_the_weights_once_and_every_context():
    costs = Costs.of(LLAMA_8B, "bfloat16")
    assert 1e3 * ROOF.seconds(costs.decode(32, 1023)) == pytest.approx(4.49, rel=2e-3)
    assert costs.decode(32, 1023).bytes == costs.weight_bytes + 32 * 1024 * 131072


def test_prefill_is_bound_by_arithmetic():
    costs = Costs.of(LLAMA_8B, "bfloat16")
    linear, head, pairs = 6_979_321_856, 4096 * 128256, 2048 * 2049 // 2
    assert costs.prefill(2048).flops == 2 * linear * 2048 + 2 * head + 4 * 32 * 4096 * pairs
    assert 1e3 * ROOF.seconds(costs.prefill(2048)) == pytest.approx(37.8, rel=1e-2)


def test_chunks_add_up_to_the_whole():
    costs = Costs.of(LLAMA_1B, "bfloat16")
    parts = [costs.forward([(0, 300)], 0), costs.forward([(300, 200)], 0), costs.forward([(500, 12)], 1)]
    assert sum(p.flops for p in parts) == costs.prefill(512).flops
    total = parts[0] + parts[1] + parts[2]
    assert total.bytes > costs.prefill(512).bytes  # the weights are read three times


def test_whole_requests_take_as_many_forwards_as_the_longest_answer():
    costs = Costs.of(LLAMA_1B, "bfloat16")
    one = costs.requests([(10, 5)])
    steps = [costs.prefill(10), *(costs.forward([(10 + i, 1)], 1) for i in range(4))]
    assert one.flops == sum(s.flops for s in steps)
    assert one.bytes == sum(s.bytes for s in steps)
    two = costs.requests([(10, 5), (10, 2)])
    assert two.bytes - one.bytes == (10 + 11) * costs.kv_bytes_per_token


def test_the_knee_is_where_both_times_are_equal():
    costs = Costs.of(LLAMA_8B, "bfloat16")
    assert costs.knee(ROOF) == pytest.approx(184, abs=1)
    knee = costs.knee(ROOF)
    reading = costs.linear_params * costs.bytes_per_param / (ROOF.read_gbps * 1e9)
    assert 2 * costs.linear_params * knee / (ROOF.peak_gflops * 1e9) == pytest.approx(reading)


def test_the_slower_of_reading_and_arithmetic_counts():
    roof = Roof(read_gbps=1.0, peak_gflops=2.0)
    assert roof.seconds(Work(bytes=3e9, flops=1e9)) == 3
    assert roof.seconds(Work(bytes=1e9, flops=8e9)) == 4
    assert roof.or_better(Roof(3.0, 1.0)) == Roof(3.0, 2.0)


def test_percentiles():
    values = list(range(100, 0, -1))
    assert [percentile(values, p) for p in (0.5, 0.9, 0.99, 1.0)] == [50, 90, 99, 100]
    assert percentile([7.0], 0.5) == 7.0
