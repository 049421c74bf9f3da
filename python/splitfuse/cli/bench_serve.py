"""The options of `splitfuse bench serve`."""

from __future__ import annotations

import argparse
from collections.abc import Callable
from importlib import import_module
from pathlib import Path

from ..policies import POLICIES
from .options import add_engine, engine_options

EXAMPLES = """\
examples:
  splitfuse bench serve demo --policies splitfuse prefill_first --clients 1 4 16 --prompt 520 --generate 60
  splitfuse bench serve demo --policies splitfuse orca --rate 1 2 3 --simulate --output results
  splitfuse bench serve --url http://127.0.0.1:8000 --clients 1 8 32
  splitfuse bench serve demo --replicas 1 2 --clients 4

docs/benchmarks.md tells the method and how to read the plots. Ctrl-C cuts a run short and keeps what it has."""


_POLICIES = ["splitfuse", "prefill_first"]


def add_options(parser: argparse.ArgumentParser, count: Callable[[str], int]) -> None:
    parser.add_argument("model", metavar="MODEL", nargs="?", help="what to serve; not with --url")
    what = parser.add_argument_group("what is measured")
    what.add_argument(
        "--policies",
        nargs="+",
        choices=POLICIES,
        help="policies of one engine, in turns (default: splitfuse prefill_first)",
    )
    what.add_argument("--url", nargs="+", default=[], metavar="URL", help="servers with OpenAI's API instead")
    what.add_argument(
        "--replicas", nargs="+", type=count, default=[], metavar="N", help="so many `splitfuse serve` instead"
    )
    what.add_argument("--simulate", action="store_true", help="the same on a simulated engine, beside it")
    load = parser.add_argument_group("load")
    load.add_argument(
        "--clients",
        nargs="+",
        type=count,
        default=[1, 2, 4, 8, 16, 32],
        metavar="N",
        help="clients that ask again as soon as they were answered (default: 1 2 4 8 16 32)",
    )
    load.add_argument("--rate", nargs="+", type=float, metavar="R", help="requests a second instead, Poisson")
    load.add_argument("--prompt", type=count, default=2600, metavar="N", help="mean tokens (default: 2600)")
    load.add_argument(
        "--generate",
        dest="output_tokens",
        type=count,
        default=60,
        metavar="N",
        help="mean tokens of an answer (default: 60)",
    )
    load.add_argument(
        "--requests", type=count, metavar="N", help="of each run (default: 4 a client and 32; 64 at a rate)"
    )
    load.add_argument("--repeat", type=count, default=1, metavar="N", help="runs of each (default: 1)")
    load.add_argument(
        "--seed", type=int, default=42, metavar="N", help="of lengths and prompts (default: 42)"
    )
    load.add_argument(
        "--goodput",
        nargs="+",
        metavar="NAME:MS",
        help="bounds on ttft, tpot or e2el in milliseconds that make a request good, for request_goodput",
    )
    parser.add_argument("--output", type=Path, metavar="DIR", help="write serve.json and serve.png there")
    parser.add_argument(
        "--save-detailed", action="store_true", help="each request's lengths and times in the results too"
    )
    http = parser.add_argument_group("with --url")
    http.add_argument("--endpoint", choices=["completions", "chat"], default="completions")
    http.add_argument("--api-key", metavar="KEY")
    http.add_argument("--served-model-name", metavar="NAME", help="default: the first of /v1/models")
    http.add_argument(
        "--text", action="store_true", help="prompts as text, for servers that take no token ids"
    )
    http.add_argument(
        "--vocab", type=count, default=1000, metavar="N", help="token ids are below this (default: 1000)"
    )
    add_engine(parser, caches=False)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from .._core import InvalidArgument

    if bool(args.url) == (args.model is not None):
        raise InvalidArgument("name a MODEL, or servers with --url, and not both")
    if args.url and args.replicas:
        raise InvalidArgument("--replicas starts servers of its own; leave --url out")
    if args.url or args.replicas:
        _refuse_what_is_of_one_engine(args)
    if args.save_detailed and args.output is None and not args.json:
        raise InvalidArgument("--save-detailed is for results that are kept: add --output or --json")
    args.policies = args.policies or _POLICIES
    for rate in args.rate or ():
        if not 0 < rate < float("inf"):
            raise InvalidArgument(f"--rate must be above 0, not {rate:g}")
    for url in args.url or ():
        if not url.startswith(("http://", "https://")):
            raise InvalidArgument(f"--url {url}: a URL begins with http:// or https://")
    args.url = [url.rstrip("/").removesuffix("/v1") for url in args.url or ()]
    if args.goodput is not None:
        args.goodput = import_module("...bench.serving.per_request", __name__).Goodput.parse(args.goodput)
    code: int = import_module("...bench.serving.run", __name__).run(args, engine_options(args))
    return code


def _refuse_what_is_of_one_engine(args: argparse.Namespace) -> None:
    from .._core import InvalidArgument

    given = {
        "--policies": args.policies is not None,
        "--simulate": args.simulate,
        "--repeat": args.repeat > 1,
    }
    for option, present in given.items():
        if present:
            raise InvalidArgument(f"{option} is for policies of one engine; not with --url or --replicas")
