"""Workloads of `expert_mlp`: every number of rows the implementations tell apart."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.testing.generate import BaseCase, Format, normal, tagged
from pallas_kernels.testing.generate import weight as make_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """Rows with their chosen experts.

    Attributes:
        rows: T.
        experts: E.
        per_token: K.
        hidden: D.
        width: F.
        skewed: every row chooses the same experts.
        absent: share of choices that are no expert.
        pairs: room for so many of the others; None: for all choices.
        weight: how the weights are given.
    """

    rows: int
    experts: int = 8
    per_token: int = 2
    hidden: int = 32
    width: int = 16
    skewed: bool = False
    absent: float = 0.0
    pairs: int | None = None
    weight: Format = "array"

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `expert_mlp`. Poisoned: an expert that no row chooses would
        overflow on every row."""
        rng = self.rng(seed)
        free = self.experts - poison  # the last expert is nobody's when poisoned
        shape = (1 if self.skewed else self.rows, free)
        order = np.argsort(rng.random(shape), axis=1)[:, : self.per_token]
        chosen = np.broadcast_to(order, (self.rows, self.per_token)).astype(np.int32)
        chosen = np.where(rng.random(chosen.shape) < self.absent, -1, chosen)
        gate_up = (self.experts, 2, self.width, self.hidden)
        down = (self.experts, self.hidden, self.width)
        args = {
            "x": self.array(normal(rng, self.rows, self.hidden)),
            "weights": jnp.asarray(rng.random((self.rows, self.per_token), np.float32)),
            "experts": jnp.asarray(chosen),
            "gate_up": make_weight(rng, gate_up, self.weight, self.dtype),
            "down": make_weight(rng, down, self.weight, self.dtype),
        }
        if self.pairs is not None:
            args["pairs"] = self.pairs
            assert (chosen >= 0).sum() <= self.pairs
        if poison and self.weight == "array":
            for name in ("gate_up", "down"):
                args[name] = args[name].at[-1].set(1e30)
        return args


CASES = (
    Case(name="one row", rows=1, experts=16),
    Case(name="by pair", rows=2, experts=16),
    Case(name="few", rows=7),
    Case(name="skewed", rows=9, skewed=True),
    Case(name="most few", rows=256),
    Case(name="many", rows=257),
    Case(name="no rows", rows=0),
    Case(name="few choices by pair", rows=2, experts=16, absent=0.5),
    Case(name="few choices of few rows", rows=9, absent=0.5),
    Case(name="few choices", rows=300, absent=0.8, pairs=160),
    Case(name="no choices", rows=300, absent=1.0, pairs=8),
    Case(name="fp8 and few choices", rows=6, hidden=128, width=128, weight="e4m3", absent=0.5),
    Case(name="bfloat16", rows=12, dtype="bfloat16"),
    Case(name="fp8", rows=6, hidden=128, width=128, weight="e4m3"),
    Case(
        name="deepseek-v2-lite decode",
        tags=("bench",),
        dtype="bfloat16",
        rows=64,
        experts=64,
        per_token=6,
        hidden=2048,
        width=1408,
    ),
)
CI = tagged(CASES, "ci")
BENCH = tagged(CASES, "bench")
