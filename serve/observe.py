"""From an engine's steps and snapshots, and from transfers that ended, to metrics."""

from collections.abc import Callable, Mapping
from typing import Any

import numpy as np

from dskjax.decode.rules import RuleOptions
from serve.attempts import TransferEnd
from serve.engine import Engine, Observer
from serve.engine_metrics import EngineMetrics, TransferMode
from serve.expert_balancer import Balance
from serve.plan import StepPlan, StepResult
from serve.rank_scheduler import RanksPlan
from serve.request import Request
from serve.transfer.transport import Mode, Ticket, Timeline


class EngineObserver(Observer):
    """Counts what one engine does.

    Args:
        metrics: of the engine.
        accept: rule of requests that name none.
        compiled: programs compiled since the warm-up, in this process.
        remaining: more requests that would fit into an engine; None if that is not known.
    """

    def __init__(
        self,
        metrics: EngineMetrics,
        accept: RuleOptions,
        *,
        compiled: Callable[[], int] | None = None,
        remaining: Callable[[Any], int | None] | None = None,
    ):
        self._metrics, self._accept = metrics, accept
        self._compiled, self._remaining = compiled, remaining
        self._requests: list[Request] = []
        self._groups: dict[str, np.ndarray | None] = {}
        self._drafts: dict[str, list[tuple[np.ndarray, np.ndarray]]] = {}
        self._seen = {"compiled": 0, "preemptions": 0, "hits": 0, "queries": 0}

    def stepped(self, plan: StepPlan, result: StepResult, host: float, step: float) -> None:
        """See `serve.engine.Observer`."""
        idle = plan.idle if isinstance(plan, RanksPlan) else 0
        self._metrics.step(seconds=step, host_seconds=host, dummy=idle)
        if not plan.drafts or not len(result.offered):
            return
        if plan.requests is not self._requests:  # the scheduler shares the list between plans
            self._requests, self._groups = plan.requests, self._by_rule(plan.requests)
        for name, rows in self._groups.items():
            offered, accepted = result.offered, result.accepted
            if rows is not None:
                offered, accepted = offered[rows], accepted[rows]
            self._drafts.setdefault(name, []).append((offered, accepted))

    def loaded(self, engine: Engine) -> None:
        """See `serve.engine.Observer`."""
        self._count_drafts()
        load, stats = engine.load(), engine.scheduler.stats()
        self._metrics.state(
            running=load.running,
            waiting=load.waiting,
            kv_usage=1 - load.free_pages / load.total_pages,
            remaining_slots=None if self._remaining is None else self._remaining(engine),
            mean_output_length=load.mean_output,
        )
        queries = self._new("queries", stats.queried_tokens)
        self._metrics.prefix(queries=queries, hits=self._new("hits", stats.hit_tokens))
        if preempted := self._new("preemptions", stats.preemptions):
            self._metrics.preempted(preempted)
        if self._compiled is not None and (new := self._new("compiled", self._compiled())):
            self._metrics.compiled(new)

    def balanced(self, balance: Balance) -> None:
        """See `serve.engine.Observer`."""
        self._metrics.balanced(before=balance.before, after=balance.after, moves=balance.moves)

    def _count_drafts(self) -> None:
        """The drafts of the steps since the last snapshot, at once: a step has no time for it."""
        drafts, self._drafts = self._drafts, {}
        for name, steps in drafts.items():
            offered, accepted = (np.concatenate(column) for column in zip(*steps, strict=True))
            self._metrics.drafts(name, offered=offered, accepted=accepted)

    def _by_rule(self, requests: list[Request]) -> dict[str, np.ndarray | None]:
        """Rows of each acceptance rule by its name; None where all have the same."""
        rules = [r.accept if isinstance(r.accept, RuleOptions) else self._accept for r in requests]
        names = np.array([rule.name for rule in rules], object)
        kinds = sorted({rule.name for rule in rules})
        if len(kinds) == 1:
            return {kinds[0]: None}
        return {name: np.flatnonzero(names == name) for name in kinds}

    def _new(self, name: str, total: int) -> int:
        new, self._seen[name] = total - self._seen[name], total
        return new


class TransferObserver:
    """Counts transfers at the engines that they went to; a `serve.attempts.OnTransfer`.

    Those that nobody wanted any more count neither as successes nor as failures.

    Args:
        metrics: of every engine, by name.
    """

    def __init__(self, metrics: Mapping[str, EngineMetrics]):
        self._metrics = metrics

    def __call__(self, end: TransferEnd) -> None:
        """A transfer ended."""
        metrics, line = self._metrics[end.ticket.target], end.timeline
        if end.result == "failed":
            metrics.transfer_failed()
        elif end.result == "success":
            metrics.transferred(
                transfer_mode(end.ticket, line),
                seconds=line.alone,
                hidden_seconds=min(max(line.overlap or 0.0, 0.0), 1.0) * line.alone,
                size=end.progress.nbytes,
            )


def transfer_mode(ticket: Ticket, line: Timeline) -> TransferMode:
    """How a transfer went; layer by layer even if some of its parts shared packets."""
    if ticket.mode is Mode.LAYERWISE:
        return "layerwise"
    return "merged" if line.merged else "whole"
