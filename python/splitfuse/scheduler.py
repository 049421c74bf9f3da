"""The layer over the engine: takes requests from any thread, orders and admits them, streams and ends them.

One thread owns the engine, as `_ownership` says. Everything another thread may do (`submit`, `cancel`,
`Request.wait`) goes through one lock, and never touches the engine.
"""

from __future__ import annotations

import itertools
import logging
import time
from collections import Counter, deque
from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING, Any

import numpy as np

from . import _core
from ._answer import Answer, TokenTexts, conclude
from ._beginnings import Beginnings
from ._core import InvalidArgument, StateError
from ._intake import Intake
from ._intake import QueueFull as QueueFull
from ._ownership import Owned
from .request import Delta, NotFinite, Request, SamplingParams, check_request

if TYPE_CHECKING:
    from .tokenizer import Tokenizer

_log = logging.getLogger("splitfuse")
_FINISH = (None, "stop", "length", "error")  # StepOutput.finish
_PAUSE = 0.001  # seconds between steps that did nothing: a policy that holds work back must not burn a core


class Scheduler(Owned):
    """Runs requests on an engine, with SplitFuse or, where `plan` is overridden, another policy.

    `max_queued`: requests that may wait for admission, `max_queued_tokens`: tokens of their prompts; None: any
    number. As many sequences as one forward may hold are admitted to the engine, by (priority, arrival); one more
    urgent than every admitted one is let in beyond that, as the engine serves by priority.

    Both hooks run on the engine's thread: `on_step` at the end of every step, after the callbacks of its
    requests, with what the engine did (None: nothing); `on_failure` after a step that failed, when the
    requests it ran have ended, and when anything else failed on a thread of the scheduler's own.
    """

    def __init__(
        self,
        engine: _core.Engine,
        tokenizer: Tokenizer | None = None,
        *,
        max_queued: int | None = None,
        max_queued_tokens: int | None = None,
        on_step: Callable[[_core.StepOutput | None], None] | None = None,
        on_failure: Callable[[Exception], None] | None = None,
    ) -> None:
        super().__init__()
        self.engine = engine
        self.tokenizer = tokenizer
        self._on_step = on_step
        self._on_failure = on_failure
        capacity = engine.query()
        self._max_model_len: int = capacity.max_model_len
        self._room: int = capacity.max_sequences
        self._vocab_size = engine.model_config.vocab_size
        self._texts = TokenTexts(tokenizer)
        self._overridden = type(self).plan is not Scheduler.plan
        self._numbers = itertools.count()

        self._cancels: deque[Request] = deque()
        # Guarded by the lock.
        self._intake = Intake(max_queued, max_queued_tokens)
        self._undone = 0  # requests that have not ended
        # The owner's.
        self._live: dict[int, tuple[Request, Answer]] = {}  # by the engine's id
        self._quiet: dict[int, Callable[[int], None]] = {}  # those of _live whose tokens are only kept
        self._beginnings = Beginnings(engine)  # of _live
        self._priorities: Counter[int] = Counter()  # of _live

    # ---------------------------------------------------------------- any thread

    def check(
        self, prompt_token_ids: Sequence[int] | np.ndarray[Any, Any], params: SamplingParams | None = None
    ) -> list[int]:
        """The prompt as a list of ids, or InvalidArgument if this request could not be served."""
        params = params if params is not None else SamplingParams()
        ids = check_request(prompt_token_ids, params, self._vocab_size, self._max_model_len)
        if params.stop and self.tokenizer is None:
            raise InvalidArgument("stop strings need a tokenizer, and there is none; use stop_token_ids")
        return ids

    def submit(
        self,
        prompt_token_ids: Sequence[int] | np.ndarray[Any, Any],
        params: SamplingParams | None = None,
        *,
        priority: int = 0,
        cache_salt: str = "",
        on_output: Callable[[Request, Delta], None] | None = None,
        on_done: Callable[[Request], None] | None = None,
        request_id: str | None = None,
        prompt: str | None = None,
        keep_logprobs: bool = True,
    ) -> Request:
        """Queues a request; lower `priority` is served first. Raises InvalidArgument if it could not be
        served, QueueFull if too many wait, StateError while stopping or closed.

        Both callbacks run on the engine's thread, so they should be short. `on_output` gets every token as it
        comes; if it raises, its own request ends with that error. `on_done` is called once, whatever the end.
        Requests of different `cache_salt` never share cached prefixes. `request_id` and `prompt` are carried
        to the result. `keep_logprobs`: those of the answers too; without, only deltas have them.
        """
        params = params if params is not None else SamplingParams()
        ids = self.check(prompt_token_ids, params)
        number = next(self._numbers)
        name = request_id if request_id is not None else f"request-{number}"
        request = Request(self, name, prompt, ids, params, priority, cache_salt, on_output, on_done)
        request._keeps_logprobs = keep_logprobs
        with self._lock:
            if self._closed or self._stopping is not None:
                raise StateError(f"the scheduler is {'closed' if self._closed else 'stopping'}")
            self._intake.add(request, number)
            self._undone += 1
            self._lock.notify_all()
        return request

    def cancel(self, request: Request) -> None:
        """As `Request.cancel`."""
        if not request.done:
            self._cancels.append(request)

    @property
    def has_work(self) -> bool:
        """True while a request is not done."""
        return self._undone > 0

    @property
    def queued(self) -> int:
        """Requests that wait for admission to the engine."""
        return self._intake.waiting

    # ---------------------------------------------------------------- the engine's thread

    def plan(self, views: list[_core.SeqView], limits: _core.Limits) -> _core.StepPlan | None:
        """What the next forward runs. Override it for another policy; None, the default, is native SplitFuse.
        `views` are in serving order. If it raises, or the plan can't be served, every live request ends with
        the error.
        """
        return None

    def request_of(self, sequence: int) -> Request | None:
        """The request behind `SeqView.id`, for a `plan` that looks at more than counts."""
        return self._live.get(sequence, (None,))[0]

    def step(self) -> _core.StepOutput | None:
        """Takes in what was submitted and cancelled, runs the engine once and hands out what came of it. None
        if there was nothing to run. An exception of the engine ends the requests it was running with that
        error, and no others. Raises StateError while another thread owns the engine."""
        with self._owned():
            return self._turn()

    def run_until_idle(self) -> None:
        """Steps until every request is done."""
        while self.has_work:
            self.step()

    def _turn(self) -> _core.StepOutput | None:
        output = self._step()
        if self._on_step is not None:
            self._on_step(output)
        return output

    def _step(self) -> _core.StepOutput | None:
        while self._cancels:
            self._end(self._cancels.popleft(), "abort")
        self._admit()
        if not self._live:
            return None
        began = time.monotonic()
        try:
            output = self.engine.step(self.plan(*self.engine.view()) if self._overridden else None)
        except Exception as error:
            _log.error("a step failed, and with it %d sequences: %s", len(self._live), error)
            self._end_live("error", error)
            self._tell_failure(error)
            return None
        for request in filter(None, map(self.request_of, output.preempted)):
            request.preemptions += 1
        self._beginnings.note(output, began)
        self._dispatch(output)
        if output.decode_tokens + output.prefill_tokens == 0 and self._live:
            time.sleep(_PAUSE)
        return output

    def _admit(self) -> None:
        while True:
            with self._lock:
                first = self._intake.first_priority()
                if first is None or (len(self._live) >= self._room and first >= min(self._priorities)):
                    return
                request = self._intake.pop()
            try:
                self._begin(request, 1)
            except Exception as error:
                self._end(request, "error", error)

    def _begin(self, request: Request, answers: int) -> None:
        """Puts the next `answers` sequences of a request. Those beyond the first follow when it has its first
        token: then they find the prompt in the prefix cache."""
        params, streamed = request.params, request._on_output is not None
        longest = params.max_tokens or self._max_model_len - len(request.prompt_token_ids)
        for index in range(request._begun, request._begun + answers):
            keep = request._keeps_logprobs
            answer = Answer(index, params, request.prompt_token_ids, self.tokenizer, streamed, keep)
            request._answers.append(answer)
            request._begun += 1
            native = params.to_native(max_tokens=longest, seed=request.seed, sample_index=index)
            sequence = next(self._numbers)
            self.engine.put(sequence, request.prompt_token_ids, native, request.priority, request.cache_salt)
            answer.sequence = sequence
            self._live[sequence] = request, answer
            self._beginnings.add(sequence, request)
            self._priorities[request.priority] += 1
            probed = params.logprobs is not None or params.prompt_logprobs is not None
            if not (streamed or params.stop or probed or (index == 0 and params.n > 1)):
                self._quiet[sequence] = answer.token_ids.append

    def _dispatch(self, output: _core.StepOutput) -> None:
        ids, tokens, quiet = output.ids.tolist(), output.tokens.tolist(), self._quiet
        if quiet:
            for keep, token in zip(map(quiet.get, ids), tokens, strict=True):
                if keep is not None:
                    keep(token)
        if len(quiet) < len(self._live):
            self._dispatch_prompt_logprobs(output)
            self._dispatch_loud(output, ids, tokens)
        for row in np.flatnonzero(output.finish).tolist():
            self._finish_row(ids[row], int(output.finish[row]))

    def _dispatch_prompt_logprobs(self, output: _core.StepOutput) -> None:
        for item in output.prompt:
            request = self.request_of(item.id)
            if request is None or request.prompt_logprobs is None:
                continue
            try:
                request.prompt_logprobs[item.position] = self._texts.entry(item)
            except Exception as error:
                self._end(request, "error", error)

    def _dispatch_loud(self, output: _core.StepOutput, ids: list[int], tokens: list[int]) -> None:
        """The rows that are streamed, looked through for stop strings, logged with probabilities, or followed
        by more answers to the same prompt."""
        sampled: list[_core.Sampled] | None = None
        finish, live, quiet = output.finish.tolist(), self._live, self._quiet
        for row, sequence in enumerate(ids):
            entry = live.get(sequence)
            if entry is None or sequence in quiet or finish[row] == 3:
                continue
            request, answer = entry
            try:
                logprobs, logprob = None, 0.0
                if request.params.logprobs is not None:
                    sampled = output.sampled if sampled is None else sampled
                    logprobs, logprob = self._texts.entry(sampled[row]), sampled[row].logprob
                delta = answer.add(tokens[row], _FINISH[finish[row]], logprobs, logprob)
                if request._begun < request.params.n:
                    self._begin(request, request.params.n - request._begun)
                if request._on_output is not None:
                    request._on_output(request, delta)
                if answer.finish_reason is not None:
                    self._finish_answer(request, answer)
            except Exception as error:
                self._end(request, "error", error)

    def _finish_row(self, sequence: int, finish: int) -> None:
        """Ends what the engine ended: the quiet rows, and those whose logits were not finite."""
        entry = self._live.get(sequence)
        if entry is None:
            return
        request, answer = entry
        if finish == 3:
            if sequence in self._quiet:
                answer.token_ids.pop()  # the -1
            error = NotFinite(f"{request.id}: the model's output is not finite, so no token can be chosen")
            self._end(request, "error", error)
            return
        answer.finish(_FINISH[finish] or "")
        self._finish_answer(request, answer)

    def _finish_answer(self, request: Request, answer: Answer) -> None:
        self._release(request, answer)
        if request._begun == request.params.n and all(a.finish_reason for a in request._answers):
            self._end(request, "stop")

    def _release(self, request: Request, answer: Answer) -> None:
        """Takes an answer out of the engine, if it is there. Its full blocks stay as prefix cache."""
        if answer.sequence is None:
            return
        sequence, answer.sequence = answer.sequence, None
        del self._live[sequence]
        self._quiet.pop(sequence, None)
        self._beginnings.drop(sequence)
        self._priorities -= Counter([request.priority])  # keeps no zeros
        try:
            self.engine.flush(sequence)
        except Exception as error:  # a broken or closed engine: the request must end all the same
            _log.debug("flush of sequence %d: %s", sequence, error)

    def _end(self, request: Request, reason: str, error: Exception | None = None) -> None:
        """Ends a request, once: the answers that are not finished get `reason`."""
        if request.done:
            return
        with self._lock:
            self._intake.drop(request)
            self._undone -= 1
        streamed = request._on_output is not None
        for index in range(len(request._answers), request.params.n):
            request._answers.append(Answer(index, request.params, request.prompt_token_ids, None, streamed))
        for answer in request._answers:
            if answer.finish_reason is None:
                answer.finish(reason)
            self._release(request, answer)
        conclude(request, error)

    def _end_live(self, reason: str, error: Exception | None = None) -> None:
        for request in [request for request, _ in self._live.values()]:
            self._end(request, reason, error)

    def _end_all(self, reason: str, error: Exception | None = None) -> None:
        with self._lock:
            queued = self._intake.everyone()
        self._end_live(reason, error)
        for request in queued:
            self._end(request, reason, error)

    def _tell_failure(self, error: Exception) -> None:
        if self._on_failure is not None:
            self._on_failure(error)

    def _forget_cancels(self) -> None:
        self._cancels.clear()
