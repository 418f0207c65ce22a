"""Workloads of `permute` and `combine`: places left out, ragged channels, real shapes."""

import dataclasses
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.act_quant.cases import RECIPES
from pallas_kernels.testing.generate import BaseCase, Tag, normal, tagged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """Tokens for experts.

    Attributes:
        tokens: T.
        width: D.
        choices: K.
        rows: M; None: one for each copy.
        left_out: copies that go nowhere, half of them named by a negative place.
        channel_scale: multiply channels.
        quant: name of a recipe.
        dtype: of the tokens.
    """

    dtype: Literal["float32", "bfloat16"] = "bfloat16"
    tokens: int
    width: int
    choices: int
    rows: int | None = None
    left_out: int = 0
    channel_scale: bool = False
    quant: Literal["tile", "tile_ue8m0", "token"] = "tile"

    @property
    def num_rows(self) -> int:
        """M."""
        return self.rows or self.tokens * self.choices

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `permute`; of a poisoned case the last token is NaN."""
        rng = self.rng(seed)
        x = normal(rng, self.tokens, self.width) * 10.0 ** rng.integers(-3, 3, (self.tokens, 1))
        if poison:
            x[-1] = np.nan
        scale = np.exp(normal(rng, self.width)) if self.channel_scale else None
        return {
            "x": self.array(x),
            "places": jnp.asarray(self.places(rng)),
            "channel_scale": None if scale is None else jnp.asarray(scale),
            "rows": self.num_rows,
            "recipe": RECIPES[self.quant],
        }

    def make_combine(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `combine`; rows without a place, and weights without a row, are NaN if
        poisoned.
        """
        rng = self.rng(seed)
        y = normal(rng, self.num_rows, self.width)
        places = self.places(rng)
        weights = rng.uniform(0, 1, places.shape).astype(np.float32)
        is_there = (0 <= places) & (places < self.num_rows)
        if poison:
            y[np.setdiff1d(np.arange(self.num_rows), places)] = np.nan
            weights[~is_there] = np.nan
        return {"y": self.array(y), "places": jnp.asarray(places), "weights": jnp.asarray(weights)}

    def places(self, rng: np.random.Generator) -> np.ndarray:
        """int32 [T, K]: where copies go; no row twice."""
        order = rng.permutation(self.tokens * self.choices)
        out, kept = order[: self.left_out], order[self.left_out :]
        places = np.empty(order.size, np.int64)
        places[kept] = rng.permutation(self.num_rows)[: kept.size]
        places[out] = np.where(np.arange(out.size) % 2, -1 - out, self.num_rows + out)
        return places.astype(np.int32).reshape(self.tokens, self.choices)

    def abstract(self) -> dict[str, Any]:
        """Shapes and types of the arrays of `make`."""
        shape = jax.ShapeDtypeStruct
        return {
            "x": shape((self.tokens, self.width), self.dtype),
            "places": shape((self.tokens, self.choices), jnp.int32),
            "channel_scale": shape((self.width,), jnp.float32) if self.channel_scale else None,
        }


_REAL: tuple[tuple[int, tuple[Tag, ...]], ...] = ((128, ("full", "bench")), (4096, ("bench",)))

CASES = (
    Case(name="plain", tokens=5, width=256, choices=2),
    Case(name="scaled", tokens=5, width=256, choices=2, channel_scale=True),
    Case(name="float32 ragged", tokens=7, width=200, choices=3, dtype="float32"),
    Case(name="below a tile", tokens=2, width=36, choices=1, channel_scale=True),
    Case(name="ue8m0", tokens=5, width=384, choices=2, quant="tile_ue8m0", channel_scale=True),
    Case(name="a scale per row", tokens=5, width=200, choices=2, quant="token"),
    Case(name="left out", tokens=9, width=256, choices=4, rows=40, left_out=11),
    Case(name="fewer rows", tokens=9, width=256, choices=4, rows=25, left_out=11),
    Case(name="two tokens", tokens=2, width=1664, choices=8),
    *(
        Case(
            name=f"deepseek-v3 t{tokens}",
            tags=tags,
            tokens=tokens,
            width=7168,
            choices=8,
            channel_scale=True,
        )
        for tokens, tags in _REAL
    ),
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
