"""Second pass of the Hopper kernels of `mla_decode`: joins partial results of split groups, in
place.

The partial result i of a row is a softmax average o_i with log-sum-exp l_i; the whole is
sum_i exp(l_i) o_i / sum_i exp(l_i). Groups that one worker did whole are not touched.
"""

from typing import Any

import jax
import jax.numpy as jnp
from jax import lax
from jax.experimental import pallas as pl
from jax.experimental.pallas import mosaic_gpu as plgpu

from pallas_kernels import hopper
from pallas_kernels.hopper import MATRIX, ROWS, by_row, row_values
from pallas_kernels.mla_decode.geometry import Geometry
from pallas_kernels.mla_decode.work import TILE

COLUMNS = 64
"""Latent columns of a thread block."""
PAIR = 2
"""Partial results that a thread block loads at one time."""


def combine(
    g: Geometry,
    out: jax.Array,
    lse: jax.Array,
    out_parts: jax.Array,
    lse_parts: jax.Array,
    splits: jax.Array,
) -> tuple[jax.Array, jax.Array]:
    """(out, lse) with the rows of split groups filled in; shapes as in `Block`.

    Args:
        g: as in the first pass.
        out: [T H, C].
        lse: fp32 [G, parts, 64].
        out_parts: fp32 [2 W, parts, 64, C].
        lse_parts: fp32 [2 W, parts, 64].
        splits: i32 [W, 3], see `Work`.
    """
    out_ref, lse_ref = jax.new_ref(out), jax.new_ref(lse)

    def body(splits: Any, out_parts: Any, lse_parts: Any, out: Any, lse: Any, staged: Any) -> None:
        split, part = lax.axis_index("split"), lax.axis_index("part")
        columns = pl.ds(lax.axis_index("column") * COLUMNS, COLUMNS)
        group, first, count = (splits[split, i] for i in range(3))

        def weigh(step: jax.Array, carry: Any) -> Any:
            """Two partial results at a time: all loads are under way before the first is used."""
            top, total, sums = carry
            one, other = PAIR * step, PAIR * step + 1
            found = [load(one), load(jnp.minimum(other, count - 1))]
            beyond = row_values(jnp.where(other < count, 0.0, -jnp.inf))
            lses = [found[0][0], found[1][0] + beyond]
            new_top = jnp.maximum(top, jnp.maximum(*lses))
            base = jnp.where(new_top == -jnp.inf, 0.0, new_top)  # no -inf - -inf
            kept = jnp.exp(top - base)
            total, sums = total * kept, sums * by_row(kept, sums)
            for part_lse, (_, values) in zip(lses, found, strict=True):
                weight = jnp.exp(part_lse - base)
                total, sums = total + weight, sums + values * by_row(weight, sums)
            return new_top, total, sums

        def load(index: jax.Array) -> tuple[jax.Array, jax.Array]:
            values = out_parts.at[first + index, part, :, columns]
            return (
                plgpu.load(lse_parts.at[first + index, part], layout=ROWS, optimized=False),
                plgpu.load(values, layout=MATRIX, optimized=False),
            )

        @pl.when(group >= 0)
        def _() -> None:
            zero = plgpu.layout_cast(jnp.zeros((TILE, COLUMNS), jnp.float32), MATRIX)
            carry = row_values(-jnp.inf), row_values(0.0), zero
            top, total, sums = lax.fori_loop(0, pl.cdiv(count, PAIR), weigh, carry)
            norm = jnp.where(total > 0, 1 / total, 0.0)
            staged[...] = (sums * by_row(norm, sums)).astype(staged.dtype)
            plgpu.commit_smem()
            g.store(staged, out.at[:, columns], group, part)

            @pl.when(lax.axis_index("column") == 0)
            def _() -> None:
                lse.at[group, part][...] = jnp.where(total > 0, top + jnp.log(total), -jnp.inf)

            plgpu.wait_smem_to_gmem(0)

    kernel = plgpu.kernel(
        body,
        scratch_types=[hopper.swizzled(TILE, COLUMNS, dtype=out.dtype)],
        grid=(splits.shape[0], g.parts, g.latent // COLUMNS),
        grid_names=("split", "part", "column"),
        num_threads=1,
        thread_name="warpgroup",
        kernel_name="mla_decode_combine",
        compiler_params=hopper.compiler_params(auto_barriers=True),
        interpret=g.interpret,
    )
    kernel(splits, out_parts, lse_parts, out_ref, lse_ref)
    return jax.freeze(out_ref), jax.freeze(lse_ref)
