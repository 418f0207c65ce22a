"""The device side of an engine with ranks: one launch is a step of all of them."""

from collections.abc import Iterator

import numpy as np

from dskjax.decode.rows import DecodeRows, PrefillRows
from serve.buckets import Bucket
from serve.expert_balancer import ExpertBalancer
from serve.plan import Chunk, StepPlan
from serve.programs import Progress
from serve.rank_scheduler import RanksPlan
from serve.rows import all_ranks, decode_rows, prefill_rows
from serve.runner import Pending, Runner, start_scores


class RankRunner(Runner):
    """A `serve.runner.Runner` of plans of all ranks; it launches what they agreed on, no more and
    no less. A rank with less to do runs padding, and one with nothing runs nothing else.
    """

    balancer: ExpertBalancer | None = None
    """Moves experts between steps, if anybody does."""

    def warm_up(self, progress: Progress | None = None) -> float:
        """See `serve.runner.Runner.warm_up`; moves an expert there and back."""
        seconds = super().warm_up(progress)
        if self.balancer is not None:
            self.params = self.balancer.warm_up(self.params, self.state)
        return seconds

    def launch(self, plan: StepPlan, page_table: np.ndarray) -> Pending:
        """See `serve.plan.Runner.launch`."""
        assert isinstance(plan, RanksPlan)
        if self.balancer is not None:
            self.params = self.balancer.turn(self.params, self.state)
        tables = np.split(page_table, len(plan.parts))
        places = [
            request.slot + first
            for first, part in self._parts(plan)
            for request in (part.admit if part is not None else ())
        ]
        self._admit(plan.admit, places)
        waiting = [self._groups(part) for part in plan.parts]
        output, receipts, scored, drawn, at = None, [], [], self._drawn, slice(0)
        for bucket in plan.sizes.programs(self.buckets):
            chunks = [self._next(groups, bucket) for groups in waiting]
            decode = self._decode(plan, tables, bucket)
            prefill = self._prefill(chunks, tables, bucket)
            self.state, out = self.programs[bucket](self.params, self.state, decode, prefill)
            if bucket.batch:
                output, self._drawn, at = out, self._scale, _places(plan, bucket.batch)
                out.rows.copy_to_host_async()
            else:
                receipts.append(out)
            if bucket.scored:
                found = out.prompt_logprobs if bucket.batch else out
                scored += start_scores(found, _numbered(chunks, bucket.chunks))
        assert not any(any(groups.values()) for groups in waiting), "chunks without a launch"
        return self._pending(plan, at, output, receipts, drawn, scored)

    def _parts(self, plan: RanksPlan) -> Iterator[tuple[int, StepPlan | None]]:
        """Each rank's first slot among those of all, and its plan."""
        each = self._slots // len(plan.parts)
        yield from ((rank * each, part) for rank, part in enumerate(plan.parts))

    def _groups(self, part: StepPlan | None) -> dict[tuple[int, int], list[list[Chunk]]]:
        """A rank's chunks by the shapes that they are launched in."""
        groups: dict[tuple[int, int], list[list[Chunk]]] = {}
        chunks = [] if part is None else part.chunks
        for shape, members in self.buckets.group([chunk.length for chunk in chunks]):
            groups.setdefault(shape, []).append([chunks[i] for i in members])
        return groups

    def _next(
        self, groups: dict[tuple[int, int], list[list[Chunk]]], bucket: Bucket
    ) -> list[Chunk]:
        """A rank's chunks in this launch."""
        left = groups.get((bucket.chunks, bucket.length))
        return left.pop(0) if left else []

    def _decode(
        self, plan: RanksPlan, tables: list[np.ndarray], bucket: Bucket
    ) -> DecodeRows | None:
        if not bucket.batch:
            return None
        nobody = np.zeros(0, np.int32)
        slots = [nobody if part is None else part.slots for part in plan.parts]
        return all_ranks(
            [
                decode_rows(own, table, bucket.batch, bucket.columns, self._scale)
                for own, table in zip(slots, tables, strict=True)
            ]
        )

    def _prefill(
        self, chunks: list[list[Chunk]], tables: list[np.ndarray], bucket: Bucket
    ) -> PrefillRows | None:
        if not bucket.chunks:
            return None
        shape, depths = (bucket.chunks, bucket.length), self.config.spec.depths
        return all_ranks(
            [
                prefill_rows(own, table, shape, bucket.columns, depths, bucket.scored)
                for own, table in zip(chunks, tables, strict=True)
            ]
        )


def _places(plan: RanksPlan, batch: int) -> np.ndarray:
    """Rows of the plan's requests in the output, where each rank has `batch`."""
    counts = [0 if part is None else len(part.requests) for part in plan.parts]
    return np.concatenate([rank * batch + np.arange(n) for rank, n in enumerate(counts)])


def _numbered(chunks: list[list[Chunk]], size: int) -> Iterator[tuple[int, Chunk]]:
    """Chunks of a launch with their rows there, where each rank has `size`."""
    for rank, own in enumerate(chunks):
        yield from ((rank * size + row, chunk) for row, chunk in enumerate(own))
