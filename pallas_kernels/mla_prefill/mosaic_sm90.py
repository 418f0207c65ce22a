"""`mla_prefill` for Hopper (H100, H200): bf16, heads of 128 + 64 channels and values of 128.

How it works: `block.py`.
"""

import dataclasses
import functools
from types import SimpleNamespace
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu
from jaxtyping import Array, Float

from pallas_kernels import hopper
from pallas_kernels.mla_prefill import attend, copies, gradient, xla
from pallas_kernels.mla_prefill.block import COMPUTE, ROWS_EACH, VALUE, Block, Geometry, scratch
from pallas_kernels.mla_prefill.block_list import BlockList
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.mla_prefill.tiles import Tiles
from pallas_kernels.mla_prefill.work import list_work
from pallas_kernels.select import too_large

INPUTS = ("q_nope", "q_rope", "k_nope", "k_rope", "v")
COPIED_ROWS = 8


def mla_prefill(
    q_nope: Float[Array, "T H N"],
    q_rope: Float[Array, "T H P"],
    k_nope: Float[Array, "S H N"],
    k_rope: Float[Array, "S P"],
    v: Float[Array, "S H V"],
    plan: MlaPrefillPlan,
    *,
    scale: float,
    with_lse: bool = True,
    blocks: BlockList | None = None,
    tiles: Tiles | None = None,
    interpret: Any = None,
) -> tuple[jax.Array, jax.Array | None]:
    """See `api.mla_prefill`. `plan.rows` and `plan.same_rows` say nothing that the list of work
    does not find out.

    The gradient is made by two kernels (`gradient.py`); with `blocks`, for arrays of 2**31 elements
    and more, and in the interpreter it is that of `xla.mla_prefill`, which computes the scores
    again, a block of queries at a time.

    Args:
        q_nope: as there.
        q_rope: as there.
        k_nope: as there.
        k_rope: as there.
        v: as there.
        plan: as there.
        scale: as there, positive.
        with_lse: as there.
        blocks: as there.
        tiles: what a sweep changes; its `keys` are those of `blocks`.
        interpret: parameters of Pallas' GPU interpreter, for tests on a CPU.
    """
    if tiles is None:
        keys = 128 if blocks is None else blocks.key_tile
        tiles = Tiles(keys=keys, slots=256 // keys)
    if blocks is not None and blocks.key_tile != tiles.keys:
        raise ValueError(f"{tiles.keys=} must be the {blocks.key_tile=}")
    g = Geometry(scale=scale, tiles=tiles, interpret=interpret)
    return _attend(g, with_lse, q_nope, q_rope, k_nope, k_rope, v, plan, blocks)


@functools.partial(jax.custom_vjp, nondiff_argnums=(0, 1))
def _attend(g: Geometry, with_lse: bool, *args: Any) -> tuple[jax.Array, jax.Array | None]:
    out, lse = _run(g, *args)
    return out, lse if with_lse else None


def _forward(g: Geometry, with_lse: bool, *args: Any) -> tuple[Any, Any]:
    out, lse = _run(g, *args)
    return (out, lse if with_lse else None), (args, out, lse)


def _backward(g: Geometry, with_lse: bool, saved: Any, gradients: Any) -> tuple[Any, ...]:
    (*arrays, plan, blocks), out, lse = saved
    large = too_large(*(x.shape for x in arrays))
    if g.interpret is None and blocks is None and large is None:
        found = gradient.gradients(*arrays, out, lse, *gradients, plan, scale=g.scale)
        return *found, None, None

    def run(*arrays: Any) -> tuple[jax.Array, jax.Array | None]:
        inputs: Any = dict(zip(INPUTS, arrays, strict=True))
        out, lse = xla.mla_prefill(**inputs, plan=plan, scale=g.scale, blocks=blocks)
        return out, lse if with_lse else None

    _, pull = jax.vjp(run, *arrays)
    return *pull(gradients), None, None


_attend.defvjp(_forward, _backward)


# A jit of its own, so that all layers of an unrolled model call one function: otherwise the kernel
# is compiled for each of them.
@functools.partial(jax.jit, static_argnums=0)
def _run(
    g: Geometry,
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    plan: MlaPrefillPlan,
    blocks: BlockList | None,
) -> tuple[jax.Array, jax.Array]:
    tokens, heads, _ = q_nope.shape
    work = list_work(plan, g.tiles.keys, blocks)
    operands = {
        "q_nope": _whole_rows(q_nope),
        "q_rope": _whole_rows(q_rope),
        "k_nope": _whole_rows(k_nope),
        "k_rope": _whole_rows(k_rope),
        "v": _whole_rows(v),
        **{field.name: getattr(work, field.name) for field in dataclasses.fields(work)},
    }
    query_tiles = work.counts.shape[1]
    results = {
        "out": jax.ShapeDtypeStruct((*operands["q_nope"].shape[:2], VALUE), q_nope.dtype),
        "lse": jax.ShapeDtypeStruct((heads, query_tiles, COMPUTE, ROWS_EACH), jnp.float32),
    }

    def body(*refs: Any, **shared: Any) -> None:
        named = dict(zip((*operands, *results), refs, strict=True))
        b = Block(g, SimpleNamespace(**named, **shared))
        warpgroup = lax.axis_index("warpgroup")
        pl.when(warpgroup < COMPUTE)(lambda: attend.run(b, warpgroup))
        pl.when(warpgroup == COMPUTE)(lambda: copies.run(b))

    kernel = plgpu.kernel(
        body,
        out_type=list(results.values()),
        scratch_types=scratch(g),
        grid=(heads, query_tiles),  # the last one moves fastest: neighbours share keys
        grid_names=("head", "tile"),
        num_threads=COMPUTE + 1,
        thread_name="warpgroup",
        kernel_name="mla_prefill",
        compiler_params=hopper.compiler_params(auto_barriers=False),
        interpret=g.interpret,
    )
    out, lse = kernel(*operands.values())
    return out[:tokens], lse.reshape(heads, -1)[:, :tokens].T


def _whole_rows(x: jax.Array) -> jax.Array:
    """Copies between swizzled and global memory want a multiple of 8 rows there."""
    return jnp.pad(x, ((0, -x.shape[0] % COPIED_ROWS), *[(0, 0)] * (x.ndim - 1)))
