"""What the benchmarks share: an engine without its text layer, prompts, percentiles, tables."""

from __future__ import annotations

import json
import math
import random
import sys
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from .._core import Engine, InvalidArgument, StepOutput
from .._progress import byte_bar, on_terminal
from ..engine_setup import engine_config
from ..request import SamplingParams
from .limits import Costs, Roof, measure_roof

_WIDTH = 120  # columns where the output is not a terminal


@dataclass
class Bench:
    """A model ready to be measured."""

    name: str
    engine: Engine
    costs: Costs
    dtype: str
    quantize: str
    threads: int
    isa: str
    rng: random.Random

    def roof(self, seconds: float = 1.0) -> Roof:
        return measure_roof(self.dtype, self.threads, self.isa, seconds, self.quantize)

    def prompt(self, tokens: int) -> list[int]:
        """Random tokens: no two prompts share a prefix, and what they say does not matter to speed."""
        vocab = self.engine.model_config.vocab_size
        return [self.rng.randrange(vocab) for _ in range(tokens)]

    def check_fits(self, tokens: int, sequences: int = 1) -> None:
        """Raises InvalidArgument unless `sequences` of `tokens` can all be held at once: else preemption
        would be measured."""
        capacity = self.engine.query()
        if tokens > capacity.max_model_len:
            raise InvalidArgument(
                f"a sequence of {tokens} tokens exceeds the context of {capacity.max_model_len}: ask for "
                "less, or raise --max-model-len or --kv-memory"
            )
        blocks = sequences * math.ceil(tokens / capacity.block_size)
        if blocks > capacity.total_blocks:
            raise InvalidArgument(
                f"{sequences} sequences of {tokens} tokens need {blocks} KV blocks, and there are "
                f"{capacity.total_blocks}: ask for less, or raise --kv-memory"
            )


@contextmanager
def open_bench(model: str, seed: int, options: dict[str, Any]) -> Iterator[Bench]:
    """`options`: of `engine_config`."""
    from ..loader import load

    config = engine_config(**options)
    loaded = load(model)
    config.quantize = loaded.quantize_as(options.get("quantize"))
    with byte_bar(f"Loading {loaded.name}", on_terminal()) as progress:
        engine = Engine(loaded.config, loaded.weights, config, progress=progress)
    costs = Costs.of(loaded.config, config.dtype, config.quantize, config.kv_dtype)
    try:
        yield Bench(
            loaded.name,
            engine,
            costs,
            config.dtype,
            config.quantize,
            config.threads,
            config.isa,
            random.Random(seed),
        )
    finally:
        engine.close()


def greedy(max_tokens: int) -> SamplingParams:
    return SamplingParams(max_tokens=max_tokens, temperature=0.0, ignore_eos=True)


def percentile(values: Sequence[float], share: float) -> float:
    """The value that `share` of them do not exceed."""
    return sorted(values)[min(len(values) - 1, max(0, math.ceil(share * len(values)) - 1))]


def spread(values: Sequence[float]) -> dict[str, float]:
    return {"p50": percentile(values, 0.5), "p90": percentile(values, 0.9), "p99": percentile(values, 0.99)}


def roof_facts(roof: Roof) -> dict[str, float]:
    facts = {"read_gbps": roof.read_gbps, "peak_gflops": roof.peak_gflops}
    return {**facts, "integer_gops": roof.integer_gops} if roof.integer_gops else facts


def roof_line(roof: Roof) -> str:
    read, peak = f"memory read {roof.read_gbps:.1f} GB/s", f"arithmetic {roof.peak_gflops:.0f} GFLOP/s"
    integers = f", of 8-bit integers {roof.integer_gops:.0f} GOP/s" if roof.integer_gops else ""
    return f"roof measured in this run: {read}, {peak}{integers}"


Table = tuple[str, Sequence[str], Sequence[Sequence[str]]]  # title, columns, rows


def emit(facts: dict[str, Any], as_json: bool, tables: Sequence[Table]) -> None:
    """Prints one JSON object, or tables."""
    if as_json:
        print(json.dumps(facts))
        return
    from rich.box import SIMPLE_HEAD
    from rich.console import Console
    from rich.table import Table as RichTable

    console = Console(width=None if sys.stdout.isatty() else _WIDTH)
    for title, columns, rows in tables:
        console.print(title, style="bold", highlight=False)
        table = RichTable(box=SIMPLE_HEAD, show_edge=False, pad_edge=False, show_header=any(columns))
        for i, column in enumerate(columns):
            table.add_column(column, justify="left" if i == 0 else "right", no_wrap=True)
        for row in rows:
            table.add_row(*row)
        console.print(table)
        console.print()
    if "engine" in facts:
        console.print(facts["engine"], highlight=False)
    if "roof" in facts:
        console.print(roof_line(Roof(**facts["roof"])), highlight=False)


def of_roof(share: float) -> str:
    return f"{100 * share:.0f} %"


def run_to_end(engine: Engine) -> list[StepOutput]:
    """Steps until nothing is left to compute, and flushes what has finished."""
    outputs = []
    while engine.has_work():
        output = engine.step()
        outputs.append(output)
        for row in (output.finish != 0).nonzero()[0]:
            engine.flush(int(output.ids[row]))
    return outputs
