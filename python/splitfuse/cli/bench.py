"""`splitfuse bench`: measures a model, or the machine."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path
from typing import Any

from . import bench_serve
from .options import add_engine, add_kernel, add_kv_dtype, add_model, add_policy, engine_options

_EXAMPLES = """\
examples:
  splitfuse bench roofline
  splitfuse bench kernels demo --threads 1
  splitfuse bench latency demo --batch 1 8 32 --context 256
  splitfuse bench saturation demo --plot saturation.png
  splitfuse bench throughput demo --requests 64 --input 512 --output 64 --json
  splitfuse bench overhead demo --repeat 4

"of roof" is the least time that memory bandwidth and arithmetic, both measured in the same run, allow, over
the time taken."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "bench",
        help="measure a model, or the machine",
        description="Measures, and gives every figure with its share of what the machine could do.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    what = parser.add_subparsers(dest="what", metavar="WHAT", required=True)
    _add_throughput(what)
    _add_latency(what)
    _add_saturation(what)
    _add_serve(what)
    _add_overhead(what)
    _add_kernels(what)
    _add_roofline(what)


def _add(what: Any, name: str, summary: str, description: str) -> argparse.ArgumentParser:
    parser: argparse.ArgumentParser = what.add_parser(name, help=summary, description=description)
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    return parser


def _add_throughput(what: Any) -> None:
    parser = _add(
        what,
        "throughput",
        "many requests at once",
        "Submits requests of random tokens all at once. Lengths are normal with a deviation of 30 %.",
    )
    add_model(parser)
    parser.add_argument("--requests", type=_count, default=64, metavar="N", help="requests (default: 64)")
    parser.add_argument(
        "--input", type=_count, default=512, metavar="N", help="mean prompt in tokens (default: 512)"
    )
    parser.add_argument(
        "--output", type=_count, default=64, metavar="N", help="mean answer in tokens (default: 64)"
    )
    parser.add_argument(
        "--repeat", type=_count, default=1, metavar="N", help="runs; the best counts (default: 1)"
    )
    parser.add_argument(
        "--seed", type=int, default=0, metavar="N", help="of lengths and prompts (default: 0)"
    )
    add_policy(parser)
    add_engine(parser, caches=False)
    parser.set_defaults(run=_with_engine("throughput"))


def _add_latency(what: Any) -> None:
    parser = _add(
        what,
        "latency",
        "prefill and decode, by prompt length and batch size",
        "Times the prefill of one prompt, the decode steps of a batch, and the host's share of a step.",
    )
    add_model(parser)
    parser.add_argument(
        "--prefill",
        type=_count,
        nargs="+",
        default=[512, 2048],
        metavar="N",
        help="prompt lengths (default: 512 2048)",
    )
    parser.add_argument(
        "--batch",
        type=_count,
        nargs="+",
        default=[1, 8, 32],
        metavar="N",
        help="batch sizes of decode (default: 1 8 32)",
    )
    parser.add_argument(
        "--context", type=_count, default=256, metavar="N", help="context of decode (default: 256)"
    )
    parser.add_argument(
        "--steps", type=_count, default=64, metavar="N", help="decode steps timed (default: 64)"
    )
    parser.add_argument(
        "--repeat", type=_count, default=3, metavar="N", help="runs; the median counts (default: 3)"
    )
    parser.add_argument(
        "--no-host", dest="host", action="store_false", help="leave out the host's time at 256 sequences"
    )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default: 0)")
    add_engine(parser, caches=False)
    parser.set_defaults(run=_with_engine("latency"))


def _add_serve(what: Any) -> None:
    parser = _add(
        what,
        "serve",
        "a server under load, or policies beside each other",
        "FastGen's method: clients ask, and what counts is what came in time. On one engine with one policy after "
        "the other, or against servers.",
    )
    parser.epilog = bench_serve.EXAMPLES
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    bench_serve.add_options(parser, _count)


def _add_overhead(what: Any) -> None:
    parser = _add(
        what,
        "overhead",
        "what HTTP costs beside the same in process",
        "Runs the same requests in process and through HTTP streams of a server with the same options, in turns, and "
        "gives the ratio of their throughputs; then, under many streams at once, the share of the time that the "
        "server's engine spends in steps.",
    )
    add_model(parser)
    for name, default, text in (
        ("requests", 64, "requests at once, each round"),
        ("input", 512, "mean prompt in tokens"),
        ("output", 64, "mean answer in tokens"),
        ("repeat", 3, "rounds of each; the median ratio counts"),
        ("streams", 256, "streams at once"),
        ("stream-input", 32, "tokens of each stream's prompt"),
        ("stream-output", 128, "tokens of each stream's answer"),
    ):
        parser.add_argument(
            f"--{name}", type=_count, default=default, metavar="N", help=f"{text} (default: {default})"
        )
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default: 0)")
    add_policy(parser)
    add_engine(parser, caches=False)
    parser.set_defaults(run=_with_engine("overhead"))


def _add_saturation(what: Any) -> None:
    parser = _add(
        what,
        "saturation",
        "one forward, by its tokens",
        "Times forwards of 1, 2, 3, 4, 6, 8, ... tokens of prompts: where throughput stops to grow, a larger "
        "token budget only makes every step longer.",
    )
    add_model(parser)
    parser.add_argument(
        "--max",
        type=_count,
        metavar="N",
        help="tokens of the largest forward (default: 2048, or what the context allows)",
    )
    parser.add_argument(
        "--prompt",
        type=_count,
        default=512,
        metavar="N",
        help="longest prompt; larger forwards are of several (default: 512)",
    )
    parser.add_argument(
        "--repeat", type=_count, default=5, metavar="N", help="runs; the median counts (default: 5)"
    )
    parser.add_argument("--plot", type=Path, metavar="FILE", help="draw it too, as .png, .svg, .pdf, ...")
    parser.add_argument("--seed", type=int, default=0, metavar="N", help="of the prompts (default: 0)")
    add_engine(parser, caches=False)
    parser.set_defaults(run=_with_engine("saturation"))


def _add_kernels(what: Any) -> None:
    parser = _add(
        what,
        "kernels",
        "single operations in a model's shapes",
        "Times each linear layer of MODEL by rows, and attention by chunk and context. Loads no weights.",
    )
    add_model(parser)
    add_kernel(parser)
    add_kv_dtype(parser)
    parser.add_argument(
        "--seconds", type=float, default=0.2, metavar="S", help="time for each measurement (default: 0.2)"
    )
    parser.set_defaults(run=_without_engine("kernels"))


def _add_roofline(what: Any) -> None:
    parser = _add(
        what,
        "roofline",
        "the machine's limits",
        "Measures memory bandwidth, the peak of multiply-add, and the thread pool, on one thread and on all.",
    )
    add_kernel(parser)
    parser.add_argument(
        "--seconds", type=float, default=1.0, metavar="S", help="time for each measurement (default: 1)"
    )
    parser.set_defaults(run=_without_engine("roofline"))


def _with_engine(name: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        code: int = import_module(f"...bench.{name}", __name__).run(args, engine_options(args))
        return code

    return run


def _without_engine(name: str) -> Callable[[argparse.Namespace], int]:
    def run(args: argparse.Namespace) -> int:
        code: int = import_module(f"...bench.{name}", __name__).run(args)
        return code

    return run


def _count(text: str) -> int:
    try:
        if (value := int(text)) >= 1:
            return value
    except ValueError:
        pass
    raise argparse.ArgumentTypeError(f"must be an integer of at least 1, not {text!r}")
