"""What an engine counts: batches of numbers in cheap calls, labels bound once.

`serve.metrics` has the table of names.
"""

from collections.abc import Callable
from typing import Any, Literal, get_args

import numpy as np
from prometheus_client import Counter, Gauge

TransferMode = Literal["layerwise", "whole", "merged"]
"""Layer by layer during prefill, as a whole after it, or in packets shared with other requests'."""
Role = Literal["both", "prefill", "decode"]
"""What an engine does."""


class EngineMetrics:
    """The metrics of one engine: a few calls a step. Made by `Metrics.engine`.

    For the engine's thread; of transfers, one other thread tells.

    Args:
        series: what to count in, by metric and labels beside those of the model and the engine.
    """

    def __init__(self, series: Callable[..., Any]):
        self._series = series
        self._running = series("num_requests_running")
        self._waiting = series("num_requests_waiting")
        self._usage = series("kv_cache_usage_perc")
        self._remaining = series("remaining_slots")
        self._output_length = series("mean_output_length")
        self._preemptions = series("num_preemptions")
        self._queries = series("prefix_cache_queries")
        self._hits = series("prefix_cache_hits")
        self._drafts = series("spec_decode_num_drafts")
        self._draft_tokens = series("spec_decode_num_draft_tokens")
        self._accepted = series("spec_decode_num_accepted_tokens")
        self._step = series("engine_step_seconds")
        self._host = series("engine_host_seconds")
        self._dummy = series("dummy_steps")
        self._imbalance = {when: series("eplb_imbalance", when) for when in ("before", "after")}
        self._rebalances = series("eplb_rebalances")
        self._moves = series("eplb_moved_experts")
        self._compiled = series("compile_count_after_warmup")
        self._startup = series("startup_time_seconds")
        self._transfer = series("kv_transfer_latency_seconds")
        self._bytes = series("kv_transfer_bytes")
        self._failed = series("kv_transfer_failed")
        self._overlap = series("transfer_overlap_ratio")
        self._modes = {mode: series("transfer_mode", mode) for mode in get_args(TransferMode)}
        self._transfer_seconds = self._hidden_seconds = 0.0
        self._places: dict[tuple[str, int], _Place] = {}

    def state(
        self,
        *,
        running: int,
        waiting: int,
        kv_usage: float,
        remaining_slots: int | None = None,
        mean_output_length: float | None = None,
    ) -> None:
        """What the engine holds now; None leaves a value as it was."""
        self._running.set(running)
        self._waiting.set(waiting)
        self._usage.set(kv_usage)
        if remaining_slots is not None:
            self._remaining.set(remaining_slots)
        if mean_output_length is not None:
            self._output_length.set(mean_output_length)

    def step(self, *, seconds: float, host_seconds: float, dummy: int = 0) -> None:
        """One step: from launch to result, what the host took since the launch before, and how many
        ranks had nothing to do in it.
        """
        self._step.observe(seconds)
        self._host.observe(host_seconds)
        if dummy:
            self._dummy.inc(dummy)

    def prefix(self, *, queries: int, hits: int) -> None:
        """Prompt tokens looked up in the prefix cache, and found."""
        self._queries.inc(queries)
        self._hits.inc(hits)

    def preempted(self, count: int = 1) -> None:
        """Requests that start over."""
        self._preemptions.inc(count)

    def drafts(self, method: str, *, offered: np.ndarray, accepted: np.ndarray) -> None:
        """The drafts of a step's rows under one acceptance rule.

        Args:
            method: the rule's name; not its parameters, of which clients may invent any number.
            offered: int [n], draft tokens that were tested.
            accepted: int [n], how many of them, from the front, were accepted.
        """
        # Counts by value: a handful of numbers instead of a pass over the rows for each place.
        rows = np.bincount(offered).tolist()
        tested = sum(number * count for number, count in enumerate(rows))
        if not tested:
            return
        kept = np.bincount(accepted, minlength=len(rows)).tolist()
        self._drafts.inc(sum(rows[1:]))
        self._draft_tokens.inc(tested)
        self._accepted.inc(sum(number * count for number, count in enumerate(kept)))
        for position in range(len(rows) - 1):
            place = self._places.get((method, position))
            if place is None:
                place = self._places[method, position] = _Place(
                    self._series("spec_decode_num_accepted_tokens_per_pos", str(position)),
                    self._series("draft_acceptance", method, str(position)),
                )
            place.add(sum(rows[position + 1 :]), sum(kept[position + 1 :]))

    def balanced(self, *, before: float, after: float, moves: int) -> None:
        """Experts have moved; the loads are fullest over mean device, of the same rows."""
        self._imbalance["before"].set(before)
        self._imbalance["after"].set(after)
        self._rebalances.inc()
        self._moves.inc(moves)

    def compiled(self, count: int = 1) -> None:
        """Compilations after the warm-up."""
        self._compiled.inc(count)

    def started(self, seconds: float) -> None:
        """The engine is warmed up, so long after its start."""
        self._startup.set(seconds)

    def transferred(
        self, mode: TransferMode, *, seconds: float, hidden_seconds: float, size: int
    ) -> None:
        """A request's cache has come.

        Args:
            mode: how.
            seconds: that its parts took on the wire.
            hidden_seconds: how many of them went by while the prefill went on.
            size: bytes.
        """
        self._transfer.observe(seconds)
        self._bytes.inc(size)
        self._modes[mode].inc()
        self._transfer_seconds += seconds
        self._hidden_seconds += hidden_seconds
        if self._transfer_seconds:
            self._overlap.set(self._hidden_seconds / self._transfer_seconds)

    def transfer_failed(self, count: int = 1) -> None:
        """Transfers that were given up."""
        self._failed.inc(count)


class _Place:
    """One place in the drafts of one method."""

    def __init__(self, counter: Counter, ratio: Gauge):
        self._counter = counter
        self._ratio = ratio
        self._tested = self._accepted = 0

    def add(self, tested: int, accepted: int) -> None:
        """Draft tokens at this place."""
        if tested:
            self._tested += tested
            self._accepted += accepted
            self._counter.inc(accepted)
            self._ratio.set(self._accepted / self._tested)
