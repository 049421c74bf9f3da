"""SplitFuse with levelled forwards: FastGen's third insight."""

from __future__ import annotations

from .._core import Limits, SeqView, StepPlan, plan_splitfuse
from ._room import Policy, is_decode


class Even(Policy):
    """As SplitFuse, with as many forwards, but the prompts that wait are spread evenly over them, where
    SplitFuse fills all but the last. Throughput being concave in the tokens of a forward, equal ones are
    best (DeepSpeed-FastGen, 2023). Decodes are taken to go on; a prompt's last token that is left alone looks
    like one, and can cost a forward."""

    def choose(self, views: list[SeqView], limits: Limits) -> StepPlan:
        decodes = sum(map(is_decode, views))
        waiting = sum(view.known - view.computed for view in views) - decodes
        room = limits.max_tokens - decodes
        if waiting <= room or room < 1:
            return plan_splitfuse(views, limits)
        forwards = -(-waiting // room)
        level = Limits(
            max_tokens=decodes + -(-waiting // forwards),
            max_seqs=limits.max_seqs,
            free_blocks=limits.free_blocks,
            total_blocks=limits.total_blocks,
            block_size=limits.block_size,
        )
        return plan_splitfuse(views, level)
