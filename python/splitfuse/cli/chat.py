"""`splitfuse chat`: one answer, or a conversation."""

from __future__ import annotations

import argparse
import contextlib
import json
import sys
from typing import TYPE_CHECKING, Any

from .._core import InvalidArgument
from .generate import as_json
from .options import (
    add_engine,
    add_loading,
    add_model,
    add_policy,
    add_sampling,
    load_llm,
    sampling_params,
)

if TYPE_CHECKING:
    from ..llm import LLM
    from ..request import SamplingParams

_EXAMPLES = """\
examples:
  splitfuse chat demo "What is the capital of France?"
  splitfuse chat demo --system "Answer in one sentence."      (a conversation)

In a conversation Ctrl-C stops the answer and Ctrl-D leaves. What was said before is not computed again: its
keys and values are found in the prefix cache."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "chat",
        help="talk to a model, with its chat template",
        description="Answers MESSAGE with the model's chat template; without one, holds a conversation.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "message", metavar="MESSAGE", nargs="?", help='what to say; "-" reads it from standard input'
    )
    parser.add_argument("--system", metavar="TEXT", help="instructions before the conversation")
    parser.add_argument(
        "--stream",
        action=argparse.BooleanOptionalAction,
        help="print the answer as it comes (default: on a terminal)",
    )
    parser.add_argument("--json", action="store_true", help="with MESSAGE: print one JSON object")
    add_sampling(parser, None)
    add_policy(parser)
    add_engine(parser)
    add_loading(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    if args.json and (args.message is None or args.stream):
        raise InvalidArgument("--json prints one answer whole: it needs a MESSAGE and goes without --stream")
    stream = sys.stdout.isatty() and not args.json if args.stream is None else args.stream
    messages = [{"role": "system", "content": args.system}] if args.system is not None else []
    with load_llm(args) as llm:
        params = sampling_params(llm, args)
        if args.message is None:
            return _converse(llm, params, messages)
        text = sys.stdin.read() if args.message == "-" else args.message
        messages.append({"role": "user", "content": text})
        if args.json:
            output = llm.chat(messages, params)[0]
            print(json.dumps({"model": llm.name, **as_json(output)}, ensure_ascii=False))
        elif stream:
            _say(llm, params, messages, [])
        else:
            print(llm.chat(messages, params)[0].text)
    return 0


def _converse(llm: LLM, params: SamplingParams, messages: list[dict[str, str]]) -> int:
    interactive = sys.stdin.isatty()
    if interactive:
        _edit_lines()
        print(f"{llm.name}: Ctrl-C stops an answer, Ctrl-D leaves.", file=sys.stderr)
    while True:
        try:
            line = input("> " if interactive else "")
        except EOFError:
            if interactive:
                print()
            return 0
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
            continue
        if not line.strip():
            continue
        messages.append({"role": "user", "content": line})
        pieces: list[str] = []
        try:
            _say(llm, params, messages, pieces)
        except InvalidArgument as error:  # the conversation has outgrown the context
            if not interactive:
                raise
            messages.pop()
            print(f"splitfuse: {error}", file=sys.stderr)
            continue
        except KeyboardInterrupt:
            if not interactive:
                raise
            print()
        messages.append({"role": "assistant", "content": "".join(pieces)})


def _say(llm: LLM, params: SamplingParams, messages: list[dict[str, str]], pieces: list[str]) -> None:
    """Prints the answer as it comes, and adds it to `pieces`."""
    for piece in llm.stream(messages, params):
        pieces.append(piece)
        print(piece, end="", flush=True)
    print()


def _edit_lines() -> None:
    """Line editing and history for input(), where Python has them."""
    with contextlib.suppress(ImportError):
        import readline  # noqa: F401
