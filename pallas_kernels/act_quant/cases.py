"""Workloads of `act_quant`: every recipe, ragged tiles, zeros, huge values, powers of two."""

import dataclasses
from typing import Any, Literal

import numpy as np

from pallas_kernels import quant
from pallas_kernels.testing.generate import BaseCase, normal, tagged

RECIPES = {
    "tile": quant.FP8_TILE,
    "tile_ue8m0": quant.FP8_TILE_UE8M0,
    "token": quant.FP8_TOKEN,
    "tensor": quant.FP8_TENSOR,
}
"""The recipes of activations, by the names cases use."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """Activations to quantize.

    Attributes:
        shape: [..., T, K].
        quant: name in `RECIPES`.
        values: "normal"; "wide": magnitudes from 1e-30 to 1e30, with rows of zeros; "powers": each
            tile's largest magnitude is 448 times a power of two, so that the scale is that power
            exactly.
    """

    shape: tuple[int, ...]
    quant: Literal["tile", "tile_ue8m0", "token", "tensor"] = "tile"
    values: Literal["normal", "wide", "powers"] = "normal"

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `act_quant`; a poisoned last row is NaN, which may not touch other tiles."""
        rng = self.rng(seed)
        x = normal(rng, *self.shape)
        if self.values == "wide":
            x *= 10.0 ** rng.integers(-30, 31, (*self.shape[:-1], 1))
            x[..., ::3, :] = 0
        elif self.values == "powers":
            block = RECIPES[self.quant].block[1] or self.shape[-1]
            x = x.clip(-3, 3)
            x[..., ::block] = 448.0
            x *= 2.0 ** rng.integers(-12, 13, (*self.shape[:-1], 1))
        if poison and self.quant != "tensor":
            x[..., -1, :] = np.nan
        return {"x": self.array(x), "recipe": RECIPES[self.quant]}


CASES = (
    Case(name="tile", shape=(5, 256)),
    Case(name="tile ragged", shape=(2, 5, 200)),
    Case(name="tile below a block", shape=(5, 36)),
    Case(name="tile wide", shape=(9, 200), values="wide"),
    Case(name="tile bfloat16", shape=(5, 256), dtype="bfloat16"),
    Case(name="ue8m0", shape=(9, 200), quant="tile_ue8m0"),
    Case(name="ue8m0 wide", shape=(9, 200), quant="tile_ue8m0", values="wide"),
    Case(name="ue8m0 powers", shape=(9, 200), quant="tile_ue8m0", values="powers"),
    Case(name="tile powers", shape=(9, 200), values="powers"),
    Case(name="token", shape=(5, 200), quant="token"),
    Case(name="tensor", shape=(5, 200), quant="tensor"),
    Case(name="deepseek-v3 t128", tags=("full", "bench"), shape=(128, 7168), dtype="bfloat16"),
    Case(name="deepseek-v3 t4096", tags=("bench",), shape=(4096, 7168), dtype="bfloat16"),
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
