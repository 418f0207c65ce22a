"""Workloads of `matmul`: weights with ragged blocks, and DeepSeek's projections."""

import dataclasses
from typing import Any

from pallas_kernels.testing.generate import BaseCase, Format, normal, tagged
from pallas_kernels.testing.generate import weight as make_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """A dense product.

    Attributes:
        tokens: leading shape of the activations.
        lead: shape of an output row, (N,) or (2, N).
        k: K.
        weight: how the weight is given.
    """

    tokens: tuple[int, ...]
    lead: tuple[int, ...]
    k: int
    weight: Format = "array"

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `matmul`. It uses all of them, so that there is nothing to poison."""
        rng = self.rng(seed)
        return {
            "x": self.array(normal(rng, *self.tokens, self.k)),
            "w": make_weight(rng, (*self.lead, self.k), self.weight, self.dtype),
        }


def _deepseek_v3(name: str, tokens: int, n: int, k: int) -> Case:
    return Case(
        name=f"deepseek-v3 {name} t{tokens}",
        tags=("bench",),
        dtype="bfloat16",
        tokens=(tokens,),
        lead=(n,),
        k=k,
    )


CASES = (
    Case(name="one token", tokens=(1,), lead=(5,), k=7),
    Case(name="two axes", tokens=(2, 3), lead=(2, 20), k=40),
    Case(name="bfloat16", tokens=(9,), lead=(20,), k=300, dtype="bfloat16"),
    Case(name="e4m3", tokens=(9,), lead=(256,), k=128, weight="e4m3"),
    Case(name="e4m3 ragged", tokens=(9,), lead=(2, 130), k=300, weight="e4m3"),
    Case(name="e4m3 below a block", tokens=(9,), lead=(40,), k=36, weight="e4m3"),
    Case(name="int4", tokens=(9,), lead=(20,), k=256, weight="int4"),
    Case(name="int4 ragged", tokens=(9,), lead=(2, 20), k=330, weight="int4"),
    Case(
        name="bfloat16 int4",
        tokens=(9,),
        lead=(2, 20),
        k=330,
        weight="int4",
        dtype="bfloat16",
    ),
    *(
        _deepseek_v3(name, tokens, n, k)
        for tokens in (128, 4096)
        for name, n, k in (
            ("q_a", 1536, 7168),
            ("q_b", 24576, 1536),
            ("kv_a", 576, 7168),
            ("o", 7168, 16384),
            ("dense up", 18432, 7168),
        )
    ),
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
