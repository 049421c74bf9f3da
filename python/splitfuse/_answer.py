"""One answer in the making: its tokens, text and log-probabilities so far. Knows nothing of the engine."""

from __future__ import annotations

import logging
import time
from collections.abc import Sequence
from typing import TYPE_CHECKING

from .request import Completion, Delta, Logprob, Request, RequestOutput, SamplingParams, TokenLogprobs
from .text import ByteDetokenizer, StopChecker, WindowDetokenizer, detokenizer

if TYPE_CHECKING:
    from . import _core
    from .tokenizer import Tokenizer

_log = logging.getLogger("splitfuse")


class Answer:
    """Answer `index` of a request. `sequence` is its id in the engine while it has one."""

    __slots__ = (
        "_cumulative", "_detokenizer", "_logprobs", "_parts", "_prompt_ids", "_stopper", "_tokenizer",
        "finish_reason", "index", "params", "sequence", "stop_reason", "token_ids", "undelivered",
    )  # fmt: skip

    def __init__(
        self,
        index: int,
        params: SamplingParams,
        prompt_ids: Sequence[int],
        tokenizer: Tokenizer | None,
        streamed: bool,
        keep_logprobs: bool = True,
    ) -> None:
        """`streamed`: the text is wanted token by token, else it is made when it is first read."""
        self.index = index
        self.params = params
        self.sequence: int | None = None
        self.token_ids: list[int] = []
        self.finish_reason: str | None = None
        self.stop_reason: str | int | None = None
        self.undelivered = ""
        self._prompt_ids = prompt_ids
        self._tokenizer = tokenizer
        self._detokenizer: ByteDetokenizer | WindowDetokenizer | None = None
        self._stopper: StopChecker | None = None
        self._parts: list[str] = []
        self._logprobs: list[TokenLogprobs] | None = None
        if params.logprobs is not None and keep_logprobs:
            self._logprobs = []
        self._cumulative = 0.0
        if tokenizer is not None and (streamed or params.stop):
            self._detokenizer = detokenizer(tokenizer, prompt_ids, params.skip_special_tokens)
        if params.stop:
            self._stopper = StopChecker(params.stop, params.include_stop_str_in_output)

    def add(
        self, token: int, finish_reason: str | None, logprobs: TokenLogprobs | None, logprob: float
    ) -> Delta:
        """Takes the next token, the last one if `finish_reason` is set. Finding a stop string sets
        `finish_reason` to "stop"."""
        self.token_ids.append(token)
        if self._logprobs is not None and logprobs is not None:
            self._logprobs.append(logprobs)
            self._cumulative += logprob
        text = self._add_text(token, finish_reason)
        if self.finish_reason is None and finish_reason is not None:
            self.finish(finish_reason)
        if text:
            self._parts.append(text)
        kept = None if logprobs is None else [logprobs]
        return Delta(self.index, text, [token], kept, self.finish_reason, self.stop_reason)

    def finish(self, reason: str) -> None:
        """Ends the answer with the tokens it has."""
        self.finish_reason = reason
        if reason == "stop" and self.token_ids and self.token_ids[-1] in self.params.stop_token_ids:
            self.stop_reason = self.token_ids[-1]
        if reason == "abort" and self._detokenizer is not None:
            self.undelivered = self._held_back()
            self._parts.append(self.undelivered)

    def _add_text(self, token: int, finish_reason: str | None) -> str:
        if self._detokenizer is None:
            return ""
        ended = finish_reason is not None
        if not ended:
            piece = self._detokenizer.add(token)
        else:
            piece = "" if self._hides(finish_reason) else self._detokenizer.add(token)
            piece += self._detokenizer.finish()
        if self._stopper is None or len(self.token_ids) <= self.params.min_tokens:
            return piece
        text, stopped = self._stopper.feed(piece)
        if stopped is not None:
            self.finish_reason, self.stop_reason = "stop", stopped
        elif ended:
            text += self._stopper.flush()
        return text

    def _held_back(self) -> str:
        """What waited for the rest of a character or of a stop string, which will not come."""
        assert self._detokenizer is not None
        try:
            text = self._detokenizer.finish()
        except Exception:  # a tokenizer that fails must not keep a request from ending
            _log.exception("the end of an answer that was cancelled could not be decoded")
            text = ""
        return text if self._stopper is None else self._stopper.flush() + text

    def _hides(self, finish_reason: str | None) -> bool:
        """Whether the text of the last token is left out: it is an end of sequence or a stop token."""
        return finish_reason == "stop" and not self.params.include_stop_str_in_output

    def completion(self) -> Completion:
        reason = self.finish_reason or "abort"
        return Completion(
            index=self.index,
            token_ids=self.token_ids,
            finish_reason=reason,
            stop_reason=self.stop_reason,
            logprobs=self._logprobs,
            cumulative_logprob=None if self._logprobs is None else self._cumulative,
            undelivered=self.undelivered,
            _text=self._whole_text if self._detokenizer is None else "".join(self._parts),
        )

    def _whole_text(self) -> str:
        """The text of an answer that was not streamed, by the same steps."""
        if self._tokenizer is None:
            return ""
        shown = self.token_ids[:-1] if self._hides(self.finish_reason) else self.token_ids
        text = detokenizer(self._tokenizer, self._prompt_ids, self.params.skip_special_tokens)
        return "".join([*map(text.add, shown), text.finish()])


def conclude(request: Request, error: Exception | None) -> None:
    """Makes a request done whose answers have all been finished, and tells whoever waits."""
    request._output = RequestOutput(
        request_id=request.id,
        prompt=request.prompt,
        prompt_token_ids=request.prompt_token_ids,
        outputs=[answer.completion() for answer in request._answers],
        prompt_logprobs=request.prompt_logprobs,
        error=error,
    )
    request.times.ended = time.monotonic()
    request._event.set()
    if request._on_done is not None:
        try:
            request._on_done(request)
        except Exception:
            _log.exception("on_done of %s failed", request.id)


class TokenTexts:
    """What the engine says of a position, with the tokens' texts."""

    def __init__(self, tokenizer: Tokenizer | None) -> None:
        self._tokenizer = tokenizer

    def entry(self, sampled: _core.Sampled | _core.PromptLogprob) -> TokenLogprobs:
        """The chosen token first, then the most likely others."""
        chosen = sampled.token
        entry = {chosen: Logprob(chosen, sampled.logprob, sampled.rank, self._text(chosen))}
        for rank, (token, logprob) in enumerate(sampled.top, 1):
            if token not in entry:
                entry[token] = Logprob(token, logprob, rank, self._text(token))
        return entry

    def _text(self, token: int) -> str | None:
        return None if self._tokenizer is None else self._tokenizer.token_text(token)
