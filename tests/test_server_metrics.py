"""What /metrics says, held to scripted runs by exact numbers: the clock is the test's own."""

from __future__ import annotations

import asyncio
import json
import re
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from prometheus_client.openmetrics.parser import text_string_to_metric_families as parse_openmetrics

from engines import engine_config, random_tokens
from fake_engine import spells
from scripted_server import HISTOGRAMS, Clock, Page, Scripted, TimedEngine, serving
from splitfuse import Engine, Scheduler, loader
from splitfuse.server.errors import ApiError
from splitfuse.server.metrics_counts import TokenTimes
from splitfuse.server.runtime import StepRecord
from splitfuse.server.settings import Limits

pytestmark = pytest.mark.machine_independent
ROOT = Path(__file__).resolve().parent.parent

COUNTERS = {
    "vllm:num_preemptions_total", "vllm:prompt_tokens_total", "vllm:prompt_tokens_cached_total",
    "vllm:generation_tokens_total", "vllm:request_success_total", "vllm:prefix_cache_queries_total",
    "vllm:prefix_cache_hits_total", "vllm:admission_rejections_total", "splitfuse:step_tokens_total",
    "splitfuse:preemptions_total", "splitfuse:prefix_cache_hit_tokens_total", "splitfuse:busy_seconds_total",
    "splitfuse:engine_restarts_total",
}  # fmt: skip
GAUGES = {
    "vllm:num_requests_running", "vllm:num_requests_waiting", "vllm:num_requests_waiting_by_reason",
    "vllm:kv_cache_usage_perc",
    "vllm:cache_config_info", "vllm:lora_requests_info", "splitfuse:kv_blocks", "splitfuse:policy_info",
}  # fmt: skip


@pytest.fixture
def clock(monkeypatch: pytest.MonkeyPatch) -> Clock:
    clock = Clock()
    for module in ("_answer", "_beginnings", "request", "scheduler", "server.runtime"):
        monkeypatch.setattr(f"splitfuse.{module}.time", clock)
    return clock


# ---------------------------------------------------------------- exact values


def test_two_requests(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock, token_budget=8) as runtime:
            engine: Any = runtime.served.engine
            runtime.ask(12, max_tokens=3)
            clock.now += 0.125
            engine.seconds = 0.25
            await runtime.step()  # 8 tokens of the long prompt
            clock.now += 0.5
            runtime.ask(3, max_tokens=2, streamed=True)
            engine.seconds = 0.5
            await runtime.step()  # its other 4 and the 3 of the short one: two first tokens
            engine.seconds = 0.125
            await runtime.step()  # two decodes; the short one ends
            clock.now += 1
            engine.seconds = 0.25
            await runtime.step()  # the last decode
            page = await runtime.scrape()

        page.holds("vllm:time_to_first_token_seconds", [1.375, 0.5])
        page.holds("vllm:inter_token_latency_seconds", [0.125, 0.125, 1.25])
        page.holds("vllm:request_queue_time_seconds", [0.125, 0])
        page.holds("vllm:request_prefill_time_seconds", [1.25, 0.5])
        page.holds("vllm:request_decode_time_seconds", [1.375, 0.125])
        page.holds("vllm:request_inference_time_seconds", [2.625, 0.625])
        page.holds("vllm:e2e_request_latency_seconds", [2.75, 0.625])
        page.holds("vllm:request_time_per_output_token_seconds", [1.375 / 2, 0.125])
        page.holds("vllm:request_prompt_tokens", [12, 3])
        page.holds("vllm:request_generation_tokens", [3, 2])
        page.holds("vllm:request_max_num_generation_tokens", [3, 2])
        page.holds("vllm:request_params_n", [1, 1])
        page.holds("vllm:request_params_max_tokens", [3, 2])
        page.holds("vllm:iteration_tokens_total", [8, 7, 2, 1])
        page.holds("splitfuse:step_seconds", [0.25, 0.5, 0.125, 0.25])
        page.holds("splitfuse:budget_use", [1, 7 / 8, 2 / 8, 1 / 8])
        assert page["splitfuse:step_tokens_total", "kind=prefill"] == 15
        assert page["splitfuse:step_tokens_total", "kind=decode"] == 3
        assert page["splitfuse:busy_seconds_total"] == 1.125
        assert page["vllm:prompt_tokens_total"] == 15
        assert page["vllm:prompt_tokens_cached_total"] == 0
        assert page["vllm:generation_tokens_total"] == 5
        assert page["vllm:request_success_total", "finished_reason=length"] == 2
        for reason in ("stop", "abort", "error"):
            assert page["vllm:request_success_total", f"finished_reason={reason}"] == 0

    asyncio.run(scenario())


def test_first_tokens_count_before_the_end(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock) as runtime:
            runtime.ask(5, max_tokens=50)
            await runtime.step(2)
            page = await runtime.scrape()
            page.holds("vllm:time_to_first_token_seconds", [0.125])
            assert page["vllm:prompt_tokens_total"] == 5
            assert page["vllm:generation_tokens_total"] == 2
            page.holds("vllm:e2e_request_latency_seconds", [])
            await runtime.drain()
            page = await runtime.scrape()
            page.holds("vllm:time_to_first_token_seconds", [0.125])
            page.holds("vllm:e2e_request_latency_seconds", [50 * 0.125])
            assert page["vllm:prompt_tokens_total"] == 5

    asyncio.run(scenario())


def test_the_only_token_is_the_first(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock) as runtime:
            runtime.ask(5, max_tokens=1)
            await runtime.drain()
            page = await runtime.scrape()
            page.holds("vllm:time_to_first_token_seconds", [0.125])
            page.holds("vllm:inter_token_latency_seconds", [])
            page.holds("vllm:request_decode_time_seconds", [0])
            page.holds("vllm:request_time_per_output_token_seconds", [])
            assert page["vllm:prompt_tokens_total"] == 5
            assert page["vllm:generation_tokens_total"] == 1

    asyncio.run(scenario())


def test_several_answers(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock) as runtime:
            stream = runtime.ask(9, n=3, max_tokens=4)
            await runtime.step()  # the prompt
            await runtime.step()  # the others' last prompt token, and the first one's second
            await runtime.drain()
            page = await runtime.scrape()
            outputs = (await stream.result()).outputs
            assert [len(answer.token_ids) for answer in outputs] == [4, 4, 4]
            page.holds("vllm:time_to_first_token_seconds", [0.125])
            page.holds("vllm:inter_token_latency_seconds", [0.125] * 9)
            page.holds("vllm:request_params_n", [3])
            page.holds("vllm:request_generation_tokens", [4, 4, 4])
            page.holds("vllm:request_max_num_generation_tokens", [4])
            page.holds("vllm:request_prompt_tokens", [9])
            page.holds("vllm:e2e_request_latency_seconds", [5 * 0.125])
            assert page["vllm:prompt_tokens_total"] == 9
            assert page["vllm:generation_tokens_total"] == 12
            assert page["vllm:request_success_total", "finished_reason=length"] == 3
            assert page["vllm:prefix_cache_queries_total"] == 27
            assert page["vllm:prefix_cache_hits_total"] == 16
            assert page["splitfuse:prefix_cache_hit_tokens_total"] == 16

    asyncio.run(scenario())


def test_prefix_hits(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock) as runtime:
            for _ in range(2):
                runtime.ask(9, max_tokens=2)
                await runtime.drain()
            page = await runtime.scrape()
            assert page["vllm:prompt_tokens_total"] == 18
            assert page["vllm:prompt_tokens_cached_total"] == 8
            assert page["vllm:prefix_cache_queries_total"] == 18
            assert page["vllm:prefix_cache_hits_total"] == 8

    asyncio.run(scenario())


def test_why_answers_end(clock: Clock) -> None:
    def choose(history: Sequence[int], seed: int, index: int, vocab_size: int) -> int:
        return -1 if history[0] == 99 else spells("hello, world")(history, seed, index, vocab_size)

    async def scenario() -> None:
        async with serving(clock, choose=choose) as runtime:
            prompt = [ord(c) for c in "say|"]
            runtime.ask(prompt, max_tokens=50)  # 12 tokens and the end of sequence
            runtime.ask(prompt, max_tokens=50, stop="lo")  # 5 tokens
            runtime.ask(prompt, max_tokens=3)
            runtime.ask([99, *prompt], max_tokens=3)  # not finite
            await runtime.drain()
            page = await runtime.scrape()
            assert page["vllm:request_success_total", "finished_reason=stop"] == 2
            assert page["vllm:request_success_total", "finished_reason=length"] == 1
            assert page["vllm:request_success_total", "finished_reason=error"] == 1
            assert page["vllm:generation_tokens_total"] == 13 + 5 + 3
            page.holds("vllm:request_generation_tokens", [13, 5, 3])
            page.holds("vllm:time_to_first_token_seconds", [0.125] * 3)
            page.holds("vllm:inter_token_latency_seconds", [0.125] * (12 + 4 + 2))

    asyncio.run(scenario())


def test_cancelled(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock, max_sequences=1) as runtime:
            running = runtime.ask(5, max_tokens=100)
            queued = runtime.ask(7, max_tokens=100)
            await runtime.step(3)
            page = await runtime.scrape()
            assert page["vllm:num_requests_running"] == 1
            assert page["vllm:num_requests_waiting"] == 1
            assert page["vllm:num_requests_waiting_by_reason", "reason=capacity"] == 1
            assert page["vllm:num_requests_waiting_by_reason", "reason=deferred"] == 0
            queued.cancel()
            running.cancel()
            await runtime.drain()
            page = await runtime.scrape()
            assert page["vllm:num_requests_running"] == 0
            assert page["vllm:num_requests_waiting"] == 0
            assert page["vllm:request_success_total", "finished_reason=abort"] == 2
            assert page["vllm:prompt_tokens_total"] == 5
            assert page["vllm:generation_tokens_total"] == 3
            page.holds("vllm:time_to_first_token_seconds", [0.125])
            for name in (
                "e2e_request_latency_seconds",
                "request_queue_time_seconds",
                "request_prompt_tokens",
            ):
                page.holds(f"vllm:{name}", [])

    asyncio.run(scenario())


def test_preempted(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock) as runtime:
            engine: Any = runtime.served.engine
            runtime.ask(5, max_tokens=4)
            await runtime.step(2)
            engine.preempts = [engine.puts[0]]
            await runtime.drain()
            engine.preempts = []
            runtime.ask(7, max_tokens=2)
            await runtime.drain()
            page = await runtime.scrape()
            assert page["vllm:num_preemptions_total"] == 1
            assert page["splitfuse:preemptions_total"] == 1
            page.holds("vllm:request_num_preemptions", [1, 0])
            page.holds("vllm:inter_token_latency_seconds", [0.125] * 4)

    asyncio.run(scenario())


def test_counts_go_on_after_a_restart(clock: Clock) -> None:
    broken = [RuntimeError("broken")]

    async def scenario() -> None:
        fail = lambda step: broken.pop() if step == 3 and broken else None  # noqa: E731
        async with serving(clock, fail=fail, restarts=1) as runtime:
            first = runtime.served
            failed = runtime.ask(5, max_tokens=9)
            await runtime.step(3)
            with pytest.raises(ApiError):
                await failed.result()
            assert (await runtime.scrape())["vllm:generation_tokens_total"] == 2
            while not runtime.ready:
                await asyncio.sleep(0)
            assert runtime.served is not first
            clock.now += 10  # no token of the new engine follows one of the old: both number from 0
            runtime.ask(5, max_tokens=2)
            await runtime.drain()
            page = await runtime.scrape()
            assert page.labels("splitfuse:engine_restarts_total")["model_name"] == "fake"
            assert page["splitfuse:engine_restarts_total"] == 1
            assert page["vllm:request_success_total", "finished_reason=error"] == 1
            assert page["vllm:request_success_total", "finished_reason=length"] == 1
            assert page["vllm:generation_tokens_total"] == 4
            assert page["vllm:prompt_tokens_total"] == 10
            assert page["vllm:prefix_cache_queries_total"] == 10
            page.holds("vllm:inter_token_latency_seconds", [0.125, 0.125])
            page.holds("vllm:time_to_first_token_seconds", [0.125, 0.125])

    asyncio.run(scenario())


def test_rejections(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock, max_sequences=1, limits=Limits(queued=2)) as runtime:
            for _ in range(2):
                runtime.ask(5, max_tokens=5)
            for _ in range(3):
                with pytest.raises(ApiError, match="wait already"):
                    runtime.ask(5, max_tokens=5)
            with pytest.raises(ApiError, match="context"):
                runtime.ask(5, max_tokens=5000)  # never in order, so not a rejection
            runtime.draining = True
            with pytest.raises(ApiError, match="shutting down"):
                runtime.ask(5, max_tokens=5)
            runtime.draining, runtime.failure = False, RuntimeError("broken")
            with pytest.raises(ApiError, match="failed"):
                runtime.ask(5, max_tokens=5)
            page = await runtime.scrape()
            assert page["vllm:admission_rejections_total", "reason=queue_full"] == 3
            assert page["vllm:admission_rejections_total", "reason=draining"] == 1
            assert page["vllm:admission_rejections_total", "reason=unavailable"] == 1

    asyncio.run(scenario())


def test_states_and_infos(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(
            clock, used=16, cached=8, policy="orca", served_names=("shown", "other"), max_sequences=3
        ) as runtime:
            page = await runtime.scrape()
        assert page["vllm:kv_cache_usage_perc"] == 0.25
        assert page["splitfuse:kv_blocks", "state=used"] == 16
        assert page["splitfuse:kv_blocks", "state=cached"] == 8
        assert page["splitfuse:kv_blocks", "state=free"] == 40
        common = {"model_name": "shown", "engine": "0"}
        cache = {"block_size": "16", "num_gpu_blocks": "64", "enable_prefix_caching": "True"}
        assert page.labels("vllm:cache_config_info") == {**cache, **common}
        assert page["vllm:cache_config_info"] == 1
        policy = {"policy": "orca", "token_budget": "32", "max_sequences": "3"}
        assert page.labels("splitfuse:policy_info") == {**policy, **common}
        lora = {"max_lora": "0", "waiting_lora_adapters": "", "running_lora_adapters": ""}
        assert page.labels("vllm:lora_requests_info") == lora

    asyncio.run(scenario())


# ---------------------------------------------------------------- names and formats


def test_every_name_type_and_label(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock) as runtime:
            page = await runtime.scrape()
        kinds = {f"{f.name}_total" if f.type == "counter" else f.name: f.type for f in page.families}
        ours = {name: kind for name, kind in kinds.items() if not name.startswith("process_")}
        assert ours == {
            **dict.fromkeys(HISTOGRAMS, "histogram"),
            **dict.fromkeys(COUNTERS, "counter"),
            **dict.fromkeys(GAUGES, "gauge"),
        }
        assert "process_resident_memory_bytes" in kinds
        for family in page.families:
            assert family.documentation, family.name
            for sample in family.samples:
                if sample.name not in ("vllm:lora_requests_info",) and sample.name in ours:
                    assert sample.labels["model_name"] == "fake"
                    assert sample.labels["engine"] == "0"

    asyncio.run(scenario())


def test_openmetrics_if_asked_for(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock) as runtime:
            runtime.ask(5, max_tokens=2)
            await runtime.drain()
            plain = await runtime.get("text/plain; version=nonsense")
            assert plain.headers["content-type"] == "text/plain; version=0.0.4; charset=utf-8"
            asked = await runtime.get("application/openmetrics-text;version=1.0.0;q=0.5,text/plain;q=0.1")
            assert asked.headers["content-type"].startswith("application/openmetrics-text; version=1.0.0")
            values = {
                (s.name, *sorted(s.labels.items())): s.value
                for family in parse_openmetrics(asked.text)
                for s in family.samples
            }
            same = {
                (s.name, *sorted(s.labels.items())): s.value
                for s in Page(plain.text).samples
                if not s.name.startswith("process_") and s.name != "vllm:lora_requests_info"
            }
            assert {key: values[key] for key in same} == same

    asyncio.run(scenario())


def test_nothing_before_the_model_is_there(clock: Clock) -> None:
    async def scenario() -> None:
        page = await Scripted(TimedEngine).scrape()
        assert all(sample.name.startswith("process_") for sample in page.samples)

    asyncio.run(scenario())


# ---------------------------------------------------------------- a real engine, under pressure


class Naive:
    """Counts token by token."""

    def __init__(self) -> None:
        self.last: dict[int, float] = {}
        self.gaps: list[float] = []
        self.steps: list[StepRecord] = []
        self.answers: list[Any] = []
        self.requests: list[Any] = []

    def on_step(self, step: StepRecord) -> None:
        self.steps.append(step)
        for sequence in step.output.ids.tolist():
            if sequence in self.last:
                self.gaps.append(step.ended - self.last[sequence])
            self.last[sequence] = step.ended

    def on_end(self, request: Any) -> None:
        self.requests.append(request)
        self.answers += request.output.outputs


def test_a_real_engine_under_pressure(tiny_llama: Callable[..., Path]) -> None:
    path = tiny_llama()

    def make() -> Engine:
        loaded = loader.load(str(path))
        return Engine(loaded.config, loaded.weights, engine_config(path, blocks=24, token_budget=32))

    async def scenario() -> tuple[Page, Naive]:
        runtime, naive = Scripted(make, Scheduler), Naive()
        runtime.observers.append(naive)
        await runtime.start()
        shared = random_tokens(7, 48)
        streams = [
            runtime.ask(
                shared[: 16 * (i % 4)] + random_tokens(i, 10 + i),
                streamed=i % 3 == 0,
                max_tokens=20 + i,
                n=1 + i % 2,
                ignore_eos=True,
            )
            for i in range(20)
        ]
        streams[5].cancel()
        await asyncio.gather(*(stream.result() for stream in streams))
        while runtime.served.scheduler.has_work:
            await asyncio.sleep(0.01)
        # The last step's own record follows its requests' ends.
        await runtime.stop()
        return await runtime.scrape(), naive

    page, naive = asyncio.run(scenario())
    steps, answers = naive.steps, naive.answers
    assert page["vllm:num_preemptions_total"] == sum(len(s.output.preempted) for s in steps) > 0
    assert page["vllm:generation_tokens_total"] == sum(len(a.token_ids) for a in answers)
    ends = Counter(a.finish_reason for a in answers)
    for reason in ("length", "abort"):
        assert page["vllm:request_success_total", f"finished_reason={reason}"] == ends[reason] > 0
    began = [r for r in naive.requests if r.times.first_token is not None]
    page.holds("vllm:time_to_first_token_seconds", [r.times.first_token - r.times.arrived for r in began])
    assert page["vllm:prompt_tokens_total"] == sum(len(r.prompt_token_ids) for r in began)
    assert page["vllm:prompt_tokens_cached_total"] == sum(r.cached_tokens for r in began)
    page.holds("vllm:inter_token_latency_seconds", naive.gaps)
    ended = [r for r in naive.requests if all(a.finish_reason == "length" for a in r.output.outputs)]
    page.holds("vllm:request_num_preemptions", [r.preemptions for r in ended])
    for kind in ("prefill", "decode"):
        tokens = sum(getattr(s.output, f"{kind}_tokens") for s in steps)
        assert page["splitfuse:step_tokens_total", f"kind={kind}"] == tokens > 0
    assert page["splitfuse:prefix_cache_hit_tokens_total"] == sum(s.output.cached_tokens for s in steps) > 0
    assert page["vllm:prefix_cache_hits_total"] == steps[-1].capacity.prefix_hits > 0
    assert page["splitfuse:kv_blocks", "state=used"] == 0
    assert page["vllm:num_requests_running"] == page["vllm:num_requests_waiting"] == 0


def test_sequences_that_are_gone_are_forgotten() -> None:
    import numpy as np

    times = TokenTimes()
    gone: Any = SimpleNamespace(request_of=lambda sequence: None)
    for i in range(5000):
        output = SimpleNamespace(ids=np.array([i]), finish=np.zeros(1, np.uint8))
        times.on_step(StepRecord(float(i), 0.0, output, None, 0, gone))  # type: ignore[arg-type]
    assert len(times._last) <= 2 * 1024


# ---------------------------------------------------------------- the dashboard


def dashboard() -> dict[str, Any]:
    return json.loads((ROOT / "docs/grafana.json").read_text())


def test_the_dashboard_queries_what_there_is(clock: Clock) -> None:
    async def scenario() -> None:
        async with serving(clock) as runtime:
            page = await runtime.scrape()
        labels: dict[str, set[str]] = {}
        for sample in page.samples:
            labels.setdefault(sample.name, {"instance"}).update(sample.labels)
        asked = [t["expr"] for panel in dashboard()["panels"] for t in panel["targets"]]
        asked += [variable["query"]["query"] for variable in dashboard()["templating"]["list"]]
        for query in asked:
            names = re.findall(r"\b(?:vllm|splitfuse):\w+", query)
            assert names, query
            used = re.findall(r"(\w+)=~", query)
            used += [label for by in re.findall(r"by \(([^)]*)\)", query) for label in by.split(", ")]
            for name in names:
                assert name in labels, query
                assert set(used) <= labels[name], query
        for name in ("step_tokens", "budget_use", "preemptions", "step_seconds", "engine_restarts"):
            assert any(f"splitfuse:{name}" in query for query in asked), name

    asyncio.run(scenario())


def test_the_dashboard_can_be_imported() -> None:
    board = dashboard()
    assert board["schemaVersion"] >= 36
    assert board["id"] is None
    for name in ("title", "uid", "tags", "time", "refresh", "templating", "annotations", "__requires"):
        assert board[name], name
    (source,) = board["__inputs"]
    assert (source["type"], source["pluginId"]) == ("datasource", "prometheus")
    uid = "${%s}" % source["name"]
    assert {variable["datasource"]["uid"] for variable in board["templating"]["list"]} == {uid}
    assert len({panel["id"] for panel in board["panels"]}) == len(board["panels"])
    taken: set[tuple[int, int]] = set()
    for panel in board["panels"]:
        assert panel["title"]
        assert panel["description"]
        assert panel["fieldConfig"]["defaults"]["unit"]
        assert panel["datasource"] == {"type": "prometheus", "uid": uid}
        place = panel["gridPos"]
        cells = {(place["x"] + x, place["y"] + y) for x in range(place["w"]) for y in range(place["h"])}
        assert max(x for x, _ in cells) < 24, panel["title"]
        assert not cells & taken, panel["title"]
        taken |= cells
        for target in panel["targets"]:
            assert target["expr"]
            assert target["refId"]
            assert target["legendFormat"]
            assert target["datasource"]["uid"] == uid


def test_the_documentation_names_every_metric() -> None:
    text = (ROOT / "docs/metrics.md").read_text()
    for name in {*HISTOGRAMS, *COUNTERS, *GAUGES}:
        assert f"`{name}`" in text, name
