"""Workloads of `norm_rope_cache`: every format of the cache, rows without a place, DeepSeek's
sizes.
"""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.latent_cache import Format, LatentCache
from pallas_kernels.quant import FP8_TILE, quantise
from pallas_kernels.testing.generate import BaseCase, normal, tagged


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """Rows of new tokens.

    Attributes:
        rows: T.
        queries: Q; None: queries are not compressed.
        latent: C.
        rope: P.
        kv: format of the cache.
        layers: of the pool; the one in the middle is written.
        pages: of the pool.
        page: slots of a page.
        absent: share of rows without a page.
    """

    rows: int
    queries: int | None = 192
    latent: int = 256
    rope: int = 16
    kv: Format = "auto"
    layers: int = 3
    pages: int = 5
    page: int = 8
    absent: float = 0.3

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `norm_rope_cache`. Poisoned: NaN all over the pool, and in a row without a
        page; the others would be seen there.
        """
        rng = self.rng(seed)
        angles = rng.uniform(0, 7, (self.rows, self.rope // 2)).astype(np.float32)
        places = rng.permutation(self.pages * self.page)[: self.rows]
        pages = places // self.page
        absent = rng.random(self.rows) < self.absent
        pages[absent] = np.resize([-1, self.pages, -(2**31), 2**31 - 1], absent.sum())
        kv = normal(rng, self.rows, self.latent + self.rope)
        kv *= np.exp(rng.uniform(-3, 3, (self.rows, 1))).astype(np.float32)
        if poison:
            kv[np.flatnonzero(absent)[2:3]] = np.nan
        q = None if self.queries is None else self.array(normal(rng, self.rows, self.queries))
        return {
            "q": q,
            "q_weight": None if q is None else self.array(normal(rng, q.shape[1])),
            "kv": self.array(kv),
            "kv_weight": self.array(normal(rng, self.latent)),
            "tables": (jnp.asarray(np.cos(angles)), jnp.asarray(np.sin(angles))),
            "cache": self._cache(rng, np.nan if poison else 1.0),
            "layer": self.layers // 2,
            "pages": jnp.asarray(pages, jnp.int32),
            "slots": jnp.asarray(places % self.page, jnp.int32),
            "eps": 1e-6,
        }

    def _cache(self, rng: np.random.Generator, factor: float) -> LatentCache:
        shape = self.layers, self.pages, self.page
        latent, rope = (
            self.array(normal(rng, *shape, size) * factor) for size in (self.latent, self.rope)
        )
        if self.kv == "auto":
            return LatentCache(latent, rope)
        if self.kv == "fp8":
            made = quantise(latent, FP8_TILE)
            return LatentCache(made.values, rope, made.scales)
        scales = jnp.asarray(2.0 ** -np.arange(self.layers, dtype=np.float32))
        e4m3 = jnp.float8_e4m3fn
        return LatentCache(latent.astype(e4m3), rope.astype(e4m3), scales)

    def abstract(self) -> dict[str, Any]:
        """Shapes and types of `make`'s arguments; layer and eps as they are."""
        arrays = jax.eval_shape(self._zeros)
        return {name: arrays.get(name, value) for name, value in self._order().items()}

    def _order(self) -> dict[str, Any]:
        """The op's arguments, those that are no arrays with their values."""
        names = ("q", "q_weight", "kv", "kv_weight", "tables", "cache")
        static = {"layer": self.layers // 2, "pages": None, "slots": None, "eps": 1e-6}
        return dict.fromkeys(names) | static

    def _zeros(self) -> dict[str, Any]:
        def array(*shape: int, dtype: Any = self.dtype) -> jax.Array:
            return jnp.zeros(shape, dtype)

        pool, queries = (self.layers, self.pages, self.page), self.queries
        scale = {
            "auto": None,
            "fp8": array(*pool, -(-self.latent // 128), dtype=jnp.float32),
            "fp8_tensor": array(self.layers, dtype=jnp.float32),
        }[self.kv]
        of_latent = self.dtype if self.kv == "auto" else jnp.float8_e4m3fn
        of_rope = jnp.float8_e4m3fn if self.kv == "fp8_tensor" else self.dtype
        latent = array(*pool, self.latent, dtype=of_latent)
        table = array(self.rows, self.rope // 2, dtype=jnp.float32)
        place = array(self.rows, dtype=jnp.int32)
        return {
            "q": None if queries is None else array(self.rows, queries),
            "q_weight": None if queries is None else array(queries),
            "kv": array(self.rows, self.latent + self.rope),
            "kv_weight": array(self.latent),
            "tables": (table, table),
            "cache": LatentCache(latent, array(*pool, self.rope, dtype=of_rope), scale),
            "pages": place,
            "slots": place,
        }


_HALF: dict[str, Any] = {"dtype": "bfloat16"}
_V3: dict[str, Any] = {
    "tags": ("bench",),
    "queries": 1536,
    "latent": 512,
    "rope": 64,
    "page": 64,
    "absent": 0.0,
    **_HALF,
}

CASES = (
    Case(name="float32", rows=9),
    Case(name="float32 fp8", rows=9, kv="fp8"),
    Case(name="bfloat16", rows=9, **_HALF),
    Case(name="one row", rows=1, absent=0.0, **_HALF),
    Case(name="no place", rows=5, absent=1.0, **_HALF),
    Case(name="queries not compressed", rows=9, queries=None, **_HALF),
    Case(name="ragged", rows=9, queries=40, latent=160, rope=6, **_HALF),
    Case(name="fp8", rows=9, kv="fp8", **_HALF),
    Case(name="fp8 ragged", rows=9, latent=160, kv="fp8", **_HALF),
    Case(name="fp8_tensor", rows=9, kv="fp8_tensor", **_HALF),
    *(
        Case(name=f"deepseek-v3 t{rows} {kv}", rows=rows, kv=kv, pages=8 * rows, layers=4, **_V3)
        for rows in (1, 128, 256)
        for kv in ("auto", "fp8", "fp8_tensor")
    ),
    Case(name="deepseek-v3 t4096 auto", rows=4096, pages=4096, layers=4, **_V3),
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
