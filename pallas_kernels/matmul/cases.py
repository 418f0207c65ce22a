"""Workloads of `matmul`: weights with ragged blocks, and DeepSeek's projections."""

import dataclasses
import functools
from typing import Any

import jax

from pallas_kernels.quant import FP8_BLOCK, INT4_GROUP, quantise
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

    def abstract(self) -> dict[str, Any]:
        """Shapes and types of `make`'s arguments."""
        w = jax.ShapeDtypeStruct((*self.lead, self.k), self.dtype)
        if self.weight != "array":
            recipe = FP8_BLOCK if self.weight == "e4m3" else INT4_GROUP
            w = jax.eval_shape(functools.partial(quantise, recipe=recipe), w)
        return {"x": jax.ShapeDtypeStruct((*self.tokens, self.k), self.dtype), "w": w}


DEEPSEEK_V3 = {
    "q_a": (1536, 7168),
    "q_b": (24576, 1536),
    "kv_a": (576, 7168),
    "o": (7168, 16384),
    "shared up": (4096, 7168),
    "shared down": (7168, 2048),
    "dense up": (36864, 7168),
    "dense down": (7168, 18432),
}
"""N and K of its dense products; "up" is gate and up."""


def _deepseek_v3(name: str, tokens: int) -> Case:
    n, k = DEEPSEEK_V3[name]
    return Case(
        name=f"deepseek-v3 {name} t{tokens}",
        tags=("bench",),
        dtype="bfloat16",
        tokens=(tokens,),
        lead=(2, n // 2) if name.endswith("up") else (n,),
        k=k,
        weight="e4m3",
    )


_HOPPER: dict[str, Any] = {"dtype": "bfloat16", "weight": "e4m3"}
# For the fp8 kernel: whole blocks of inputs; outputs that are no multiple of an item.
HOPPER = (
    Case(name="hopper one row", tokens=(1,), lead=(192,), k=512, **_HOPPER),
    Case(name="hopper few rows", tokens=(2, 9), lead=(2, 128), k=384, **_HOPPER),
    Case(name="hopper 64 rows", tokens=(64,), lead=(192,), k=512, **_HOPPER),
    Case(name="hopper many rows", tokens=(130,), lead=(192,), k=512, **_HOPPER),
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
    *HOPPER,
    *(_deepseek_v3(name, tokens) for tokens in (1, 128, 256, 4096) for name in DEEPSEEK_V3),
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
