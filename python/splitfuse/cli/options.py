"""Options that several commands share."""

from __future__ import annotations

import argparse
from typing import TYPE_CHECKING, Any

from ..policies import POLICIES
from ..request import SamplingParams

if TYPE_CHECKING:
    from ..llm import LLM

MODEL_HELP = 'Hugging Face directory or hub id, .gguf file, converted checkpoint, or "demo"'


def add_model(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("model", metavar="MODEL", help=MODEL_HELP)


def add_engine(parser: argparse.ArgumentParser, *, caches: bool = True) -> None:
    """The engine's options; `engine_options` collects them. `caches`: whether it may cache prefixes."""
    group = parser.add_argument_group("engine")
    group.add_argument(
        "--device", default="auto", choices=["auto", "cpu", "cuda"], help="where to run (auto: cpu)"
    )
    add_kernel(group)
    group.add_argument(
        "--pin-threads",
        action=argparse.BooleanOptionalAction,
        default=False,
        help="keep each thread but the caller's on a CPU of its own, of those this process may use",
    )
    group.add_argument(
        "--token-budget",
        default="auto",
        type=_auto_or_int,
        metavar="N",
        help="tokens of one forward (auto: measured)",
    )
    group.add_argument(
        "--max-sequences", default=256, type=int, metavar="N", help="sequences of one forward (default: 256)"
    )
    group.add_argument(
        "--max-model-len",
        type=int,
        metavar="N",
        help="longest sequence, prompt and answer (default: what fits)",
    )
    group.add_argument(
        "--kv-memory",
        default="auto",
        metavar="SIZE",
        help='KV cache, bytes or "512MiB" (auto: 1 GiB or one longest sequence)',
    )
    add_kv_dtype(group)
    parser.set_defaults(prefix_caching=caches)
    if caches:
        group.add_argument(
            "--prefix-caching",
            action=argparse.BooleanOptionalAction,
            help="compute what prompts that begin alike share only once (default: yes)",
        )


def add_policy(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--policy",
        default="splitfuse",
        choices=POLICIES,
        help="which tokens run in a forward (default: splitfuse)",
    )


def add_kernel(parser: argparse._ActionsContainer) -> None:
    """What decides which kernels run: dtype, threads, instruction set."""
    parser.add_argument(
        "--dtype",
        default="auto",
        choices=["auto", "bfloat16", "float32"],
        help="number format (auto: bfloat16)",
    )
    add_quantize(parser, "hold the matrices in so many bits")
    parser.add_argument(
        "--threads", type=int, metavar="N", help="threads (default: the cores this process may use)"
    )
    parser.add_argument(
        "--isa",
        default="auto",
        metavar="NAME",
        help="instruction set, as `splitfuse info` lists them (auto: the best)",
    )


def add_quantize(parser: argparse._ActionsContainer, what: str) -> None:
    parser.add_argument(
        "--quantize",
        choices=["none", "auto", "int8", "int4"],
        help=f"{what}; auto: as a .gguf file has them (default: none, as --dtype; a converted checkpoint: as it is)",
    )


def add_kv_dtype(parser: argparse._ActionsContainer) -> None:
    parser.add_argument(
        "--kv-dtype",
        default="auto",
        choices=["auto", "int8"],
        help="number format of the KV cache (auto: as --dtype)",
    )


def engine_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `engine_config`."""
    names = (
        "device",
        "dtype",
        "quantize",
        "threads",
        "pin_threads",
        "isa",
        "token_budget",
        "max_sequences",
        "max_model_len",
        "kv_memory",
        "kv_dtype",
    )
    return {name: getattr(args, name) for name in (*names, "prefix_caching")}


def add_loading(parser: argparse.ArgumentParser) -> None:
    """How a model is loaded; `loading_options` collects these and the engine's."""
    parser.add_argument(
        "-v", "--verbose", action="store_true", help="print the memory plan and what runs, on stderr"
    )
    parser.add_argument(
        "--quantize-cache",
        action=argparse.BooleanOptionalAction,
        default=True,
        help="keep integers that --quantize had to fit for the next start (default: yes)",
    )
    add_lora(parser)


def add_lora(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "--lora", metavar="PATH", help="merge the PEFT adapter in this directory into the model"
    )


def loading_options(args: argparse.Namespace) -> dict[str, Any]:
    """The keyword arguments of `load_engine`; those of `LLM` but its policy."""
    loading = {name: getattr(args, name) for name in ("verbose", "quantize_cache", "lora")}
    return {**engine_options(args), **loading}


def load_llm(args: argparse.Namespace) -> LLM:
    from ..llm import LLM

    return LLM(args.model, policy=args.policy, **loading_options(args))


_SAMPLING: dict[str, dict[str, Any]] = {
    "temperature": {
        "type": float,
        "metavar": "T",
        "help": "0 is greedy (default: the model's advice, else 1)",
    },
    "top_p": {
        "type": float,
        "metavar": "P",
        "help": "keep the likeliest tokens that reach this probability, (0, 1]",
    },
    "top_k": {"type": int, "metavar": "K", "help": "keep the K likeliest tokens; 0: all"},
    "min_p": {"type": float, "metavar": "P", "help": "drop tokens below this share of the likeliest, [0, 1]"},
    "seed": {"type": int, "metavar": "N", "help": "same seed, same answer (default: a fresh one)"},
    "min_tokens": {"type": int, "metavar": "N", "help": "no end before this many tokens"},
    "repetition_penalty": {
        "type": float,
        "metavar": "X",
        "help": "above 1: less repetition of prompt and answer",
    },
    "presence_penalty": {
        "type": float,
        "metavar": "X",
        "help": "against tokens the answer has already, [-2, 2]",
    },
    "frequency_penalty": {"type": float, "metavar": "X", "help": "the same for each time, [-2, 2]"},
}


def add_sampling(parser: argparse.ArgumentParser, max_tokens: int | None) -> None:
    """The sampling options; `sampling_params` collects them."""
    group = parser.add_argument_group("sampling")
    limit = "what the context allows" if max_tokens is None else str(max_tokens)
    group.add_argument(
        "--max-tokens",
        type=int,
        default=max_tokens,
        metavar="N",
        help=f"longest answer in tokens (default: {limit})",
    )
    for name, how in _SAMPLING.items():
        group.add_argument(f"--{name.replace('_', '-')}", dest=name, **how)
    group.add_argument(
        "--stop",
        action="append",
        default=[],
        metavar="TEXT",
        help="end the answer before this text; may be repeated",
    )
    group.add_argument("--ignore-eos", action="store_true", help="go on past the model's end of sequence")


def sampling_params(llm: LLM, args: argparse.Namespace, **more: Any) -> SamplingParams:
    """What was asked for, over what the model's makers advise."""
    given = {name: value for name in _SAMPLING if (value := getattr(args, name)) is not None}
    return llm.default_params(
        max_tokens=args.max_tokens, stop=args.stop, ignore_eos=args.ignore_eos, **given, **more
    )


def _auto_or_int(text: str) -> int | str:
    if text == "auto":
        return text
    try:
        return int(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f'must be "auto" or an integer, not {text!r}') from None
