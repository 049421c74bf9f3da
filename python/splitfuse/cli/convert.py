"""`splitfuse convert`: writes the canonical checkpoint."""

from __future__ import annotations

import argparse
import os
from typing import Any

from .._progress import byte_bar, on_terminal
from .options import add_lora, add_model, add_quantize

_EXAMPLES = """\
examples:
  splitfuse convert demo ./demo-bf16
  splitfuse convert ./model-q8.gguf ./model-f32 --dtype float32
  splitfuse convert ./model ./model-int4 --quantize int4

OUT then works wherever a MODEL does, and C++ opens it with splitfuse::open_checkpoint."""


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "convert",
        help="write a checkpoint that Python and C++ open directly",
        description=(
            "Writes MODEL into the new directory OUT: model.safetensors, with canonical names and the\n"
            "configuration inside, and the tokenizer and generation settings beside it."
        ),
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument("out", metavar="OUT", help="directory to write; it is made")
    parser.add_argument(
        "--dtype",
        choices=["bfloat16", "float16", "float32"],
        help="of what is not quantized (default: bfloat16; float32 beside integers)",
    )
    add_quantize(parser, "write the matrices in so many bits")
    add_lora(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..loader import load

    loaded = load(args.model, lora=args.lora)
    quantize = loaded.quantize_as(args.quantize)
    with byte_bar(f"Converting {loaded.name}", on_terminal()) as progress:
        loaded.save(args.out, args.dtype, progress, quantize)
    size = sum(entry.stat().st_size for entry in os.scandir(args.out) if entry.is_file())
    numbers = args.dtype or "bfloat16" if quantize == "dense" else quantize
    print(f"{args.out}: {loaded.name} in {numbers}, {size / 2**20:.1f} MiB")
    if loaded.kinds:
        print(loaded.matrices(quantize))
    return 0
