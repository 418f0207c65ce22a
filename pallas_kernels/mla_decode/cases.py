"""Workloads of `mla_decode`: small ones with every kind of edge, and DeepSeek's shapes."""

import dataclasses
from typing import Any, Literal

import jax.numpy as jnp
import numpy as np

from pallas_kernels.latent_cache import LatentCache
from pallas_kernels.mla_decode.plan import plan_mla_decode
from pallas_kernels.quant import FP8_TILE, quantise
from pallas_kernels.testing.generate import (
    BaseCase,
    normal,
    page_table,
    starts_of,
    tagged,
    used_slots,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """A ragged decode batch.

    Attributes:
        lens: cached rows of each sequence, the new ones included; 0 is an idle sequence.
        queries: query rows of each sequence; if more than its cached rows, the first see nothing.
        uniform: say in the plan that all sequences have equally many rows.
        padding: query rows past the last sequence.
        heads: H.
        latent: C.
        rope: P.
        page_size: tokens a page.
        layers: layers of the pool; the op is asked for the last but one (the last of one).
        width: columns of the page table; one more than needed when None.
        num_pages: pages of the pool; two more than needed when None.
        kv: "auto" stores latents in the compute dtype, "fp8" as e4m3 with a scale per token and
            128 channels.
    """

    lens: tuple[int, ...]
    queries: tuple[int, ...]
    uniform: bool = False
    padding: int = 0
    heads: int = 3
    latent: int = 32
    rope: int = 8
    page_size: int = 16
    layers: int = 3
    width: int | None = None
    num_pages: int | None = None
    kv: Literal["auto", "fp8"] = "auto"

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `mla_decode`; NaN or garbage in everything it may not use when poisoned."""
        rng = self.rng(seed)
        pages = [-(-length // self.page_size) for length in self.lens]
        num_pages = self.num_pages or sum(pages) + 2
        width = self.width or max(pages) + 1
        table = page_table(
            rng, self.lens, self.page_size, width=width, num_pages=num_pages, poison=poison
        )
        layer = max(self.layers - 2, 0)
        latent = normal(rng, self.layers, num_pages, self.page_size, self.latent)
        rope = normal(rng, self.layers, num_pages, self.page_size, self.rope)
        tokens = sum(self.queries)
        q_latent = normal(rng, tokens + self.padding, self.heads, self.latent)
        q_rope = normal(rng, tokens + self.padding, self.heads, self.rope)
        if poison:
            unused = ~used_slots(table, self.lens, self.page_size, num_pages)
            for pool in (latent, rope):
                pool[:, unused] = np.nan
                pool[np.arange(self.layers) != layer] = np.nan
            q_latent[tokens:], q_rope[tokens:] = np.nan, np.nan
        lens = jnp.asarray(self.lens, jnp.int32)
        starts = jnp.asarray(starts_of(self.queries))
        return {
            "q_latent": self.array(q_latent),
            "q_rope": self.array(q_rope),
            "cache": self._cache(latent, rope),
            "layer": layer,
            "page_table": jnp.asarray(table),
            "cached_lens": lens,
            "query_starts": starts,
            "plan": plan_mla_decode(lens, starts, tokens, queries=self.queries[0])
            if self.uniform
            else None,
            "scale": 1.5 * (self.latent + self.rope) ** -0.5,
        }

    def _cache(self, latent: np.ndarray, rope: np.ndarray) -> LatentCache:
        if self.kv == "auto":
            return LatentCache(self.array(latent), self.array(rope))
        q = quantise(jnp.asarray(latent), FP8_TILE)
        return LatentCache(q.values, self.array(rope), q.scales)


def _deepseek_v3(
    name: str, *, lens: tuple[int, ...], queries: int, kv: Literal["auto", "fp8"] = "auto"
) -> Case:
    return Case(
        name=f"deepseek-v3 {name}",
        tags=("bench",),
        dtype="bfloat16",
        lens=lens,
        queries=(queries,) * len(lens),
        uniform=True,
        heads=128,
        latent=512,
        rope=64,
        page_size=64,
        layers=1,
        kv=kv,
    )


# The CI cases share as many shapes as they can: compiling takes longer than running them.
_EDGES: dict[str, Any] = {"queries": (1,) * 7, "page_size": 64, "width": 3, "num_pages": 10}
_MIXED: dict[str, Any] = {"page_size": 4, "padding": 3, "width": 10, "num_pages": 56}

CASES = (
    Case(name="one token", lens=(1,), queries=(1,), page_size=4),
    Case(name="page edges", lens=(1, 2, 63, 64, 65, 0, 128), **_EDGES),
    Case(name="idle rows only", lens=(0, 0, 0, 0, 0, 0, 128), **_EDGES),
    Case(name="mixed", lens=(7, 0, 12, 33, 4, 6), queries=(1, 2, 3, 4, 5, 6), **_MIXED),
    Case(name="mixed with gaps", lens=(9, 5, 0, 36, 2, 1), queries=(0, 2, 0, 6, 6, 7), **_MIXED),
    Case(name="verify", lens=(17, 2, 0, 48), queries=(3,) * 4, uniform=True),
    Case(name="bfloat16", lens=(1, 40, 65), queries=(2,) * 3, uniform=True, dtype="bfloat16"),
    Case(name="fp8", lens=(5, 33, 16), queries=(1, 4, 2), latent=160, kv="fp8"),
    Case(
        name="fp8 bfloat16",
        lens=(5, 33, 16),
        queries=(2,) * 3,
        uniform=True,
        latent=160,
        kv="fp8",
        dtype="bfloat16",
    ),
    Case(
        name="real heads",
        tags=("full",),
        lens=(1, 64, 65, 300, 0),
        queries=(3,) * 5,
        uniform=True,
        heads=128,
        latent=512,
        rope=64,
        page_size=64,
        dtype="bfloat16",
    ),
    _deepseek_v3("b1 kv32768", lens=(32768,), queries=1),
    _deepseek_v3("b128 kv4096 q1", lens=(4096,) * 128, queries=1),
    _deepseek_v3("b128 kv4096 q2", lens=(4096,) * 128, queries=2),
    _deepseek_v3("b128 kv4096 q3", lens=(4096,) * 128, queries=3),
    _deepseek_v3("b128 kv4096 q1 fp8", lens=(4096,) * 128, queries=1, kv="fp8"),
    _deepseek_v3(
        "b64 kv256-16384", lens=tuple(256 * (1 + i % 64) for i in range(0, 512, 8)), queries=1
    ),
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
