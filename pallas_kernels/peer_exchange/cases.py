"""Workloads of `peer_exchange`: ragged runs, empty and full ones, the rows of DeepSeek-V3."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.testing.generate import BaseCase, Tag, tagged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """Rows of all ranks.

    Attributes:
        ranks: R.
        capacity: C.
        width: W.
        counts: rows of each run, over and over; None: any number, with empty and full runs.
        dtype: of the rows.
    """

    dtype: Literal["float32", "bfloat16", "uint8"] = "float32"
    ranks: int
    capacity: int
    width: int
    counts: tuple[int, ...] | None = None

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """`rows` [R, R, C, W] and `counts` i32 [R, R], leading axis the rank that sends; if
        poisoned, rows past the count of a run are NaN or 255.
        """
        rng = self.rng(seed)
        shape = (self.ranks, self.ranks, self.capacity, self.width)
        rows = rng.integers(0, 128, shape).astype(np.float32)
        counts = self._counts(rng)
        if poison:
            rows[np.arange(self.capacity) >= counts[..., None]] = (
                255 if self.dtype == "uint8" else np.nan
            )
        return {"rows": self.array(rows), "counts": jnp.asarray(counts)}

    def _counts(self, rng: np.random.Generator) -> np.ndarray:
        total = self.ranks**2
        if self.counts is not None:
            return np.resize(np.array(self.counts, np.int32), (self.ranks, self.ranks))
        counts = rng.integers(0, self.capacity + 1, total).astype(np.int32)
        counts[rng.permutation(total)[:2]] = 0, self.capacity
        return counts.reshape(self.ranks, self.ranks)

    def abstract(self) -> list[Any]:
        """Shapes and types on all ranks, inside no `shard_map`: leading axes are split."""
        runs = self.ranks**2
        return [
            jax.ShapeDtypeStruct((runs, self.capacity, self.width), self.dtype),
            jax.ShapeDtypeStruct((runs,), jnp.int32),
        ]


_REAL: tuple[Tag, ...] = ("full", "bench")

CASES = (
    Case(name="ragged", ranks=3, capacity=12, width=32),
    Case(name="bytes", ranks=4, capacity=10, width=33, dtype="uint8"),
    Case(name="bfloat16", ranks=2, capacity=16, width=24, dtype="bfloat16"),
    Case(name="one row", ranks=4, capacity=1, width=16),
    Case(name="nothing", ranks=3, capacity=4, width=16, counts=(0,)),
    Case(name="all", ranks=2, capacity=7, width=16, counts=(7,)),
    Case(name="one rank", ranks=1, capacity=20, width=16, counts=(17,)),
    *(
        Case(
            name=f"deepseek-v3 {ranks} ranks c{capacity}",
            tags=_REAL,
            ranks=ranks,
            capacity=capacity,
            width=7168,
            dtype="bfloat16",
        )
        for ranks in (2, 8)
        for capacity in (1, 8, 128, 1024)
    ),
)
CI, BENCH = tagged(CASES, "ci"), tagged(CASES, "bench")
