"""What a result says of how it came about."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from .policies import Workload
from .sla import Sla


def workload_facts(workload: Workload) -> dict[str, Any]:
    return {"prompt": workload.prompt, "output": workload.output, "seed": workload.seed}


def sla_facts(slas: Sequence[Sla]) -> list[dict[str, Any]]:
    return [{"name": sla.name, "ttft_per_token": sla.ttft_per_token, "itl": sla.itl} for sla in slas]
