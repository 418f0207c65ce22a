"""Workloads of `grouped_matmul`: all loads of experts, and DeepSeek's shapes."""

import dataclasses
from typing import Any

import jax.numpy as jnp
import numpy as np

from pallas_kernels.testing.generate import BaseCase, Format, Load, group_sizes, normal, tagged
from pallas_kernels.testing.generate import weight as make_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """Rows sorted by expert.

    Attributes:
        rows: rows that belong to an expert.
        padding: rows past them, which may hold anything.
        experts: E.
        lead: output shape of one row, (N,) or (2, N).
        k: K.
        load: how rows spread over experts.
        weight: how the weight is given.
    """

    rows: int
    padding: int = 0
    experts: int
    lead: tuple[int, ...]
    k: int
    load: Load = "even"
    weight: Format = "array"

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `grouped_matmul`; NaN in the rows past the groups when poisoned."""
        rng = self.rng(seed)
        sizes = group_sizes(rng, self.rows, self.experts, self.load)
        x = normal(rng, self.rows + self.padding, self.k)
        if poison:
            x[sizes.sum() :] = np.nan
        shape = (self.experts, *self.lead, self.k)
        return {
            "x": self.array(x),
            "w": make_weight(rng, shape, self.weight, self.dtype),
            "group_sizes": jnp.asarray(sizes),
        }


def _deepseek_v3(name: str, rows: int, experts: int, load: Load, down: bool = False) -> Case:
    lead, k = ((7168,), 2048) if down else ((2, 2048), 7168)
    return Case(
        name=f"deepseek-v3 {name}",
        tags=("bench",),
        dtype="bfloat16",
        rows=rows,
        experts=experts,
        lead=lead,
        k=k,
        load=load,
    )


# 96 rows on 16 experts: the capacity of `xla` is 24, so "one" and "few" overflow it.
_SMALL: dict[str, Any] = {"rows": 96, "experts": 16, "lead": (2, 12), "k": 40}
_PADDED: dict[str, Any] = {**_SMALL, "rows": 50, "padding": 46}

CASES = (
    Case(name="one token", rows=1, experts=4, lead=(12,), k=40),
    Case(name="even", **_SMALL),
    Case(name="skewed", load="skewed", **_SMALL),
    Case(name="all on one expert", load="one", **_SMALL),
    Case(name="few experts", load="few", **_SMALL),
    Case(name="no rows", load="none", **_SMALL),
    Case(name="padding", **_PADDED),
    Case(name="padding after one", load="one", **_PADDED),
    Case(name="e4m3 ragged blocks", rows=30, experts=3, lead=(200,), k=136, weight="e4m3"),
    Case(name="int4 ragged groups", rows=30, experts=3, lead=(2, 20), k=330, weight="int4"),
    Case(name="int4 overflow", rows=60, experts=8, lead=(20,), k=130, weight="int4", load="one"),
    Case(name="bfloat16", dtype="bfloat16", load="skewed", **_SMALL),
    Case(
        name="bfloat16 e4m3",
        rows=30,
        experts=3,
        lead=(200,),
        k=136,
        weight="e4m3",
        dtype="bfloat16",
    ),
    Case(
        name="256 experts",
        tags=("full",),
        rows=1024,
        experts=256,
        lead=(2, 64),
        k=256,
        load="skewed",
        dtype="bfloat16",
    ),
    _deepseek_v3("gate/up b128 ep8", 1024, 32, "even"),
    _deepseek_v3("down b128 ep8", 1024, 32, "even", down=True),
    _deepseek_v3("gate/up prefill 32768 rows ep8", 32768, 32, "skewed"),
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
