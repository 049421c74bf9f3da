"""The `splitfuse` command: one module a subcommand, imported when it runs."""

from __future__ import annotations

import argparse
import builtins
import os
import sys
from collections.abc import Sequence
from importlib import import_module
from typing import NoReturn

from .. import __version__
from .._core import Error

_COMMANDS = ("generate", "chat", "serve", "run-batch", "convert", "info", "bench")
_FAILED = 2
_INTERRUPTED = 130
_PIPE_CLOSED = 141

_DESCRIPTION = """\
Run large language models with Dynamic SplitFuse.

MODEL is a Hugging Face directory or hub id, a .gguf file, what `splitfuse convert` wrote, or "demo",
a small model that is fetched and kept at first use."""

_EXAMPLES = """\
examples:
  splitfuse chat demo "What is the capital of France?" --temperature 0
  splitfuse generate demo "Once upon a time" --max-tokens 64 --temperature 0
  splitfuse info demo --measure
  splitfuse bench throughput demo

Every command explains itself: splitfuse COMMAND --help"""


class Parser(argparse.ArgumentParser):
    """Reports what is wrong in one line."""

    def error(self, message: str) -> NoReturn:
        self.exit(_FAILED, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def build_parser() -> Parser:
    parser = Parser(
        prog="splitfuse",
        description=_DESCRIPTION,
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("--version", action="version", version=f"splitfuse {__version__}")
    commands = parser.add_subparsers(dest="command", metavar="COMMAND", required=True)
    for name in _COMMANDS:
        import_module(f".{name.replace('-', '_')}", __name__).add_parser(commands)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Runs the command line and returns its exit code: 2 after an error, told in one line on stderr."""
    try:
        args = build_parser().parse_args(argv)
        code: int = args.run(args)
        sys.stdout.flush()
        return code
    except BrokenPipeError:
        # Whoever read the output has gone. What is still buffered must not raise again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return _PIPE_CLOSED
    except KeyboardInterrupt:
        print(file=sys.stderr)
        return _INTERRUPTED
    except (Error, OSError, ValueError, builtins.MemoryError) as error:
        print(f"splitfuse: error: {' '.join(str(error).split()) or type(error).__name__}", file=sys.stderr)
        return _FAILED
