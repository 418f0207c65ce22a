"""Workloads of `expert_mlp`: every number of rows the implementations tell apart."""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul import pack
from pallas_kernels.quant import FP8_BLOCK, INT4_GROUP, quantise
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
        packed: whether int4 weights are packed.
        no_ties: tiles of 128 channels differ in size, and no value is halfway between two of e4m3
            once it is scaled: it would go either way with the last bit of the scale.
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
    packed: bool = False
    no_ties: bool = False

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
        x = normal(rng, self.rows, self.hidden)
        if self.no_ties:
            # 448 / 255 of another number of 8 bits has no end in binary.
            x = x.clip(-3.9, 3.9)
            x[:, ::128] = 255 / 64
            x *= (2.0 ** rng.integers(-2, 2, (self.rows, self.hidden // 128))).repeat(128, axis=1)
        form = _pack if self.packed else lambda w: w
        args = {
            "x": self.array(x),
            "weights": jnp.asarray(rng.random((self.rows, self.per_token), np.float32)),
            "experts": jnp.asarray(chosen),
            "gate_up": form(make_weight(rng, gate_up, self.weight, self.dtype)),
            "down": form(make_weight(rng, down, self.weight, self.dtype)),
        }
        if self.pairs is not None:
            args["pairs"] = self.pairs
            assert (chosen >= 0).sum() <= self.pairs
        if poison and self.weight == "array":
            for name in ("gate_up", "down"):
                args[name] = args[name].at[-1].set(1e30)
        return args

    def abstract(self) -> dict[str, Any]:
        """Shapes and types of the arrays of `make`."""
        shape = jax.ShapeDtypeStruct

        def weight(*sizes: int) -> Any:
            array, recipe = shape(sizes, self.dtype), _RECIPES.get(self.weight)
            made = jax.eval_shape(lambda w: quantise(w, recipe), array) if recipe else array
            return jax.eval_shape(_pack, made) if self.packed else made

        return {
            "x": shape((self.rows, self.hidden), self.dtype),
            "weights": shape((self.rows, self.per_token), jnp.float32),
            "experts": shape((self.rows, self.per_token), jnp.int32),
            "gate_up": weight(self.experts, 2, self.width, self.hidden),
            "down": weight(self.experts, self.hidden, self.width),
        }


_RECIPES = {"e4m3": FP8_BLOCK, "int4": INT4_GROUP}
_pack = jax.jit(functools.partial(pack, full_range=False))


def _deepseek_v3(tokens: int, weight: Format, experts: int = 8) -> Case:
    """Experts of DeepSeek-V3; if 8, each with that many rows: every token goes to all of them."""
    return Case(
        name=f"{weight} deepseek-v3 {experts} experts t{tokens}",
        tags=("bench",),
        dtype="bfloat16",
        rows=tokens,
        experts=experts,
        per_token=8,
        hidden=7168,
        width=2048,
        weight=weight,
        packed=weight == "int4",
    )


# For the implementation for Hopper: bf16 rows, whole blocks of 128.
_E4M3: dict[str, Any] = {
    "experts": 4,
    "hidden": 256,
    "width": 128,
    "weight": "e4m3",
    "dtype": "bfloat16",
    "no_ties": True,
}
_INT4: dict[str, Any] = {**_E4M3, "weight": "int4", "packed": True}
_MANY: dict[str, Any] = {"tags": ("full",), "rows": 700, "hidden": 512, "width": 384}

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
    *(_deepseek_v3(tokens, "e4m3") for tokens in (1, 32, 128, 512, 4096)),
    *(_deepseek_v3(tokens, "int4") for tokens in (1, 32, 128, 512)),
    *(_deepseek_v3(tokens, "int4", 256) for tokens in (8, 32, 128, 512)),
)
HOPPER = (
    Case(name="hopper", rows=13, absent=0.3, **_E4M3),
    Case(name="hopper one row", rows=1, **_E4M3),
    Case(name="hopper pairs", rows=30, absent=0.75, pairs=28, **_E4M3),
    Case(name="hopper no choices", rows=5, absent=1.0, pairs=4, **_E4M3),
    Case(name="packed", rows=13, absent=0.3, **_INT4),
    Case(name="packed pairs", rows=30, absent=0.75, pairs=28, **_INT4),
    Case(name="hopper many", **_E4M3 | _MANY),
    Case(name="packed many", **_INT4 | _MANY),
)
"""Rows go through these in e4m3 there; the larger ones are tagged "full"."""
CI, BENCH = tagged(CASES, "ci"), tagged(CASES, "bench")
