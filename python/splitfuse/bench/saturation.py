"""`splitfuse bench saturation`: how fast a forward is by its tokens, the measurement behind the token budget."""

from __future__ import annotations

import argparse
import math
import statistics
import time
from pathlib import Path
from typing import Any

from .._core import ConfigError, InvalidArgument, StepPlan
from .._progress import CountBar, on_terminal
from .common import Bench, Table, emit, greedy, of_roof, open_bench, roof_facts

_LARGEST = 2048  # tokens, where the model's context allows
_PLATEAU = 0.95  # of the best throughput


def run(args: argparse.Namespace, options: dict[str, Any]) -> int:
    if args.plot is not None:
        _check_plot(args.plot)
    options["max_step_tokens"] = args.max or _LARGEST
    with open_bench(args.model, args.seed, options) as bench:
        sizes = _sizes(_largest(bench, args.max, args.prompt))
        roof = bench.roof()
        seconds = _measure(bench, sizes, args.prompt, args.repeat)
        roof = roof.or_better(bench.roof())
        best = max(tokens / statistics.median(times) for tokens, times in seconds.items())
        rows = []
        for tokens, times in seconds.items():
            median = statistics.median(times)
            work = bench.costs.forward([(0, length) for length in _chunks(tokens, args.prompt)], 0)
            rows.append(
                {
                    "tokens": tokens,
                    "seconds": median,
                    "best_seconds": min(times),
                    "tokens_per_s": tokens / median,
                    "of_best": tokens / median / best,
                    "roof_tokens_per_s": tokens / roof.seconds(work),
                    "of_roof": roof.seconds(work) / median,
                }
            )
        facts = {
            "name": bench.name,
            "engine": bench.engine.describe(),
            "prompt": args.prompt,
            "token_budget": bench.engine.query().token_budget,
            "budget_curve": bench.engine.budget_curve(),
            "knee": bench.costs.knee(roof),
            "plateau": next(row["tokens"] for row in rows if row["of_best"] >= _PLATEAU),
            "roof": roof_facts(roof),
            "rows": rows,
        }
    if args.plot is not None:
        _plot(facts, args.plot)
    emit(facts, args.json, _tables(facts))
    return 0


def _largest(bench: Bench, asked: int | None, prompt: int) -> int:
    """The largest forward to measure. Raises InvalidArgument if the engine can't run it."""
    capacity = bench.engine.query()
    largest = asked or min(_LARGEST, capacity.max_step_tokens)
    if largest > capacity.max_step_tokens:
        raise InvalidArgument(
            f"a forward of {largest} tokens is more than this engine takes, {capacity.max_step_tokens}, the "
            "longest sequence: ask for less, or raise --max-model-len or --kv-memory"
        )
    sequences = math.ceil(largest / prompt)
    if sequences > capacity.max_sequences:
        raise InvalidArgument(
            f"{largest} tokens of prompts of {prompt} are {sequences} sequences, more than the "
            f"{capacity.max_sequences} of one forward: ask for longer prompts, or raise --max-sequences"
        )
    bench.check_fits(min(prompt, largest) + 1, sequences)
    return largest


def _sizes(largest: int) -> list[int]:
    """Powers of two and what lies midway, and the largest."""
    powers = [2**i for i in range(largest.bit_length())]
    return sorted(
        {size for power in powers for size in (power, power * 3 // 2) if size <= largest} | {largest}
    )


def _chunks(tokens: int, prompt: int) -> list[int]:
    """A forward of so many tokens, as the beginnings of prompts of at most `prompt` tokens."""
    return [min(prompt, tokens - done) for done in range(0, tokens, prompt)]


def _measure(bench: Bench, sizes: list[int], prompt: int, repeat: int) -> dict[int, list[float]]:
    """Seconds of each forward. All sizes take turns, so that what the machine does meanwhile hits all."""
    times: dict[int, list[float]] = {tokens: [] for tokens in sizes}
    with CountBar("Measuring", repeat * len(sizes), on_terminal()) as bar:
        for tokens in sizes:
            _forward(bench, _chunks(tokens, prompt))  # warm up
        for done in range(repeat * len(sizes)):
            tokens = sizes[done % len(sizes)]
            times[tokens].append(_forward(bench, _chunks(tokens, prompt)))
            bar.update(done + 1)
    return times


def _forward(bench: Bench, chunks: list[int]) -> float:
    """Seconds of one forward. Each prompt has a token more than runs, so no logits are made."""
    params = greedy(1).to_native(max_tokens=1, seed=0)
    for i, tokens in enumerate(chunks):
        bench.engine.put(i, bench.prompt(tokens + 1), params)
    plan = StepPlan(list(enumerate(chunks)))
    begin = time.perf_counter()
    bench.engine.step(plan)
    took = time.perf_counter() - begin
    for i in range(len(chunks)):
        bench.engine.flush(i)
    return took


def _tables(facts: dict[str, Any]) -> list[Table]:
    rows = [
        (
            str(r["tokens"]),
            f"{1e3 * r['seconds']:.2f}",
            f"{1e3 * r['best_seconds']:.2f}",
            f"{r['tokens_per_s']:,.0f}",
            f"{100 * r['of_best']:.0f} %",
            of_roof(r["of_roof"]),
        )
        for r in facts["rows"]
    ]
    title = f"{facts['name']}: one forward by its tokens, of prompts up to {facts['prompt']}"
    marks = [
        ("knee: from here on arithmetic takes longer than reading the weights", f"{facts['knee']:.0f}"),
        ("plateau: from here on 95 % of the best", str(facts["plateau"])),
        (_budget_name(facts), str(facts["token_budget"])),
    ]
    return [
        (title, ("tokens", "ms", "best ms", "tokens/s", "of best", "of roof"), rows),
        ("Tokens of a forward", ("", ""), marks),
    ]


def _budget_name(facts: dict[str, Any]) -> str:
    return "token budget, measured at start" if facts["budget_curve"] else "token budget, as given"


# ---------------------------------------------------------------- the figure


def _check_plot(file: Path) -> None:
    """Before anything is measured."""
    try:
        from matplotlib.figure import Figure
    except ImportError:
        raise ConfigError("a plot needs matplotlib: pip install 'splitfuse[bench]'") from None
    kinds = Figure().canvas.get_supported_filetypes()
    if file.suffix[1:].lower() not in kinds:
        raise InvalidArgument(f"{file}: a plot's name must end in one of .{', .'.join(sorted(kinds))}")
    if not file.parent.is_dir():
        raise InvalidArgument(f"{file}: there is no folder {file.parent}")


def _plot(facts: dict[str, Any], file: Path) -> None:
    """Throughput above, latency below, over the tokens of a forward."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(8, 7), layout="constrained")
    speed, latency = figure.subplots(2, 1, sharex=True)
    tokens = [r["tokens"] for r in facts["rows"]]
    speed.plot(tokens, [r["tokens_per_s"] for r in facts["rows"]], "o-", label="measured")
    speed.plot(tokens, [r["roof_tokens_per_s"] for r in facts["rows"]], "--", color="gray", label="roof")
    if facts["budget_curve"]:
        speed.plot(*zip(*facts["budget_curve"], strict=True), "s", mfc="none", label="measured at start")
    latency.plot(tokens, [1e3 * r["seconds"] for r in facts["rows"]], "o-")
    for axes in (speed, latency):
        for mark, color in (("knee", "tab:orange"), ("plateau", "tab:purple"), ("token_budget", "tab:green")):
            label = f"{mark.replace('_', ' ')}, {facts[mark]:.0f}"
            axes.axvline(facts[mark], color=color, linestyle=":", label=label)
        axes.set_xscale("log", base=2)
        axes.grid(alpha=0.3)
    speed.set_ylim(bottom=0)
    latency.set_yscale("log")
    powers = [t for t in tokens if t & (t - 1) == 0]
    latency.set_xticks(powers, [str(t) for t in powers])
    latency.set_xlabel("tokens of a forward")
    speed.set_ylabel("tokens/s")
    latency.set_ylabel("ms a forward")
    speed.legend()
    figure.suptitle(f"{facts['name']}: one forward, by its tokens")
    figure.savefig(file, dpi=120)
