"""`splitfuse bench serve`: the workload, the service levels, the clients, the simulator, and FastGen's claims on it."""

import asyncio
import json
import math
import subprocess
import sys

import numpy as np
import pytest

from engines import engine_config
from serving import serving
from splitfuse import Engine, InvalidArgument, StepPlan, cli
from splitfuse.bench.serving.drive import Clock, Drive, Load
from splitfuse.bench.serving.http_load import HttpOptions, closed_loop, poisson
from splitfuse.bench.serving.per_request import Goodput, details
from splitfuse.bench.serving.policies import Grid, Workload, compare
from splitfuse.bench.serving.replicas import engine_arguments
from splitfuse.bench.serving.report import steady_of_all, summarize
from splitfuse.bench.serving.simulated import SimulatedClock, simulate_on
from splitfuse.bench.serving.simulator import A100_70B, CurveCost, SimulatedEngine, VirtualClock
from splitfuse.bench.serving.sla import Sla, moving_average, published, scaled
from splitfuse.bench.serving.workload import Ask, Record, make_asks
from splitfuse.cli.options import engine_options
from splitfuse.loader import load
from splitfuse.policies import POLICIES, make_scheduler, step_tokens
from splitfuse.request import SamplingParams

pytestmark = pytest.mark.machine_independent


def simulated(cost=None, **fields):
    clock = VirtualClock()
    options = {"token_budget": 64, "max_step_tokens": 4096, "max_sequences": 16, "max_model_len": 2048}
    cost = cost or CurveCost([(1, 1.0), (101, 2.0)])
    return SimulatedEngine(cost, clock, **{**options, "blocks": 200, "block_size": 16, **fields}), clock


# ---------------------------------------------------------------- workload


def test_lengths_are_normal_and_fit():
    asks = make_asks(4000, 500, 60, 1000, 900, 1)
    prompts, answers = [len(a.prompt) for a in asks], [a.output for a in asks]
    assert np.mean(prompts) == pytest.approx(500, rel=0.02)
    assert np.std(prompts) == pytest.approx(150, rel=0.07)
    assert np.std(answers) == pytest.approx(18, rel=0.07)
    assert max(p + a for p, a in zip(prompts, answers, strict=True)) <= 900
    assert min(*prompts, *answers) >= 1
    assert make_asks(5, 500, 60, 1000, 900, 1) == asks[:5]
    assert len({tuple(a.prompt[:8]) for a in asks}) == len(asks)


def test_loads():
    assert (Load(clients=16).requests, Load(rate=2.0).requests) == (96, 64)
    starts = Load(clients=8).first_arrivals(100, 3)
    assert len(starts) == 8
    assert 0 <= min(starts) <= max(starts) <= 0.08
    gaps = np.diff(Load(rate=4.0).first_arrivals(4000, 3))
    assert gaps.mean() == pytest.approx(0.25, rel=0.06)
    assert gaps.std() == pytest.approx(0.25, rel=0.08)  # exponential


# ---------------------------------------------------------------- service levels


def test_the_moving_average_is_that_of_pandas():
    values = np.random.default_rng(0).random(40)
    averages = moving_average(values)
    for i in range(len(values)):
        weights = (1 - 2 / 17) ** np.arange(i, -1, -1)
        assert averages[i] == pytest.approx((weights * values[: i + 1]).sum() / weights.sum())


def record(first, gaps, prompt=512, **fields):
    tokens = np.cumsum([100 + first, *gaps]).tolist()
    return Record(prompt, len(tokens), 100.0, tokens, tokens[-1], **fields)


def test_a_request_passes_if_its_first_token_and_every_average_gap_are_in_time():
    sla = Sla("4 tok/s", 1 / 512, 0.25)
    assert sla.passes(record(0.99, [0.2] * 30))
    assert not sla.passes(record(1.01, [0.2] * 30))
    assert not sla.passes(record(0.5, [0.26]))
    assert sla.passes(record(0.5, [0.05] * 20 + [1.0] + [0.05] * 20))  # one stall is forgiven ...
    assert not sla.passes(record(0.5, [0.05] * 20 + [1.0] * 2 + [0.05] * 20))  # ... two are not
    assert not sla.passes(record(0.5, [1.0] + [0.05] * 40))  # nor is one at once
    assert not sla.passes(record(0.5, [0.1], error="500"))
    assert not sla.passes(Record(512, 4, 100.0))


def test_levels():
    assert [(s.name, s.itl) for s in published()] == [("2 tok/s", 0.5), ("4 tok/s", 0.25), ("6 tok/s", 1 / 6)]
    levels = scaled(0.53, 2600)  # FastGen's own machine gives FastGen's own levels back
    for level, own in zip(levels, published(), strict=True):
        assert level.itl == pytest.approx(own.itl, rel=0.02)
        assert level.ttft_per_token == pytest.approx(own.ttft_per_token, rel=0.02)


def test_figures():
    records = [record(0.1 * i, [0.01 * i, 0.03 * i], prompt=10 * i) for i in (1, 2, 3, 4)]
    records.append(Record(7, 3, 100.0, [], 101.0, "503: busy"))
    facts = summarize(records, 8.0, [Sla("any", 1e9, 1e9), Sla("none", 0.0, 0.0)])
    assert (facts["completed"], facts["failed"], facts["few_requests"]) == (4, 1, True)
    assert facts["request_throughput"] == 0.5
    assert (facts["total_input_tokens"], facts["total_output_tokens"]) == (100, 12)
    assert facts["mean_ttft_ms"] == pytest.approx(250)
    assert facts["mean_tpot_ms"] == pytest.approx(50)
    # The first and the last request sent run alone and are left out, and every request's last gap.
    assert facts["p50_itl_ms"] == pytest.approx(np.percentile([20, 30], 50))
    assert facts["failures"] == [("503: busy", 1)]
    assert facts["request_goodput"] is None
    assert facts["effective_throughput"] == {"any": 0.5, "none": 0.0}
    assert json.dumps(facts)


def test_goodput_is_within_all_bounds_that_are_given():
    records = [record(0.2, [0.1, 0.3]), record(0.4, [0.1, 0.1]), record(0.1, [0.5], error="500")]

    def good(*pairs):
        return summarize(records, 2.0, [], goodput=Goodput.parse(pairs))["request_goodput"]

    assert good("ttft:300") == 0.5
    assert good("ttft:450") == 1.0
    assert good("tpot:150") == 0.5  # the mean: 100 and 200
    assert good("ttft:300", "tpot:150") == 0.0
    assert good("e2el:601") == 1.0
    assert good("e2el:599") == 0.0
    for wrong in ("itl:3", "ttft", "ttft:-1", "ttft:fast", "tpot:inf", "e2el:nan"):
        with pytest.raises(InvalidArgument, match=wrong):
            Goodput.parse([wrong])


def test_one_token_has_no_time_after_the_first():
    assert summarize([record(0.1, [])], 1.0, [], goodput=Goodput.parse(["tpot:0"]))["request_goodput"] == 1


def test_peaks():
    records = [
        Record(5, 3, 10.5, [10.9, 11.7, 11.9], 11.9),
        Record(5, 3, 11.4, [11.6, 12.4, 12.5], 12.5),
        Record(5, 1, 11.9, [12.1], 12.1),  # it begins as the first one ends
        Record(5, 9, 10.0, [11.5] * 9, 12.0, "failed"),
    ]
    facts = summarize(records, 2.0, [])
    assert facts["max_output_tokens_per_s"] == 5.0  # from 11.5 to 12.5
    assert facts["max_concurrent_requests"] == 2
    assert summarize([], 1.0, [])["max_concurrent_requests"] == 0


def test_details_are_request_by_request_in_the_order_they_were_sent():
    late, early = record(0.5, [0.25, 0.5], prompt=7), Record(9, 4, 99.0, [], 99.5, "503: busy")
    assert details([late, early]) == {
        "input_lens": [9, 7],
        "output_lens": [0, 3],
        "ttfts": [0.0, 0.5],
        "itls": [[], [0.25, 0.5]],
        "latencies": [0.5, 1.25],
        "start_times": [99.0, 100.0],
        "errors": ["503: busy", ""],
    }


def test_the_steady_middle_of_several_runs_is_that_of_all_their_seconds():
    slas = [Sla("any", 1e9, 1e9), Sla("none", 0.0, 0.0)]
    short = summarize([Record(1, 1, 0.0, [t], t) for t in (1.0, 2.0, 3.0, 4.0)], 4.0, slas)["steady"]
    long = summarize([Record(1, 1, 0.0, [t], t) for t in (1.0, 2.0, 3.0, 12.0)], 12.0, slas)["steady"]
    assert (short["duration"], short["request_throughput"]) == (2.0, 1.0)
    assert (long["duration"], long["request_throughput"]) == (6.0, 1 / 6)
    both = steady_of_all([short, {}, long])
    assert both["duration"] == 8.0
    assert both["request_throughput"] == pytest.approx(3 / 8)
    assert both["effective_throughput"] == {"any": pytest.approx(3 / 8), "none": 0.0}
    assert steady_of_all([{}]) == {}


# ---------------------------------------------------------------- the simulator


def test_time_is_the_cost_model():
    cost = CurveCost([(1, 1.0), (101, 2.0)], kv_seconds_per_token=0.001)
    assert cost.seconds([(0, 51)]) == pytest.approx(1.5)
    assert cost.seconds([(300, 1), (200, 100)]) == pytest.approx(2.0 + 0.5)
    assert cost.seconds([(0, 201)]) == pytest.approx(3.0)  # on the last slope
    engine, clock = simulated(cost)
    engine.put(1, [0] * 51, native(3))
    assert engine.step().forward_us == pytest.approx(1.5e6)
    engine.step()
    assert clock.now == pytest.approx(1.5 + 1.0 + 0.051)


def native(tokens):
    return SamplingParams(max_tokens=tokens).to_native(max_tokens=tokens, seed=0)


@pytest.mark.parametrize(
    "plan",
    [
        StepPlan([(1, 41)]), StepPlan([(1, 0)]), StepPlan([(9, 1)]), StepPlan([(1, 1), (1, 1)]),
        StepPlan([(1, 1)], [1]), StepPlan([(1, 40), (2, 40)]), StepPlan([(1, 1), (2, 1), (3, 1)]),
    ],
)  # fmt: skip
def test_what_the_engine_refuses_the_simulator_refuses(plan):
    engine, _ = simulated(blocks=4, max_sequences=2)
    for id in (1, 2, 3):
        engine.put(id, [0] * 40, native(2))
    with pytest.raises(InvalidArgument, match="cannot be served"):
        engine.step(plan)
    assert engine.free == 4


@pytest.mark.parametrize("policy", POLICIES)
def test_every_policy_ends_under_pressure_and_gives_all_blocks_back(policy):
    engine, clock = simulated(blocks=20, max_model_len=300)
    asks = make_asks(60, 80, 40, 1000, 300, 5)
    drive = Drive(make_scheduler(policy, engine), asks, Load(clients=12), clock=SimulatedClock(clock), seed=1)
    records = list(drive.run())
    assert len(records) == 60
    assert all(r.completed and len(r.tokens) == r.output_tokens for r in records)
    assert engine.free == 20


@pytest.mark.parametrize("policy", ["splitfuse", "prefill_first", "orca", "static_chunk", "even"])
def test_the_simulator_runs_the_steps_that_the_engine_runs(tiny_llama, policy):
    path = tiny_llama()
    asks = make_asks(24, 60, 12, 250, 200, 3)

    def steps(engine):
        scheduler = make_scheduler(policy, engine)
        for ask in asks:
            scheduler.submit(ask.prompt, SamplingParams(max_tokens=ask.output, ignore_eos=True, seed=0))
        found = []
        while scheduler.has_work:
            output = scheduler.step()
            found.append((output.decode_tokens, output.prefill_tokens, [t for _, t in output.chunks]))
        return found

    loaded = load(path)
    config = engine_config(
        path, blocks=40, token_budget=48, max_step_tokens=step_tokens(policy), max_sequences=8,
        prefix_caching=False, max_model_len=512,
    )  # fmt: skip
    engine = Engine(loaded.config, loaded.weights, config)
    capacity = engine.query()
    copy, _ = simulated(
        token_budget=48,
        max_step_tokens=capacity.max_step_tokens,
        max_sequences=8,
        max_model_len=512,
        blocks=40,
    )
    assert steps(copy) == steps(engine)


def test_the_wait_for_the_step_in_between_counts():
    """A request that comes at 0.1 s, while another one's forward runs until 1 s, was sent at 0.1 s."""
    clock = VirtualClock()
    engine = SimulatedEngine(
        CurveCost([(1, 1.0), (2, 1.0)]), clock, token_budget=64, max_step_tokens=64, max_sequences=8,
        max_model_len=64, blocks=64,
    )  # fmt: skip
    load = Load(rate=10.0)
    drive = Drive(
        make_scheduler("splitfuse", engine), [Ask([1], 2)] * 3, load, clock=SimulatedClock(clock), seed=0
    )
    for _ in drive.run():
        pass
    assert sorted(r.sent for r in drive.records) == pytest.approx(load.first_arrivals(3, 0))


def test_clients_ask_again_when_they_were_answered():
    engine, clock = simulated(CurveCost([(1, 1.0), (2, 1.0)]))
    asks = make_asks(30, 20, 5, 1000, 100, 1)
    drive = Drive(
        make_scheduler("splitfuse", engine), asks, Load(clients=4), clock=SimulatedClock(clock), seed=1
    )
    records = list(drive.run())
    moments = sorted({m for r in records for m in (r.sent, r.ended)})
    open_at = [sum(r.sent <= m < r.ended for r in records) for m in moments]
    assert max(open_at) == 4
    ends = {r.ended for r in records}
    assert all(r.sent in ends for r in sorted(records, key=lambda r: r.sent)[4:])
    assert sum(s.seconds for s in drive.steps) <= clock.now


def test_a_drive_that_is_left_keeps_its_records_and_frees_the_engine():
    engine, clock = simulated()
    asks = make_asks(30, 20, 5, 1000, 100, 1)
    drive = Drive(
        make_scheduler("splitfuse", engine), asks, Load(clients=4), clock=SimulatedClock(clock), seed=1
    )
    running = drive.run()
    for _ in range(6):
        next(running)
    drive.cancel()
    assert sum(r.completed for r in drive.records) >= 6
    assert engine.free == 200


# ---------------------------------------------------------------- FastGen's claims, on FastGen's machine


@pytest.fixture(scope="module")
def on_a100():
    """Llama-2-70B on four A100, prompts of 2600, answers of 60, simulated."""
    clock = VirtualClock()
    engine = SimulatedEngine(
        A100_70B, clock, token_budget=768, max_step_tokens=9000, max_sequences=768, max_model_len=9000, blocks=20_000
    )  # fmt: skip
    policies = ["splitfuse", "prefill_first", "orca", "static_chunk"]
    loads = [Load(clients=n) for n in (1, 2, 4, 8, 16, 32)]
    return simulate_on(engine, SimulatedClock(clock), policies, loads, Workload(2600, 60, None, 42))


def test_effective_throughput(on_a100):
    assert compare(on_a100["cells"], "prefill_first", "mid")["effective_ratio"] >= 1.8


def test_tokens_come_steadily(on_a100):
    assert compare(on_a100["cells"], "prefill_first", "mid")["p95_itl_ratio"]["16 clients"] >= 3.7


def test_raw_throughput_is_not_the_price(on_a100):
    for base in ("prefill_first", "orca", "static_chunk"):
        assert min(compare(on_a100["cells"], base, "mid")["request_throughput_ratio"].values()) >= 0.98


# ---------------------------------------------------------------- the real engine, real servers, the command


def test_a_grid_on_the_real_engine(tiny_llama):
    path = tiny_llama()
    loaded = load(path)
    engine = Engine(
        loaded.config, loaded.weights, engine_config(path, max_step_tokens=1 << 20, prefix_caching=False)
    )
    slas = scaled(1.0, 40)
    grid = Grid(
        engine,
        ["splitfuse", "orca"],
        [Load(clients=3), Load(rate=200.0)],
        Workload(40, 8, 10, 1),
        slas,
        Clock(),
    )
    assert grid.total(2) == sum(1 for _ in grid.run(2)) == 80
    for cell in grid.cells.values():
        facts = cell.facts(slas)
        assert (facts["completed"], facts["failed"], len(facts["runs"])) == (20, 0, 2)
        assert facts["effective_throughput"]["lax"] == pytest.approx(facts["request_throughput"])
        assert facts["steady"] == steady_of_all([run["steady"] for run in facts["runs"]])
        assert facts["steady"]["duration"] > 0
        assert 0 < facts["steps"]["busy"] <= 1
    assert engine.query().used_blocks == 0


@pytest.fixture(scope="module")
def server(tiny_llama):
    with serving(str(tiny_llama())) as running:
        yield running


@pytest.mark.parametrize("options", [HttpOptions(), HttpOptions(text=True), HttpOptions(endpoint="chat")])
def test_http_clients_count_every_token(server, options):
    asks = make_asks(12, 30, 9, 250, 200, 1)
    seen = []
    records = asyncio.run(
        closed_loop([server.url] * 2, asks, 4, options=options, on_record=seen.append, seed=1)
    )
    assert [r.error for r in records] == [None] * 12
    assert len(seen) == 12
    for r in records:
        assert len(r.tokens) == r.output_tokens
        assert r.sent < r.tokens[0] <= r.tokens[-1] <= r.ended
        assert sorted(r.tokens) == r.tokens


def test_http_arrivals_and_errors(server):
    asks = make_asks(10, 20, 4, 250, 100, 1)
    asks[3].prompt[:] = [0] * 5000  # longer than the context
    records = asyncio.run(poisson([server.url], asks, 100.0, options=HttpOptions(), seed=1))
    errors = [r.error for r in records if r.error]
    assert len(errors) == 1
    assert errors[0].startswith("400: ")
    assert sum(r.completed for r in records) == 9


def test_nobody_there():
    with pytest.raises(OSError, match=r"127\.0\.0\.1"):
        asyncio.run(
            closed_loop(["http://127.0.0.1:9"], make_asks(1, 2, 2, 9, 9, 1), 1, options=HttpOptions())
        )


def bench(*arguments, what="serve", **options):
    command = [sys.executable, "-m", "splitfuse", "bench", what, *map(str, arguments)]
    return subprocess.run(command, capture_output=True, text=True, check=False, timeout=300, **options)


SMALL = (
    "--prompt",
    40,
    "--generate",
    6,
    "--requests",
    6,
    "--clients",
    2,
    "--threads",
    1,
    "--kv-memory",
    "16MiB",
)


def test_the_command(tiny_llama, tmp_path):
    options = ("--simulate", "--output", tmp_path / "r", "--json", "--goodput", "ttft:1e6", "--save-detailed")
    out = bench(tiny_llama(), *SMALL, "--token-budget", 64, *options)
    assert out.returncode == 0, out.stderr
    facts = json.loads(out.stdout)
    assert facts == json.loads((tmp_path / "r" / "serve.json").read_text())
    assert facts["complete"] is True
    assert [(c["policy"], c["completed"]) for c in facts["cells"]] == [("splitfuse", 6), ("prefill_first", 6)]
    for cell in facts["cells"]:
        assert cell["request_goodput"] == cell["request_throughput"] == cell["runs"][0]["request_goodput"]
        assert [sum(cell["input_lens"]), sum(cell["output_lens"])] == [
            cell["total_input_tokens"],
            cell["total_output_tokens"],
        ]
        assert all(len(i) == n - 1 for i, n in zip(cell["itls"], cell["output_lens"], strict=True))
    assert len(facts["simulated"]["cells"]) == 2
    assert "ttfts" not in facts["simulated"]["cells"][0]
    assert not math.isnan(facts["comparison"]["request_throughput_ratio"]["2 clients"])
    assert len(facts["comparison"]["effective_by_load"]["2 clients"]) == 2
    assert (tmp_path / "r" / "serve.png").read_bytes().startswith(b"\x89PNG")


def test_the_command_against_servers(server, tiny_llama):
    kept = ("--json", "--save-detailed", "--goodput", "e2el:1e6")
    out = bench("--url", server.url + "/v1/", *SMALL[:8], "--vocab", 250, *kept)
    assert out.returncode == 0, out.stderr
    (cell,) = json.loads(out.stdout)["cells"]
    assert (cell["completed"], cell["failed"]) == (6, 0)
    assert cell["request_goodput"] == cell["request_throughput"]
    assert cell["start_times"] == sorted(cell["start_times"])
    assert cell["errors"] == [""] * 6
    out = bench(tiny_llama(), "--replicas", 1, 2, *SMALL, "--vocab", 250, "--token-budget", 64, "--json")
    assert out.returncode == 0, out.stderr
    facts = json.loads(out.stdout)
    assert [row["replicas"] for row in facts["scaling"]] == [1, 2]
    assert [c["completed"] for c in facts["cells"]] == [6, 6]
    assert all(0 < c["steps"]["busy"] <= 1 for c in facts["cells"])


def test_what_http_costs(tiny_llama):
    arguments = ["--requests", 4, "--input", 20, "--output", 8, "--repeat", 2, "--streams", 6]
    engine = ["--stream-input", 3, "--stream-output", 5, "--threads", 1, "--kv-memory", "16MiB"]
    out = bench(tiny_llama(), *arguments, *engine, "--json", what="overhead")
    assert out.returncode == 0, out.stderr
    facts = json.loads(out.stdout)
    assert [r["ratio"] for r in facts["rounds"]] == pytest.approx(
        [r["http_tokens_per_s"] / r["in_process_tokens_per_s"] for r in facts["rounds"]]
    )
    assert len(facts["rounds"]) == 2
    assert 0 < facts["throughput_ratio"] < 2
    assert 0 < facts["busy"] < 1


def test_replicas_have_the_options_of_the_engine():
    options = ("--kv-memory", "7MiB", "--max-sequences", "5", "--max-model-len", "99", "--isa", "avx2")
    parsed = cli.build_parser().parse_args(
        ["bench", "serve", "demo", "--replicas", "1", "--device", "cpu", "--threads", "1", *options]
    )
    started = cli.build_parser().parse_args(["serve", "demo", *engine_arguments(engine_options(parsed))])
    assert engine_options(started) == engine_options(parsed)


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((), "name a MODEL, or servers with --url"),
        (("demo", "--url", "http://x"), "not both"),
        (("--url", "http://x", "--replicas", "2"), "leave --url out"),
        (("--url", "http://x", "--repeat", "2"), "--repeat is for policies of one engine"),
        (("demo", "--replicas", "2", "--simulate"), "--simulate is for policies of one engine"),
        (("demo", "--replicas", "2", "--policies", "orca"), "--policies is for policies of one engine"),
        (("demo", "--save-detailed"), "add --output or --json"),
        (("demo", "--goodput", "ttft"), "--goodput ttft: give ttft, tpot, e2el as NAME:MILLISECONDS"),
        (("demo", "--rate", "0"), "--rate must be above 0"),
        (("demo", "--rate", "nan"), "--rate must be above 0"),
        (("--url", "127.0.0.1:8000"), "begins with http://"),
        (("demo", "--policies", "fifo"), "invalid choice: 'fifo'"),
    ],
)
def test_what_the_command_refuses(arguments, message):
    out = bench(*arguments)
    assert out.returncode == 2
    assert message in out.stderr
