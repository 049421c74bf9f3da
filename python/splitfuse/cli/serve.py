"""`splitfuse serve`: a model behind OpenAI's API."""

from __future__ import annotations

import argparse
import dataclasses
from pathlib import Path
from typing import Any

from .._core import ConfigError
from .options import add_engine, add_loading, add_model, add_policy, loading_options

_EXAMPLES = """\
examples:
  splitfuse serve demo                                     then open http://127.0.0.1:8000/
  splitfuse serve demo --host 0.0.0.0 --api-key-file keys  a key a line
  splitfuse serve ./model --served-model-name chat --token-budget 256 --restart 3
  curl http://127.0.0.1:8000/v1/completions -H 'Content-Type: application/json' \\
    -d '{"prompt": "The capital of France is", "max_tokens": 8, "temperature": 0}'

SIGTERM ends it: what runs may finish within --drain-timeout, a second signal does not wait. Exit code: 0; 1 if the
engine failed and no restarts were left, or a step or loading did not end when told to; 2 if the model can't be
loaded or the address can't be had."""

_LIMITS = {
    "queued": ("--max-queued", "requests that may wait; one more is answered 429"),
    "queued_tokens": ("--max-queued-tokens", "prompt tokens that may wait, likewise"),
    "answers": ("--max-n", "answers to one prompt"),
    "prompts": ("--max-prompts", "prompts of one request"),
    "answer_logprobs": ("--max-answer-logprobs", "log-probabilities in one answer that is not streamed"),
    "body_bytes": ("--max-body-bytes", "bytes of a request"),
    "open_bodies": ("--max-open-bodies", "bytes of all open requests; more are answered 503"),
}


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "serve",
        help="serve a model over HTTP, with OpenAI's API",
        description="Serves MODEL over HTTP, with OpenAI's API: chat, completions, streaming, metrics.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    _add_server(parser)
    _add_security(parser)
    _add_life(parser)
    _add_limits(parser)
    add_policy(parser)
    add_engine(parser)
    add_loading(parser)
    parser.set_defaults(run=run)


def _add_server(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("server")
    group.add_argument("--host", default="127.0.0.1", help="address to listen on (default: 127.0.0.1)")
    group.add_argument("--port", type=int, default=8000, help="0: any free one, printed (default: 8000)")
    group.add_argument(
        "--served-model-name",
        action="extend",
        nargs="+",
        default=[],
        metavar="NAME",
        help="what requests may call the model, the first one shown (default: its own name)",
    )
    group.add_argument(
        "--ui",
        action=argparse.BooleanOptionalAction,
        help="the page at / (default: where only this machine can reach it)",
    )
    group.add_argument(
        "--chat-template", metavar="FILE", help="a Jinja chat template instead of the checkpoint's"
    )
    group.add_argument("--access-log", action="store_true", help="print a line a request")


def _add_security(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("security")
    group.add_argument(
        "--api-key", action="append", default=[], metavar="KEY", help="asked of clients; may be repeated"
    )
    group.add_argument("--api-key-file", metavar="FILE", help="more keys, one a line")
    group.add_argument(
        "--cors-origin",
        action="append",
        default=[],
        metavar="ORIGIN",
        help='pages that may call from a browser, such as https://example.org, or "*"; may be repeated',
    )
    group.add_argument(
        "--trust-request-chat-template",
        action="store_true",
        help="render chat templates that come with requests (in a sandbox)",
    )


def _add_life(parser: argparse.ArgumentParser) -> None:
    group = parser.add_argument_group("life")
    for name, default, text in (
        ("drain-timeout", 30.0, "that requests may take to finish after SIGTERM"),
        ("stall-timeout", 30.0, "after which a reader that takes nothing is cut off"),
        ("health-timeout", 60.0, "without a step, while work waits, after which /health fails"),
    ):
        group.add_argument(
            f"--{name}",
            type=float,
            default=default,
            metavar="S",
            help=f"seconds {text} (default: {default:g})",
        )
    group.add_argument(
        "--restart",
        type=int,
        default=0,
        metavar="N",
        help="times that a failed engine is built anew (default: 0)",
    )
    group.add_argument(
        "--stay-up",
        action="store_true",
        help="when it has failed for good, stay, with /health at 503, to be looked at (default: end with code 1)",
    )


def _add_limits(parser: argparse.ArgumentParser) -> None:
    from ..server.settings import Limits

    group = parser.add_argument_group("limits")
    for field, (option, text) in _LIMITS.items():
        default = getattr(Limits, field)
        group.add_argument(
            option, dest=field, type=int, default=default, metavar="N", help=f"{text} (default: {default})"
        )


def run(args: argparse.Namespace) -> int:
    from ..server.serve import serve
    from ..server.settings import Limits, Settings

    keys = [*args.api_key, *_lines(args.api_key_file)]
    settings = Settings(
        model=args.model,
        engine={**loading_options(args), "verbose": args.verbose or None},
        policy=args.policy,
        served_names=tuple(args.served_model_name),
        host=args.host,
        port=args.port,
        api_keys=tuple(keys),
        cors_origins=tuple(args.cors_origin),
        ui=args.ui,
        chat_template=_text(args.chat_template),
        trust_request_chat_template=args.trust_request_chat_template,
        drain_timeout=args.drain_timeout,
        stall_timeout=args.stall_timeout,
        health_timeout=args.health_timeout,
        restarts=args.restart,
        stay_up=args.stay_up,
        limits=dataclasses.replace(Limits(), **{field: getattr(args, field) for field in _LIMITS}),
    )
    return serve(settings, access_log=args.access_log)


def _text(file: str | None) -> str | None:
    return None if file is None else Path(file).read_text(encoding="utf-8")


def _lines(file: str | None) -> list[str]:
    if file is None:
        return []
    keys = [line.strip() for line in (_text(file) or "").splitlines() if line.strip()]
    if not keys:
        raise ConfigError(f"{file}: holds no API key")
    return keys
