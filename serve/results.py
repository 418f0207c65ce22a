"""Takes the result of a step in: tokens, ends, final pages, slots that come free."""

import numpy as np

from serve.plan import StepLogprobs, StepPlan, StepResult, TokenEvent, TokenLogprob
from serve.request import FinishReason, Request, Status
from serve.residents import Residents
from serve.scheduler_config import SchedulerConfig


def token_logprobs(found: StepLogprobs, best: int) -> list[TokenLogprob]:
    """The tokens of one row of a result, or of a chunk, each with its `best` alternatives."""
    chosen = found.chosen.tolist()
    ids = found.top_ids[:, :best].tolist()
    values = found.top[:, :best].tolist()
    return [
        TokenLogprob(own, list(zip(i, v, strict=True)))
        for own, i, v in zip(chosen, ids, values, strict=True)
    ]


class Results:
    """Brings `residents` up to date with what a step did.

    Args:
        config: sizes and policy.
        residents: the requests.
        eos_ids: ids that end a request unless it ignores them.
    """

    def __init__(self, config: SchedulerConfig, residents: Residents, eos_ids: tuple[int, ...]):
        self._config = config
        self._residents = residents
        self._table = residents.table
        self._eos_ids = frozenset(eos_ids)
        self._steady: list[Request] | None = None  # rows of the last result

    def apply(self, plan: StepPlan, result: StepResult, now: float) -> list[TokenEvent]:
        """Events of the rows that brought tokens; see `Scheduler.apply`."""
        residents, table = self._residents, self._table
        self._keep_prompt_logprobs(result)
        events: list[TokenEvent] = []
        for chunk in plan.chunks:
            request = chunk.request
            table.holds[request.slot] -= 1
            if request.status is not Status.FINISHED:
                table.seal(request.slot, chunk.start + chunk.length)
                if chunk.last and not request.remaining:
                    scores = self._prompt_logprobs(request)
                    end = TokenEvent(request, [], FinishReason.LENGTH, prompt_logprobs=scores)
                    events.append(end)
                    residents.end(residents.entries[request.id])
        if plan.requests:
            due = self._count(plan, result)
            ended = self._emit(plan, result, now, events)
            for row in due:
                if plan.requests[row].status is not Status.FINISHED:
                    slot = int(plan.slots[row])
                    table.seal(slot, int(table.length[slot]))
            for at in ended:
                event = events[at]
                request = event.request
                residents.end(residents.entries[request.id])
                residents.count_output(request)
        residents.collect()
        return events

    def _keep_prompt_logprobs(self, result: StepResult) -> None:
        """Takes in what chunks say about their prompts. A chunk that runs again, after its request
        gave way, takes the place of what was known from its first row on.
        """
        for chunk, found in result.prompt_logprobs:
            request, best = chunk.request, chunk.request.sampling.prompt_logprobs
            assert best is not None
            if request.status is not Status.FINISHED:
                known = self._residents.entries[request.id].prompt_logprobs
                known[chunk.start :] = token_logprobs(found, best)

    def _prompt_logprobs(self, request: Request) -> list[TokenLogprob] | None:
        """Of a request whose prompt rows have all run; None if it does not want them."""
        if request.sampling.prompt_logprobs is None:
            return None
        known = self._residents.entries[request.id].prompt_logprobs
        assert len(known) == request.prompt_len - 1, f"{request} has {len(known)} scores"
        return known

    def _count(self, plan: StepPlan, result: StepResult) -> list[int]:
        """Counts the rows' tokens; returns the rows that have a page to publish."""
        table, slots, cached = self._table, plan.slots, result.count
        if self._config.lookahead:
            # A row that ends does not run the modules over its last tokens.
            cached = np.where(result.finished, 0, cached)
        return table.applied(slots, cached, result)

    def _emit(
        self, plan: StepPlan, result: StepResult, now: float, events: list[TokenEvent]
    ) -> list[int]:
        """Appends the rows' tokens and their events; returns which events are ends."""
        ended: list[int] = []
        logprobs, over, new = result.logprobs, Status.FINISHED, tuple.__new__
        if self._is_steady(plan, result):
            every = result.tokens.tolist()
            counts = result.count.tolist()
            for request, tokens, count in zip(plan.requests, every, counts, strict=True):
                del tokens[count:]
                request.tokens += tokens
                request.last_token = now
            # What TokenEvent(request, tokens) does, in half the time.
            rows = zip(plan.requests, every, strict=True)
            events += [new(TokenEvent, (r, t, None, None, None, "", None)) for r, t in rows]
            return ended
        columns = (plan.requests, result.tokens.tolist(), result.count.tolist())
        rows = zip(*columns, result.finished.tolist(), strict=True)
        for row, (request, tokens, count, finished) in enumerate(rows):
            if not count or request.status is over:
                continue
            del tokens[count:]
            request.tokens += tokens
            request.last_token = now
            if request.first_token is None:
                request.first_token = now
            extra = scores = None
            if logprobs is not None and request.sampling.logprobs is not None:
                own = StepLogprobs(*(part[row, :count] for part in logprobs))
                extra = token_logprobs(own, request.sampling.logprobs)
            if request.emitted == count:
                scores = self._prompt_logprobs(request)
            if finished:
                ended.append(len(events))
                events.append(self._last_event(request, tokens, extra, scores))
                continue
            if request.prefill_only:
                self._residents.park(self._residents.entries[request.id], Status.HELD)
            events.append(new(TokenEvent, (request, tokens, None, extra, None, "", scores)))
        self._steady = plan.requests
        return ended

    def _is_steady(self, plan: StepPlan, result: StepResult) -> bool:
        """Whether all rows brought tokens before and just go on: most steps of a busy engine. A row
        that ended, was parked or gave way since would have made a new list of the decoding ones.
        """
        same = plan.requests is self._steady and plan.requests is self._residents.rows().requests
        return same and result.logprobs is None and not result.finished.any()

    def _last_event(
        self,
        request: Request,
        tokens: list[int],
        logprobs: list[TokenLogprob] | None,
        scores: list[TokenLogprob] | None,
    ) -> TokenEvent:
        last, stop = tokens[-1], request.stop
        stopped = last in stop.stop_token_ids or (last in self._eos_ids and not stop.ignore_eos)
        reason = FinishReason.STOP if stopped else FinishReason.LENGTH
        stop_token = last if stopped else None
        return TokenEvent(request, tokens, reason, logprobs, stop_token, "", scores)
