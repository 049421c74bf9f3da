"""Prefill and decode of one model beside transformers, in turns, in one process.

    python bench/against_transformers.py [MODEL_DIR] [--prompt 512] [--batch 1 8] [--steps 32] [--repeat 5]

MODEL_DIR is a Hugging Face directory that both can read. Needs the `test` extra. Every figure is the median
of the repeats, in bfloat16, with the same random token ids for both; a ratio above 1 is in our favour.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from functools import partial

import numpy as np
import torch
from rich.progress import track
from transformers import AutoModelForCausalLM

from splitfuse import LLM, SamplingParams, _core


def seconds(run: Callable[[], object]) -> float:
    begin = time.perf_counter()
    run()
    return time.perf_counter() - begin


def ours(llm: LLM, prompts: list[list[int]], steps: int) -> None:
    llm.generate(prompts, SamplingParams(max_tokens=steps, temperature=0.0, ignore_eos=True), progress=False)


def theirs(model: torch.nn.Module, prompts: list[list[int]], steps: int) -> None:
    with torch.inference_mode():
        model.generate(  # type: ignore[operator]
            torch.tensor(prompts),
            max_new_tokens=steps,
            min_new_tokens=steps,
            do_sample=False,
            pad_token_id=0,
        )


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("model")
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--context", type=int, default=256)
    parser.add_argument("--steps", type=int, default=32)
    parser.add_argument("--repeat", type=int, default=5)
    args = parser.parse_args()

    threads = _core.usable_cores()
    torch.set_num_threads(threads)
    model = AutoModelForCausalLM.from_pretrained(args.model, dtype=torch.bfloat16).eval()
    random = np.random.default_rng(0)
    rows = []
    with LLM(args.model, threads=threads, prefix_caching=False) as llm:
        vocab = llm.model_config.vocab_size
        cases = [("prefill", 1, args.prompt, 1)] + [
            ("decode", b, args.context, args.steps) for b in args.batch
        ]
        for kind, batch, length, steps in cases:
            prompts = random.integers(0, vocab, (batch, length)).tolist()
            contenders = {
                "splitfuse": partial(ours, llm, prompts),
                "transformers": partial(theirs, model, prompts),
            }
            times: dict[str, list[float]] = {name: [] for name in contenders}
            for _ in track(range(args.repeat), f"{kind} {batch}", transient=True):
                for name, run in contenders.items():
                    prefill = seconds(partial(run, 1))
                    whole = seconds(partial(run, 1 + steps)) if kind == "decode" else 0.0
                    times[name].append(whole - prefill if kind == "decode" else prefill)
            tokens = length if kind == "prefill" else batch * steps
            rate = {name: tokens / float(np.median(each)) for name, each in times.items()}
            rows.append(
                {
                    "case": f"{kind}, batch {batch}",
                    "unit": "tokens/s",
                    **rate,
                    "ratio": rate["splitfuse"] / rate["transformers"],
                }
            )
            print(json.dumps(rows[-1]), flush=True)


if __name__ == "__main__":
    main()
