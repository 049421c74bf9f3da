"""`splitfuse run-batch`: answers a file of requests."""

from __future__ import annotations

import argparse
import asyncio
import os
import sys
import time
from typing import TYPE_CHECKING, Any, BinaryIO

from .._core import InvalidArgument
from .._progress import on_terminal
from .options import add_engine, add_loading, add_model, add_policy, loading_options

if TYPE_CHECKING:
    from ..server.batch_file import Results

_EXAMPLES = """\
examples:
  splitfuse run-batch -i in.jsonl -o out.jsonl demo
  make-requests | splitfuse run-batch -i - -o - demo | use-results

A line of IN is a request as OpenAI's batch API takes it, on /v1/chat/completions or /v1/completions:
  {"custom_id": "1", "method": "POST", "url": "/v1/completions", "body": {"prompt": "Once", "max_tokens": 8}}
A line of OUT is what became of it, written as it ends:
  {"id": ..., "custom_id": "1", "response": {"status_code": 200, "request_id": ..., "body": ...}, "error": null}

What OUT has already is not asked again: after an interruption, give the same command. To try failed requests
once more, take their lines out of OUT first. Exit code: 0, 1 if OUT has errors, 2 if it could not go on."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "run-batch",
        help="answer a file of requests",
        description="Answers a file of requests in OpenAI's batch format, as many at once as fill the engine.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "-i", "--input", required=True, metavar="IN", help='requests, one a line; "-": standard input'
    )
    parser.add_argument(
        "-o", "--output", required=True, metavar="OUT", help='results, added to; "-": standard output'
    )
    parser.add_argument(
        "--limit", type=int, metavar="N", help="requests at once (default: twice --max-sequences)"
    )
    parser.add_argument(
        "--served-model-name",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="what requests may call the model (default: its own name)",
    )
    add_policy(parser)
    add_engine(parser)
    add_loading(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..server.batch import run_batch
    from ..server.batch_file import Asks, Results
    from ..server.settings import Limits, Settings

    if args.limit is not None and args.limit < 1:
        raise InvalidArgument(f"--limit must be at least 1, not {args.limit}")
    limit = args.limit or 2 * args.max_sequences
    limits = Limits()
    settings = Settings(
        model=args.model,
        engine=loading_options(args),
        policy=args.policy,
        served_names=tuple(args.served_model_name),
        # A request may hold many prompts, and none is to be turned away.
        limits=Limits(queued=limit * limits.prompts),
    )
    asked = _open_input(args.input, args.output)
    shown = on_terminal()
    total = _requests(asked) if shown and asked.seekable() else None
    results = Results(args.output if args.output != "-" else sys.stdout.fileno())
    asks = Asks(asked, results, limits)
    began = time.monotonic()
    try:
        meter = asyncio.run(run_batch(settings, asks, results, limit=limit, total=total, shown=shown))
    except KeyboardInterrupt:
        how = "; the same command goes on from there" if args.output != "-" else ""
        print(f"\nsplitfuse: interrupted with {_told(args.output, results)}{how}", file=sys.stderr)
        raise
    finally:
        results.close()
    seconds = time.monotonic() - began
    made = f"{meter.read:,} prompt and {meter.made:,} answer tokens in {seconds:.1f} s"
    print(f"splitfuse: {_told(args.output, results)}; {made}", file=sys.stderr)
    if asks.ignored:
        print(f"splitfuse: fields without a meaning here: {', '.join(sorted(asks.ignored))}", file=sys.stderr)
    return 1 if results.failed else 0


def _open_input(path: str, output: str) -> BinaryIO:
    if path == "-":
        return open(sys.stdin.fileno(), "rb", closefd=False)
    if os.path.exists(path) and os.path.exists(output) and os.path.samefile(path, output):
        raise InvalidArgument(f"{path} is input and output at once")
    return open(path, "rb")


def _requests(file: BinaryIO) -> int:
    total = sum(1 for line in file if line.strip())
    file.seek(0)
    return total


def _told(output: str, results: Results) -> str:
    """How far it has come."""
    where = output if output != "-" else "the output"
    kept = f", {results.kept} of them from before" if results.kept else ""
    return f"{results.count} results in {where}{kept}, {results.failed} of them errors"
