"""`splitfuse info`: what a model is, what it would take here, how fast it could be."""

from __future__ import annotations

import argparse
import json
import os
from collections import Counter
from typing import Any

from .. import _core
from ..bench.limits import Costs, Roof, measure_roof
from ..engine_setup import engine_config
from .options import add_engine, add_lora, add_model, engine_options

_EXAMPLES = """\
examples:
  splitfuse info demo
  splitfuse info demo --measure --json
  splitfuse info ./model --dtype float32 --kv-memory 4GiB      (would it fit?)"""

_CONTEXT = 256


def add_parser(commands: Any) -> None:
    parser = commands.add_parser(
        "info",
        help="show a model, its memory plan, and the machine's limits",
        description="Shows what MODEL is, the memory it would take, and what this machine could do with it.\n"
        "Reads no weights.",
        epilog=_EXAMPLES,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add_model(parser)
    parser.add_argument(
        "--measure", action="store_true", help="measure the machine, and with it the ceilings of speed"
    )
    parser.add_argument("--json", action="store_true", help="print one JSON object")
    add_lora(parser)
    add_engine(parser)
    parser.set_defaults(run=run)


def run(args: argparse.Namespace) -> int:
    from ..loader import load

    loaded = load(args.model, lora=args.lora)
    config = engine_config(**engine_options(args))
    config.quantize = loaded.quantize_as(args.quantize)
    plan = _core.plan_memory(loaded.config, config)
    costs = Costs.of(loaded.config, config.dtype, config.quantize, config.kv_dtype)
    isas = _core.cpu_isas()
    isa = config.isa if config.isa != "auto" else os.environ.get("SPLITFUSE_CPU_ISA") or isas[-1]
    threads = config.threads or _core.usable_cores()
    roof = measure_roof(config.dtype, threads, config.isa, quantize=config.quantize) if args.measure else None
    facts = {
        "name": loaded.name,
        "path": str(loaded.path),
        "config": json.loads(loaded.config.to_json()),
        "parameters": _parameters(loaded.config),
        "memory": {name: getattr(plan, name) for name in _PLAN} | {"total": plan.total},
        "machine": {
            "isas": isas,
            "isa": isa,
            "threads": threads,
            "dtype": config.dtype,
            "kv_dtype": config.kv_dtype,
        },
        "kernels": {
            operation: {"isa": rung, "detail": detail}
            for operation, rung, detail in _core.chosen_kernels(config)
        },
        "costs": {
            "weight_bytes_per_forward": costs.weight_bytes,
            "flops_per_token": 2 * (costs.params_per_token + costs.head_params),
            "kv_bytes_per_token": costs.kv_bytes_per_token,
            "attention_flops_per_pair": costs.attention_flops_per_pair,
        },
        "ceilings": None if roof is None else _ceilings(costs, roof),
    }
    if args.json:
        print(json.dumps(facts))
    else:
        _print(facts, str(plan))
    return 0


_PLAN = ("weights", "kv_pool", "workspace", "host", "available", "blocks", "max_model_len", "token_budget")


def _parameters(config: _core.ModelConfig) -> int:
    total = 0
    for _, shape in _core.canonical_names(config):
        count = 1
        for extent in shape:
            count *= extent
        total += count
    return total


def _ceilings(costs: Costs, roof: Roof) -> dict[str, Any]:
    """Tokens a second that no engine on this machine can pass, at the measured roof."""
    prefill = {str(n): n / roof.seconds(costs.prefill(n)) for n in (512, 2048)}
    decode = {str(b): b / roof.seconds(costs.decode(b, _CONTEXT)) for b in (1, 8, 32)}
    return {
        "read_gbps": roof.read_gbps,
        "peak_gflops": roof.peak_gflops,
        "knee_tokens": costs.knee(roof),
        "prefill_tokens_per_s": prefill,
        f"decode_tokens_per_s_at_{_CONTEXT}": decode,
    }


def _text(value: Any) -> str:
    """A value of the configuration in a line: equal layers are counted, frequencies are given by their ends."""
    if isinstance(value, float):
        return f"{value:g}"
    if isinstance(value, dict):
        return ", ".join(f"{name} {_text(item)}" for name, item in value.items() if item != [])
    if isinstance(value, list) and value and isinstance(value[0], dict):
        kinds = Counter(_text(item) for item in value)
        return "; ".join(f"{count} x ({kind})" if count > 1 else kind for kind, count in kinds.items())
    if isinstance(value, list) and len(value) > 8:
        return f"{len(value)} from {_text(value[0])} to {_text(value[-1])}"
    return str(value)


def _print(facts: dict[str, Any], plan: str) -> None:
    config, machine, costs, ceilings = (facts[name] for name in ("config", "machine", "costs", "ceilings"))
    print(f"{facts['name']}  ({facts['path']})")
    print(f"  parameters   {facts['parameters']:,}")
    for name, value in config.items():
        if value != [] and not (name == "moe" and value["experts"] == 0):
            print(f"  {name:<20} {_text(value)}")
    print(plan.rstrip())
    print("machine")
    print(f"  instruction sets  {', '.join(machine['isas'])}; runs on {machine['isa']}")
    print(f"  threads           {machine['threads']}")
    print("kernels")
    for operation, choice in facts["kernels"].items():
        print(f"  {operation:<17} {choice['isa']:<12} {choice['detail']}")
    print(f"cost in {machine['dtype']}")
    print(f"  a forward reads   {costs['weight_bytes_per_forward'] / 2**20:.1f} MiB of weights")
    print(f"  a token takes     {costs['flops_per_token'] / 1e6:.1f} million operations, its context apart")
    kv = "" if machine["kv_dtype"] == "auto" else f" in {machine['kv_dtype']}"
    print(f"  a cached token    {costs['kv_bytes_per_token']:,} bytes{kv}")
    if ceilings is None:
        print("ceilings            --measure measures the machine and shows them")
        return
    print("ceilings, at the roof measured now")
    print(f"  memory read       {ceilings['read_gbps']:.1f} GB/s")
    print(f"  arithmetic        {ceilings['peak_gflops']:.0f} GFLOP/s")
    print(f"  the two meet at   {ceilings['knee_tokens']:.0f} tokens a forward")
    for tokens, speed in ceilings["prefill_tokens_per_s"].items():
        print(f"  prefill {tokens:>5}     {speed:,.0f} tokens/s")
    for batch, speed in ceilings[f"decode_tokens_per_s_at_{_CONTEXT}"].items():
        print(f"  decode, batch {batch:>2}  {speed:,.0f} tokens/s, context {_CONTEXT}")
