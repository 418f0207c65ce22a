"""Acceptance metrics, counted on the host in plain integers.

Three figures are called "acceptance" in the field and differ (spec: vLLM, SGLang and TensorRT-LLM
definitions), so each has its own name here and none is called just that:

    accepted_per_drafted  accepted drafts / drafted tokens; vLLM and SGLang "acceptance rate"
    mean_accepted_length  1 + accepted drafts / steps that had drafts (a request's first step has
                          none), before any cut at eos; vLLM "mean acceptance length"
    emitted_per_step      tokens that reached the text / steps; SGLang "accept length", a little
                          lower
    per_position[i]       P(at least i+1 drafts accepted), unconditional; vLLM "per position"
    conditional[i]        P(draft i+1 accepted | all before it were): alpha_j of
                          E[length] = 1 + sum_k prod_(j<=k) alpha_j

A step here is one row of one verification step.
"""

import dataclasses
from typing import Any

import numpy as np


def _rate(count: int, total: int) -> float:
    return count / total if total else float("nan")


@dataclasses.dataclass(kw_only=True)
class AcceptanceStats:
    """Counts over the steps seen so far; every rate of an empty count is NaN.

    Attributes:
        steps: verification steps, one a row.
        drafted: draft tokens offered to the rule.
        accepted: drafts the rule accepted, before truncation at eos or at the token limit.
        emitted: tokens that reached the text, after truncation.
        offered_at: per draft position, steps that offered a draft there.
        reached_at: per draft position, steps that offered a draft there and accepted all before it.
        accepted_at: per draft position, steps that accepted it (and so all before it).
    """

    steps: int = 0
    drafted: int = 0
    accepted: int = 0
    emitted: int = 0
    offered_at: list[int] = dataclasses.field(default_factory=list)
    reached_at: list[int] = dataclasses.field(default_factory=list)
    accepted_at: list[int] = dataclasses.field(default_factory=list)

    def update(self, count: Any, *, drafted: Any, emitted: Any = None, active: Any = None) -> None:
        """Adds one step of a batch.

        Args:
            count: [B] ints, `Accepted.count` as the rule gave it (accepted drafts + 1).
            drafted: drafts offered, one int or [B].
            emitted: [B] ints, the count after `truncate_at_stop`; absent = `count`.
            active: [B] bools, rows that are real; absent = all. Idle and padding rows must not be
                counted.

        Raises:
            ValueError: a count is outside 1..drafted+1, or `emitted` outside 0..count, in an active
            row.
        """
        counts = np.atleast_1d(np.asarray(count))
        depths = np.broadcast_to(np.asarray(drafted), counts.shape)
        emits = counts if emitted is None else np.broadcast_to(np.asarray(emitted), counts.shape)
        if active is not None:
            rows = np.broadcast_to(np.asarray(active, bool), counts.shape)
            counts, depths, emits = counts[rows], depths[rows], emits[rows]
        if np.any((counts < 1) | (counts > depths + 1)):
            raise ValueError(
                f"count={counts.tolist()} with drafted={depths.tolist()}: a step emits 1 to "
                "drafted+1 tokens; pass the rule's count, and mask idle rows with active"
            )
        if np.any((emits < 0) | (emits > counts)):
            raise ValueError(
                f"emitted={emits.tolist()} is not within 0..count={counts.tolist()}: pass the "
                "count that truncate_at_stop returned"
            )
        self.steps += int(counts.size)
        self.drafted += int(depths.sum())
        self.accepted += int((counts - 1).sum())
        self.emitted += int(emits.sum())
        self._grow(int(depths.max(initial=0)))
        for i in range(int(depths.max(initial=0))):
            offered = depths > i
            self.offered_at[i] += int(offered.sum())
            self.reached_at[i] += int((offered & (counts > i)).sum())
            self.accepted_at[i] += int((counts > i + 1).sum())

    def merge(self, other: "AcceptanceStats") -> None:
        """Adds the counts of `other`, for instance another device's or another prompt's."""
        self.steps += other.steps
        self.drafted += other.drafted
        self.accepted += other.accepted
        self.emitted += other.emitted
        self._grow(len(other.offered_at))
        for i in range(len(other.offered_at)):
            self.offered_at[i] += other.offered_at[i]
            self.reached_at[i] += other.reached_at[i]
            self.accepted_at[i] += other.accepted_at[i]

    def _grow(self, depth: int) -> None:
        for counts in (self.offered_at, self.reached_at, self.accepted_at):
            counts.extend([0] * (depth - len(counts)))

    @property
    def accepted_per_drafted(self) -> float:
        """Accepted drafts over drafted tokens."""
        return _rate(self.accepted, self.drafted)

    @property
    def mean_accepted_length(self) -> float:
        """1 + accepted drafts per step that had drafts: counts the target's own token, ignores cuts
        at eos. 1 where nothing was ever drafted.
        """
        drafting = self.offered_at[0] if self.offered_at else 0
        return 1 + self.accepted / drafting if drafting else _rate(self.steps, self.steps)

    @property
    def emitted_per_step(self) -> float:
        """Tokens that reached the text per step."""
        return _rate(self.emitted, self.steps)

    @property
    def per_position(self) -> list[float]:
        """Unconditional rates: of the steps that offered a draft at i, how many accepted it."""
        return [_rate(a, o) for a, o in zip(self.accepted_at, self.offered_at, strict=True)]

    @property
    def conditional(self) -> list[float]:
        """Rates given that all earlier drafts of the step were accepted."""
        return [_rate(a, r) for a, r in zip(self.accepted_at, self.reached_at, strict=True)]
