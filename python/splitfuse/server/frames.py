"""Answers as they are made, written as server-sent events with as little work a token as can be.

With 256 streams every step of the engine makes 256 frames, on the cores that also run the model. So a frame
is three pieces of text, of which two are constant.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from json.encoder import encode_basestring_ascii as _quote
from typing import TYPE_CHECKING, Any, ClassVar

from ..request import Delta, Request
from .reply import dumps, usage

if TYPE_CHECKING:
    from .reply import Reply

DONE = "data: [DONE]\n\n"


def event(value: Mapping[str, Any]) -> str:
    return f"data: {dumps(value)}\n\n"


class Frames:
    """Writes what comes of one prompt: for each answer what `begin` says, and a frame a delta, the last one
    with finish_reason and stop_reason."""

    opening: ClassVar[str]
    """What stands before the text in a choice; `closing`, after it."""
    closing: ClassVar[str]

    def __init__(self, reply: Reply, number: int, request: Request) -> None:
        answers = reply.params.n
        self._reply = reply
        self._request = request
        head = event(reply.envelope(reply.stream_kind))[: -len("}\n\n")]
        self._openings = [
            f'{head},"choices":[{{"index":{number * answers + i},{self.opening}' for i in range(answers)
        ]
        self._plain_end = self.closing + ',"finish_reason":null}]}\n\n'
        # An answer's first frame is never plain, nor any that has more to show than text.
        self._plain_later = not (reply.usage_always or reply.shows_ids or reply.params.logprobs is not None)
        self._plain = [False] * answers
        self._begun = [False] * answers
        self._finished = [False] * answers
        self._made = [0] * answers

    def write(self, deltas: Sequence[Delta]) -> str:
        parts: list[str] = []
        for delta in deltas:
            if self._plain[delta.index] and delta.finish_reason is None:
                parts += (self._openings[delta.index], _quote(delta.text), self._plain_end)
            else:
                parts.append(self._frame(delta))
        return "".join(parts)

    def end(self) -> str:
        """The last frames of answers that were cancelled, and so have had no last delta."""
        output = self._request.output
        return "".join(
            self._frame(
                Delta(answer.index, answer.undelivered, [], None, answer.finish_reason, answer.stop_reason)
            )
            for answer in (output.outputs if output is not None else ())
            if not self._finished[answer.index]
        )

    def begin(self, index: int) -> str:
        """The frames before an answer's first text."""
        return ""

    def text(self, delta: Delta, first: bool) -> str:
        return delta.text

    def more(self, delta: Delta, first: bool) -> dict[str, Any]:
        """What a choice shows beside the text."""
        return {}

    def _frame(self, delta: Delta) -> str:
        index, first = delta.index, not self._begun[delta.index]
        begin = self.begin(index) if first else ""
        self._begun[index] = True
        self._plain[index] = self._plain_later
        self._made[index] += len(self._reply.shown_tokens(delta.token_ids))
        more: dict[str, Any] = {"finish_reason": delta.finish_reason}
        if delta.finish_reason is not None:
            self._finished[index] = True
            more["stop_reason"] = delta.stop_reason
        more |= self.more(delta, first)
        text = _quote(self.text(delta, first))
        end = dumps(self.with_usage({}, index))[1:]
        comma = "," if len(end) > 1 else ""
        return f"{begin}{self._openings[index]}{text}{self.closing},{dumps(more)[1:-1]}}}]{comma}{end}\n\n"

    def with_usage(self, frame: dict[str, Any], index: int) -> dict[str, Any]:
        """A frame with the usage so far, if that is wanted."""
        if self._reply.usage_always:
            request = self._request
            frame["usage"] = usage(len(request.prompt_token_ids), self._made[index], request.cached_tokens)
        return frame
