"""What the ranks of an engine agree on before each step: its sizes, and whether there is a step.

Every rank has a queue, slots and pages of its own, so each would take a step of other sizes, or
none. A step's programs exchange rows between ranks, so all ranks must launch the same programs in
the same order: they follow from what all ranks said, and from nothing that one rank alone knows.
"""

from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np

from dskjax.distributed import fetch
from serve.buckets import Bucket, Buckets, Variant
from serve.plan import StepPlan


class Sizes(NamedTuple):
    """What one rank needs of a step; all zeros if it has nothing to do.

    Of the step that they agree on, the most that any of them needs.

    Attributes:
        rows: decoding rows.
        drafts: drafts that some row wants to verify.
        columns: pages of the longest sequence.
        variant: what the decoding rows ask for, a `serve.buckets.Variant`.
        scored: 1 if log-probabilities of prompt rows are wanted.
        launches: for each of `Buckets.chunk_shapes`, launches that the prompt rows need.
    """

    rows: int
    drafts: int
    columns: int
    variant: int
    scored: int
    launches: tuple[int, ...]

    @classmethod
    def of(cls, plan: StepPlan | None, variant: Variant, buckets: Buckets) -> "Sizes":
        """Those of a rank's plan.

        Args:
            plan: what the rank would do; None is nothing.
            variant: what its decoding rows ask for.
            buckets: of the engine.
        """
        launches = dict.fromkeys(buckets.chunk_shapes, 0)
        if plan is None:
            return cls(0, 0, 0, 0, 0, tuple(launches.values()))
        for shape, _ in buckets.group([chunk.length for chunk in plan.chunks]):
            launches[shape] += 1
        return cls(
            rows=len(plan.requests),
            drafts=plan.drafts if plan.requests else 0,
            columns=plan.columns,
            variant=int(variant) if plan.requests else 0,
            scored=int(any(chunk.request.scored for chunk in plan.chunks)),
            launches=tuple(launches.values()),
        )

    @property
    def empty(self) -> bool:
        """Nothing to launch."""
        return not self.rows and not any(self.launches)

    def programs(self, buckets: Buckets) -> list[Bucket]:
        """The programs of the step that has these sizes, in the order of their launches.

        Decoding rows come first, together with the first prompt rows if the buckets mix.
        """
        columns, scored = buckets.fit_columns(self.columns), bool(self.scored)
        shapes = [
            shape
            for shape, count in zip(buckets.chunk_shapes, self.launches, strict=True)
            for _ in range(count)
        ]
        found = []
        if self.rows:
            size, beside = (buckets.fit_batch(self.rows), 0, 0), False
            if buckets.mixed and shapes:
                size, beside = (buckets.batches[-1], *shapes.pop(0)), scored
            variant = buckets.fit_variant(Variant(self.variant), scored=beside)
            found.append(Bucket(*size, self.drafts, columns, variant, beside))
        return found + [Bucket(0, *shape, 0, columns, scored=scored) for shape in shapes]

    def pack(self) -> np.ndarray:
        """int32 [5 + shapes], to send."""
        return np.array([*self[:5], *self.launches], np.int32)

    @classmethod
    def unpack(cls, numbers: Sequence[int] | np.ndarray) -> "Sizes":
        """The inverse of `pack`."""
        rows, drafts, columns, variant, scored, *launches = map(int, numbers)
        return cls(rows, drafts, columns, variant, scored, tuple(launches))


def agree(ranks: Iterable[Sizes]) -> Sizes:
    """The sizes of the step that every rank takes: of each size the largest.

    The same on every rank that has the same list; an empty result is no step, for all of them.
    """
    return Sizes.unpack(np.max([sizes.pack() for sizes in ranks], axis=0))


def agree_with_processes(own: Sizes) -> Sizes:
    """`agree` between processes that have a rank, or several that agreed, each.

    A collective of one small vector: every process calls it once for each step, whether it has
    anything to do or not.
    """
    numbers = own.pack()
    return agree(map(Sizes.unpack, fetch(numbers).reshape(-1, len(numbers))))
