"""GET /metrics: what the server counts, under vLLM's names and our own, for Prometheus.

docs/metrics.md says what each means; docs/grafana.json is a dashboard of them.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable
from contextlib import suppress
from functools import partial
from itertools import accumulate

from fastapi import FastAPI, Request, Response
from prometheus_client import CollectorRegistry, ProcessCollector, exposition
from prometheus_client.metrics_core import Metric
from prometheus_client.openmetrics import exposition as openmetrics
from prometheus_client.registry import Collector
from prometheus_client.utils import floatToGoString

from .._core import Capacity
from .errors import ApiError
from .metrics_counts import Histogram, Meter
from .runtime import Runtime

_REJECTIONS = ("queue_full", "draining", "unavailable")  # Runtime.rejections

Labels = dict[str, str]


def install(app: FastAPI, runtime: Runtime) -> None:
    """Counts what `runtime` does from now on, and adds GET /metrics."""
    meter = Meter()
    runtime.observers.append(meter)
    registry = CollectorRegistry()
    registry.register(EngineCollector(runtime, meter))
    ProcessCollector(registry=registry)

    @app.get("/metrics", response_class=Response)
    def metrics(request: Request) -> Response:
        """Prometheus' text format, or OpenMetrics if it is asked for."""
        encode: Callable[[CollectorRegistry], bytes] = exposition.generate_latest
        kind = "text/plain; version=0.0.4; charset=utf-8"
        if "application/openmetrics-text" in request.headers.get("accept", ""):
            # By its default escaping prometheus_client would write "vllm_" for "vllm:" here.
            encode = partial(openmetrics.generate_latest, escaping=openmetrics.ALLOWUTF8)
            kind = "application/openmetrics-text; version=1.0.0; charset=utf-8"
        return Response(encode(registry), headers={"Content-Type": kind})


class EngineCollector(Collector):
    """Everything of `runtime` and `meter`; nothing until a model has been loaded."""

    def __init__(self, runtime: Runtime, meter: Meter) -> None:
        self._runtime = runtime
        self._meter = meter
        self._model_name = ""

    def describe(self) -> Iterable[Metric]:
        return ()  # it shares its registry with nobody whose names could clash

    def collect(self) -> Iterable[Metric]:
        capacity = self._runtime.capacity
        if capacity is None:
            return
        with suppress(ApiError):  # no engine at the moment: it is called as before
            self._model_name = self._runtime.names[0]
        labels = {"model_name": self._model_name, "engine": "0"}
        yield from self._now(capacity, labels)
        yield from self._set_up(capacity, labels)
        yield from self._counters(labels)
        yield from self._histograms(labels)

    def _now(self, capacity: Capacity, labels: Labels) -> Iterable[Metric]:
        waiting = capacity.waiting + self._runtime.queued
        blocks = {
            "used": capacity.used_blocks,
            "cached": capacity.cached_blocks,
            "free": capacity.free_blocks - capacity.cached_blocks,
        }
        yield _gauge(
            "vllm:num_requests_running", "Sequences that are being computed", labels, capacity.running
        )
        yield _gauge("vllm:num_requests_waiting", "Requests and sequences that wait to be", labels, waiting)
        reasons = {"capacity": waiting, "deferred": 0}  # nobody waits here for anything but room
        yield _each(
            "gauge", "vllm:num_requests_waiting_by_reason", "Those, by why they do", labels, "reason", reasons
        )
        used = capacity.used_blocks / capacity.total_blocks
        yield _gauge("vllm:kv_cache_usage_perc", "Share of the KV blocks in use, 0 to 1", labels, used)
        yield _each("gauge", "splitfuse:kv_blocks", "KV blocks", labels, "state", blocks)

    def _set_up(self, capacity: Capacity, labels: Labels) -> Iterable[Metric]:
        settings = self._runtime.settings
        cache = {
            "block_size": str(capacity.block_size),
            "num_gpu_blocks": str(capacity.total_blocks),
            "enable_prefix_caching": str(settings.engine.get("prefix_caching", True)),
        }
        policy = {
            "policy": settings.policy,
            "token_budget": str(capacity.token_budget),
            "max_sequences": str(capacity.max_sequences),
        }
        lora = {"max_lora": "0", "waiting_lora_adapters": "", "running_lora_adapters": ""}
        yield _gauge("vllm:cache_config_info", "The KV cache", {**cache, **labels}, 1)
        yield _gauge("vllm:lora_requests_info", "LoRA adapters: none; the time", lora, time.time())
        yield _gauge("splitfuse:policy_info", "How forwards are planned", {**policy, **labels}, 1)

    def _counters(self, labels: Labels) -> Iterable[Metric]:
        meter, runtime = self._meter, self._runtime
        for name, text, value in (
            ("vllm:prompt_tokens", "Prompt tokens of requests with a first token", meter.prompt_tokens),
            (
                "vllm:prompt_tokens_cached",
                "Those of them found in the prefix cache",
                meter.prompt_tokens_cached,
            ),
            ("vllm:generation_tokens", "Tokens generated", meter.sampled_tokens),
            (
                "vllm:prefix_cache_queries",
                "Prompt tokens looked up in the prefix cache",
                meter.prefix_queries,
            ),
            ("vllm:prefix_cache_hits", "Prompt tokens found there", meter.prefix_hits),
            ("vllm:num_preemptions", "Sequences whose KV blocks were taken away", meter.preemptions),
            ("splitfuse:preemptions", "Sequences whose KV blocks were taken away", meter.preemptions),
            ("splitfuse:prefix_cache_hit_tokens", "Tokens not computed thanks to it", meter.cached_tokens),
            ("splitfuse:busy_seconds", "Time in steps", meter.busy_seconds),
            ("splitfuse:engine_restarts", "Engines built anew after a failure", runtime.restarts),
        ):
            yield _counter(name, text, labels, value)
        kinds = {"prefill": meter.prefill_tokens, "decode": meter.decode_tokens}
        rejected = {reason: runtime.rejections[reason] for reason in _REJECTIONS}
        for name, text, label, values in (
            ("splitfuse:step_tokens", "Tokens computed", "kind", kinds),
            ("vllm:request_success", "Answers that have ended", "finished_reason", meter.ended),
            ("vllm:admission_rejections", "Requests in order that were refused", "reason", rejected),
        ):
            yield _each("counter", name, text, labels, label, values)

    def _histograms(self, labels: Labels) -> Iterable[Metric]:
        meter = self._meter
        for name, text, histogram in (
            ("vllm:time_to_first_token_seconds", "Arrival to first token", meter.first_tokens),
            (
                "vllm:inter_token_latency_seconds",
                "From one token of a sequence to the next",
                meter.token_gaps,
            ),
            ("vllm:request_time_per_output_token_seconds", "A request's mean of that", meter.per_token),
            ("vllm:e2e_request_latency_seconds", "Arrival to end", meter.whole),
            ("vllm:request_queue_time_seconds", "Arrival to first forward", meter.queue),
            ("vllm:request_inference_time_seconds", "First forward to end", meter.inference),
            ("vllm:request_prefill_time_seconds", "First forward to first token", meter.prefill),
            ("vllm:request_decode_time_seconds", "First token to end", meter.decode),
            ("vllm:request_prompt_tokens", "Tokens of a prompt", meter.prompt_lengths),
            ("vllm:request_generation_tokens", "Tokens of an answer", meter.answer_lengths),
            ("vllm:request_max_num_generation_tokens", "Of a request's longest one", meter.longest_answers),
            (
                "vllm:request_num_preemptions",
                "How often blocks were taken from it",
                meter.request_preemptions,
            ),
            ("vllm:request_params_n", "Answers asked for", meter.asked_answers),
            ("vllm:request_params_max_tokens", "max_tokens asked for", meter.asked_tokens),
            ("vllm:iteration_tokens_total", "Tokens of a forward", meter.step_tokens),
            ("splitfuse:step_seconds", "Time of a step", meter.step_seconds),
            ("splitfuse:budget_use", "Tokens of a forward over the token budget", meter.budget_use),
        ):
            yield _histogram(name, text, labels, histogram)


def _gauge(name: str, text: str, labels: Labels, value: float) -> Metric:
    metric = Metric(name, text, "gauge")
    metric.add_sample(name, labels, value)
    return metric


def _counter(name: str, text: str, labels: Labels, value: float) -> Metric:
    metric = Metric(name, text, "counter")
    metric.add_sample(f"{name}_total", labels, value)
    return metric


def _each(kind: str, name: str, text: str, labels: Labels, label: str, values: dict[str, int]) -> Metric:
    """One sample a value of `label`."""
    metric = Metric(name, text, kind)
    for value, number in values.items():
        metric.add_sample(f"{name}_total" if kind == "counter" else name, {label: value, **labels}, number)
    return metric


def _histogram(name: str, text: str, labels: Labels, histogram: Histogram) -> Metric:
    metric = Metric(name, text, "histogram")
    counts = list(accumulate(histogram.counts.copy()))
    for bound, count in zip([*map(floatToGoString, histogram.bounds), "+Inf"], counts, strict=True):
        metric.add_sample(f"{name}_bucket", {**labels, "le": bound}, count)
    metric.add_sample(f"{name}_count", labels, counts[-1])
    metric.add_sample(f"{name}_sum", labels, histogram.total)
    return metric
