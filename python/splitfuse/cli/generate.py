"""`splitfuse generate`: continues a text."""

from __future__ import annotations

import argparse
import dataclasses
import json
import sys
from typing import Any

from .._core import InvalidArgument
from ..request import Completion, RequestOutput, TokenLogprobs
from .options import (
    add_engine,
    add_loading,
    add_model,
    add_policy,
    add_sampling,
    load_llm,
    sampling_params,
)

_EXAMPLES = """\
examples:
  splitfuse generate demo "The capital of France is" --max-tokens 8 --temperature 0
  splitfuse generate demo "A haiku about rain:" --n 3 --seed 7 --stop "\\n\\n"
  splitfuse generate demo - < prompt.txt
  splitfuse generate demo "2 + 2 =" --json --logprobs 3 --temperature 0 --max-tokens 4"""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "generate",
        help="continue a text",
        description="Continues PROMPT, taken as it is. `splitfuse chat` applies the chat template.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "prompt", metavar="PROMPT", help='the text to continue; "-" reads it from standard input'
    )
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the text as it comes (default: on a terminal)",
    )
    parser.add_argument(
        "--json", action="store_true", help="print one JSON object with texts, tokens and reasons"
    )
    add_sampling(parser, 128)
    parser.add_argument(
        "--n", type=int, default=1, metavar="N", help="answers to the same prompt (default: 1)"
    )
    parser.add_argument(
        "--logprobs",
        type=int,
        metavar="N",
        help="with --json: log-probabilities of each token and the N likeliest",
    )
    add_policy(parser)
    add_engine(parser)
    add_loading(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.stream and (args.json or args.n != 1):
        raise InvalidArgument("--stream prints one answer as text: it goes with neither --json nor --n")
    if args.logprobs is not None and not args.json:
        raise InvalidArgument("--logprobs needs --json")
    prompt = sys.stdin.read() if args.prompt == "-" else args.prompt
    stream = sys.stdout.isatty() and not args.json and args.n == 1 if args.stream is None else args.stream
    with load_llm(args) as llm:
        params = sampling_params(llm, args, n=args.n, logprobs=args.logprobs)
        if stream:
            for piece in llm.stream(prompt, params):
                print(piece, end="", flush=True)
            print()
            return 0
        output = llm.generate(prompt, params)[0]
        if args.json:
            print(json.dumps({"model": llm.name, **as_json(output)}, ensure_ascii=False))
            return 0
        for completion in output.outputs:
            if args.n > 1:
                print(f"--- {completion.index + 1} of {args.n}")
            print(completion.text)
    return 0


def as_json(output: RequestOutput) -> dict[str, Any]:
    """A result as plain data."""
    return {
        "prompt": output.prompt,
        "prompt_token_ids": output.prompt_token_ids,
        "outputs": [_completion(completion) for completion in output.outputs],
    }


def _completion(completion: Completion) -> dict[str, Any]:
    entry: dict[str, Any] = {
        "index": completion.index,
        "text": completion.text,
        "token_ids": completion.token_ids,
        "finish_reason": completion.finish_reason,
        "stop_reason": completion.stop_reason,
    }
    if completion.logprobs is not None:
        entry["logprobs"] = [_logprobs(position) for position in completion.logprobs]
        entry["cumulative_logprob"] = completion.cumulative_logprob
    return entry


def _logprobs(position: TokenLogprobs) -> list[dict[str, Any]]:
    return [dataclasses.asdict(logprob) for logprob in position.values()]
