"""`mla_decode` for Hopper (H100, H200): how it is launched, and the bf16 cache."""

import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float, Int

from pallas_kernels import hopper
from pallas_kernels.latent_cache import LatentCache
from pallas_kernels.mla_decode import scores, values
from pallas_kernels.mla_decode.block import Block
from pallas_kernels.mla_decode.combine import combine
from pallas_kernels.mla_decode.geometry import Geometry
from pallas_kernels.mla_decode.mosaic_sm90_fp8 import Fp8Block
from pallas_kernels.mla_decode.mosaic_sm90_fp8_tensor import Fp8TensorBlock
from pallas_kernels.mla_decode.plan import MlaDecodePlan, with_work
from pallas_kernels.mla_decode.tile_block import TileBlock
from pallas_kernels.mla_decode.tiles import Tiles
from pallas_kernels.mla_decode.work import TILE
from pallas_kernels.select import count_sms


class Bf16Block(TileBlock):
    """Tiles are used as they come: who has done the products of a step loads step + 2 there."""

    name = "bf16"
    slots = 3
    dtype = jnp.bfloat16

    @classmethod
    def scratch(cls, g: Geometry) -> dict[str, Any]:
        """See `TileBlock`."""
        ring = hopper.swizzled(cls.slots, TILE, g.half, dtype=cls.dtype)
        return super().scratch(g) | {"tiles": [ring, ring]}

    def staging(self, half: int) -> Any:
        """See `TileBlock`."""
        return self.refs.tiles[half]

    def fill(self, half: int) -> tuple[jax.Array, ...]:
        """See `TileBlock`."""
        self._copy(half, self.load(0), jnp.int32(0))
        self._copy(half, self.load(1), jnp.int32(1))
        return (self.load(2),)

    def refill(
        self, half: int, step: jax.Array, carry: tuple[jax.Array, ...]
    ) -> tuple[jax.Array, ...]:
        """See `TileBlock`."""
        plgpu.commit_smem()  # all four warps have done their products with the slot
        self._copy(half, carry[0], step + 2)
        return (self.load(step + 3),)

    def _copy(self, half: int, load: jax.Array, step: jax.Array) -> None:
        r, slot = self.refs, lax.rem(step, self.slots)
        rows = r.latent_pool.at[:, :, pl.ds(half * self.g.half, self.g.half)]
        to, ready = r.tiles[half].at[slot], self.signal(f"tile {half}", slot)
        self.copy_queries(half, load, step)
        self.copy_page(load, step, lambda page: plgpu.copy_gmem_to_smem(rows.at[page], to, ready))


BLOCKS: dict[str, type[Block]] = {
    "auto": Bf16Block,
    "fp8": Fp8Block,
    "fp8_tensor": Fp8TensorBlock,
}
"""By the format of the cache."""


def mla_decode(
    q_latent: Float[Array, "T H C"],
    q_rope: Float[Array, "T H P"],
    cache: LatentCache,
    layer: Int[Array, ""] | int,
    page_table: Int[Array, "B W"],
    plan: MlaDecodePlan,
    *,
    scale: float,
    tiles: Tiles | None = None,
    interpret: Any = None,
    timeline: str | None = None,
) -> tuple[jax.Array, jax.Array]:
    """See `api.mla_decode`.

    Args:
        q_latent: as there, but no NaN in a row that sees nothing beside rows that see something.
        q_rope: likewise.
        cache: as there; an fp8 latent beyond 1023 counts as less.
        layer: as there.
        page_table: not read if `plan` has `work`.
        plan: as there; `with_work` once a step saves making the list here.
        scale: as there.
        tiles: what a sweep changes.
        interpret: parameters of Pallas' GPU interpreter, for tests on a CPU.
        timeline: see `hopper.compiler_params`; `benchmarks.kernel_timeline` draws it.
    """
    heads = q_latent.shape[1]
    if plan.work is None:
        plan = with_work(plan, page_table, heads, count_sms())
    assert plan.work is not None
    g = Geometry(
        heads=heads,
        queries=plan.queries or 1,
        latent=q_latent.shape[2],
        rope=q_rope.shape[2],
        pages=cache.num_pages,
        scale=scale,
        tiles=tiles or Tiles(),
        interpret=interpret,
        timeline=timeline,
    )
    return _run(q_latent, q_rope, cache, jnp.asarray(layer, jnp.int32), plan, g)


# A jit of its own, so that all layers of an unrolled model call one function: otherwise the kernel
# is compiled for each of them.
@functools.partial(jax.jit, static_argnums=5)
def _run(
    q_latent: jax.Array,
    q_rope: jax.Array,
    cache: LatentCache,
    layer: jax.Array,
    plan: MlaDecodePlan,
    g: Geometry,
) -> tuple[jax.Array, jax.Array]:
    results = _attend(q_latent, q_rope, cache, layer, plan, g)
    assert plan.work is not None
    out, lse = combine(g, *results, plan.work.splits)
    lse = lse.reshape(-1, g.parts * TILE)[:, : g.rows]
    return out.reshape(q_latent.shape), lse.reshape(q_latent.shape[:2])


def _attend(
    q_latent: jax.Array,
    q_rope: jax.Array,
    cache: LatentCache,
    layer: jax.Array,
    plan: MlaDecodePlan,
    g: Geometry,
) -> tuple[jax.Array, jax.Array, jax.Array, jax.Array]:
    """Results as `Block` names them: out [T H, C], lse [G, parts, 64] and the same two for partial
    results. Only what the work list says is written.
    """
    work, block = plan.work, BLOCKS[cache.format]
    assert work is not None
    workers, rows = work.workers.shape[0] - 1, q_latent.shape[0] * g.heads
    operands = {
        "q_latent": _queries(q_latent, block, g),
        "q_rope": _queries(q_rope, block, g),
        "latent_pool": _pages(cache.latent),
        "rope_pool": _pages(cache.rope),
        "layer": layer[None],
        "visible": plan.visible,
        "workers": work.workers,
        "items": work.items,
        "steps": work.steps,
    }
    if cache.scale is not None:
        paged = cache.scale.ndim == 4
        operands |= {"scale_pool": _pages(cache.scale)} if paged else {"scales": cache.scale}
    results = {
        "out": ((rows, g.latent), q_latent.dtype),
        "lse": ((rows // g.rows, g.parts, TILE), jnp.float32),
        "out_parts": ((2 * workers, g.parts, TILE, g.latent), jnp.float32),
        "lse_parts": ((2 * workers, g.parts, TILE), jnp.float32),
    }

    def body(*refs: Any, **scratch: Any) -> None:
        named = dict(zip((*operands, *results), refs, strict=True))
        b = block(g, SimpleNamespace(**named, **scratch))
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup == 0)(lambda: scores.run(b))
        pl.when(warpgroup == 1)(lambda: values.run(b, 0))
        pl.when(warpgroup == 2)(lambda: values.run(b, 1))

    kernel = plgpu.kernel(
        body,
        out_type=[jax.ShapeDtypeStruct(*result) for result in results.values()],
        scratch_types=block.scratch(g),
        grid=(workers, g.parts),
        grid_names=("worker", "part"),
        num_threads=3,
        thread_name="warpgroup",
        kernel_name=f"mla_decode_{block.name}",
        compiler_params=hopper.compiler_params(
            auto_barriers=g.tiles.auto_barriers, timeline=g.timeline
        ),
        interpret=g.interpret,
    )
    return tuple(kernel(*operands.values()))


def _queries(q: jax.Array, block: type[Block], g: Geometry) -> jax.Array:
    """[T H, _]; with more rows where a group does not fill its thread blocks, if they are not read
    by copies, which know where memory ends.
    """
    q = q.reshape(-1, q.shape[-1])
    spare = 0 if block.copies_queries else -g.rows % TILE
    return jnp.pad(q, ((0, spare), (0, 0))) if spare else q


def _pages(pool: jax.Array) -> jax.Array:
    """Layers and pages in one axis: a view, where a slice of a layer would be a copy."""
    return pool.reshape(-1, *pool.shape[2:])
