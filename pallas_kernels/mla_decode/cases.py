"""Workloads of `mla_decode`: small ones with every kind of edge, and DeepSeek's shapes."""

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.latent_cache import Format, LatentCache
from pallas_kernels.mla_decode.plan import plan_mla_decode
from pallas_kernels.quant import E4M3_MAX, FP8_TILE, quantise
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
        kv: format of the cache. Queries for "fp8_tensor" are such as e4m3 holds exactly with a
            scale for each row, so that kernels which round them have no more error than others.
        sharpness: what the queries are multiplied with; a large one makes softmax almost one-hot,
            and maxima that grow from page to page.
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
    kv: Format = "auto"
    sharpness: float = 1.0

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `mla_decode`; NaN or garbage in everything it may not use when poisoned."""
        rng = self.rng(seed)
        width, num_pages = self.table
        table = page_table(
            rng, self.lens, self.page_size, width=width, num_pages=num_pages, poison=poison
        )
        layer = max(self.layers - 2, 0)
        latent = normal(rng, self.layers, num_pages, self.page_size, self.latent)
        rope = normal(rng, self.layers, num_pages, self.page_size, self.rope)
        tokens = sum(self.queries)
        sharpness = np.float32(self.sharpness)
        q_latent = sharpness * normal(rng, tokens + self.padding, self.heads, self.latent)
        q_rope = sharpness * normal(rng, tokens + self.padding, self.heads, self.rope)
        if self.kv == "fp8_tensor":
            rounded = in_e4m3(q_latent, q_rope, 3.5 * self.sharpness)
            q_latent, q_rope = (np.array(q) for q in rounded)
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
            "scale": self.scale,
        }

    def abstract(self) -> dict[str, Any]:
        """Shapes and types of `make`'s arguments, the layer traced and without a plan."""
        tokens, sequences = sum(self.queries) + self.padding, len(self.lens)
        width, num_pages = self.table
        fp8 = None if self.kv == "auto" else jnp.float8_e4m3fn
        scales: dict[str, tuple[int, ...]] = {
            "fp8": (self.layers, num_pages, self.page_size, -(-self.latent // 128)),
            "fp8_tensor": (self.layers,),
        }
        shape: Any = jax.ShapeDtypeStruct

        def pool(channels: int, dtype: Any) -> Any:
            return shape((self.layers, num_pages, self.page_size, channels), dtype)

        return {
            "q_latent": shape((tokens, self.heads, self.latent), self.dtype),
            "q_rope": shape((tokens, self.heads, self.rope), self.dtype),
            "cache": LatentCache(
                pool(self.latent, fp8 or self.dtype),
                pool(self.rope, fp8 if self.kv == "fp8_tensor" else self.dtype),
                None if fp8 is None else shape(scales[self.kv], jnp.float32),
            ),
            "layer": shape((), jnp.int32),
            "page_table": shape((sequences, width), jnp.int32),
            "cached_lens": shape((sequences,), jnp.int32),
            "query_starts": shape((sequences + 1,), jnp.int32),
        }

    @property
    def scale(self) -> float:
        """Softmax scale."""
        return 1.5 * (self.latent + self.rope) ** -0.5

    @property
    def table(self) -> tuple[int, int]:
        """Columns of the page table and pages of the pool."""
        pages = [-(-length // self.page_size) for length in self.lens]
        return self.width or max(pages) + 1, self.num_pages or sum(pages) + 2

    def _cache(self, latent: np.ndarray, rope: np.ndarray) -> LatentCache:
        if self.kv == "auto":
            return LatentCache(self.array(latent), self.array(rope))
        if self.kv == "fp8_tensor":  # a scale that some values are too large for
            scale = jnp.asarray(2.0 ** (np.arange(self.layers) % 3 - 7), jnp.float32)
            return LatentCache(_with_scale(latent, scale), _with_scale(rope, scale), scale)
        q = quantise(jnp.asarray(latent), FP8_TILE)
        return LatentCache(q.values, self.array(rope), q.scales)


@jax.jit
def _with_scale(pool: jax.Array, scale: jax.Array) -> jax.Array:
    """NaN stays NaN."""
    scaled = jnp.clip(pool / scale[:, None, None, None], -E4M3_MAX, E4M3_MAX)
    return scaled.astype(jnp.float8_e4m3fn)


def in_e4m3(
    q_latent: np.ndarray | jax.Array, q_rope: np.ndarray | jax.Array, largest: float
) -> tuple[jax.Array, jax.Array]:
    """Queries that e4m3 holds exactly with a scale for each row: every row has the number
    `largest`, the others are e4m3 in units of largest / 448; every third head is an eighth of that.
    """
    unit = largest / E4M3_MAX
    latent, rope = (
        jnp.clip(q / unit, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn).astype(jnp.float32) * unit
        for q in (q_latent, q_rope)
    )
    latent = latent.at[..., 1].set(largest)
    return latent.at[:, ::3].divide(8), rope.at[:, ::3].divide(8)


def _bench(
    name: str,
    *,
    lens: tuple[int, ...],
    queries: int,
    heads: int = 128,
    kv: Format = "auto",
) -> Case:
    return Case(
        name=name,
        tags=("bench",),
        dtype="bfloat16",
        lens=lens,
        queries=(queries,) * len(lens),
        uniform=True,
        heads=heads,
        latent=512,
        rope=64,
        page_size=64,
        layers=1,
        kv=kv,
    )


def _even(batch: int, length: int, queries: int, **sizes: Any) -> Case:
    extra = "".join(f" {v} heads" if k == "heads" else f" {v}" for k, v in sizes.items())
    name = f"b{batch} kv{length} q{queries}{extra}"
    return _bench(name, lens=(length,) * batch, queries=queries, **sizes)


def _varied(kv: Format) -> Case:
    """128 sequences of normal lengths, 3917 on the average."""
    lens = np.random.default_rng(150).normal(4096, 2048, 128).clip(64, None).astype(int)
    name = f"b128 kv{lens.min()}-{lens.max()} q1" + ("" if kv == "auto" else f" {kv}")
    return _bench(name, lens=tuple(map(int, lens)), queries=1, kv=kv)


# The CI cases share as many shapes as they can: compiling takes longer than running them.
_EDGES: dict[str, Any] = {"queries": (1,) * 7, "page_size": 64, "width": 3, "num_pages": 10}
_MIXED: dict[str, Any] = {"page_size": 4, "padding": 3, "width": 10, "num_pages": 56}

# What the Hopper kernels take; other implementations run them too.
_HOPPER_SIZES: dict[str, Any] = {
    "heads": 64,
    "latent": 128,
    "rope": 64,
    "page_size": 64,
    "layers": 2,
    "dtype": "bfloat16",
}
_HOPPER = tuple(
    Case(name=f"hopper {name}", **{**_HOPPER_SIZES, **sizes})
    for name, sizes in {
        "edges": {"lens": (1, 63, 64, 65, 0, 200), "queries": (1,) * 6, "uniform": True},
        "128 heads": {
            "lens": (900, 77, 1),
            "queries": (1,) * 3,
            "uniform": True,
            "heads": 128,
            "sharpness": 4.0,
        },
        "verify": {
            "lens": (300, 77, 2, 64, 0, 130),
            "queries": (3,) * 6,
            "uniform": True,
            "heads": 16,
            "sharpness": 4.0,
        },
        "six": {
            "tags": ("full",),
            "lens": (3, 133, 900),
            "queries": (6,) * 3,
            "uniform": True,
            "latent": 256,
        },
        "ragged": {"lens": (70, 0, 9, 129), "queries": (1, 2, 3, 2), "heads": 32, "padding": 3},
        "real": {
            "tags": ("full",),
            "lens": (513, 64, 0, 190),
            "queries": (2,) * 4,
            "uniform": True,
            "heads": 128,
            "latent": 512,
            "sharpness": 4.0,
        },
        "real fp8": {
            "tags": ("full",),
            "lens": (190, 400),
            "queries": (1,) * 2,
            "uniform": True,
            "heads": 128,
            "latent": 512,
            "kv": "fp8",
            "sharpness": 4.0,
        },
        "fp8": {
            "lens": (65, 0, 2, 700),
            "queries": (2,) * 4,
            "uniform": True,
            "latent": 256,
            "kv": "fp8",
        },
        "fp8 tensor": {
            "lens": (65, 0, 2, 700),
            "queries": (2,) * 4,
            "uniform": True,
            "latent": 256,
            "kv": "fp8_tensor",
        },
        "fp8 tensor ragged": {
            "lens": (70, 0, 9, 129),
            "queries": (1, 2, 3, 2),
            "heads": 32,
            "padding": 3,
            "kv": "fp8_tensor",
            "sharpness": 4.0,
        },
        "real fp8 tensor": {
            "tags": ("full",),
            "lens": (513, 64, 0, 190),
            "queries": (1,) * 4,
            "uniform": True,
            "heads": 128,
            "latent": 512,
            "kv": "fp8_tensor",
            "sharpness": 4.0,
        },
        "six fp8 tensor": {
            "tags": ("full",),
            "lens": (3, 133, 900),
            "queries": (6,) * 3,
            "uniform": True,
            "heads": 16,
            "latent": 384,
            "kv": "fp8_tensor",
        },
        "fp8 peaked": {
            "tags": ("full",),
            "lens": (200, 64, 140),
            "queries": (1,) * 3,
            "uniform": True,
            "kv": "fp8",
            "sharpness": 4.0,
        },
    }.items()
)

CASES = (
    Case(name="one token", lens=(1,), queries=(1,), page_size=4),
    Case(name="page edges", lens=(1, 2, 63, 64, 65, 0, 128), **_EDGES),
    Case(name="idle rows only", lens=(0, 0, 0, 0, 0, 0, 128), **_EDGES),
    Case(name="mixed", lens=(7, 0, 12, 33, 4, 6), queries=(1, 2, 3, 4, 5, 6), **_MIXED),
    Case(name="mixed with gaps", lens=(9, 5, 0, 36, 2, 1), queries=(0, 2, 0, 6, 6, 7), **_MIXED),
    Case(name="verify", lens=(17, 2, 0, 48), queries=(3,) * 4, uniform=True),
    Case(name="bfloat16", lens=(1, 40, 65), queries=(2,) * 3, uniform=True, dtype="bfloat16"),
    Case(name="fp8", lens=(5, 33, 16), queries=(1, 4, 2), latent=160, kv="fp8"),
    Case(name="fp8 tensor", lens=(5, 33, 16), queries=(1, 4, 2), latent=160, kv="fp8_tensor"),
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
    *_HOPPER,
    # 128 heads: DeepSeek-V3; 64: Kimi-K2, or V3 in two-way tensor parallelism; 16: V2-Lite, or V3
    # in eight-way.
    _even(1, 32768, 1),
    *(_even(32, 8192, q) for q in (1, 2)),
    *(_even(128, 4096, q) for q in (1, 2, 3, 4)),
    *(_even(256, 1024, q) for q in (1, 2)),
    _bench(
        "b64 kv256-16384 q1", lens=tuple(256 * (1 + i % 64) for i in range(0, 512, 8)), queries=1
    ),
    *(_even(128, 4096, q, kv="fp8") for q in (1, 2)),
    _even(32, 8192, 1, kv="fp8"),
    _even(256, 1024, 1, kv="fp8"),
    *(_even(128, 4096, q, kv="fp8_tensor") for q in (1, 2)),
    _even(32, 8192, 1, kv="fp8_tensor"),
    _even(256, 1024, 1, kv="fp8_tensor"),
    *(_varied(kv) for kv in ("auto", "fp8", "fp8_tensor")),
    *(_even(128, 4096, q, heads=64) for q in (1, 2)),
    _even(128, 4096, 1, heads=16),
    _even(128, 4096, 4, heads=16),
    _even(128, 4096, 1, heads=16, kv="fp8"),
    _even(128, 4096, 1, heads=16, kv="fp8_tensor"),
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
