"""`mla_prefill` in plain JAX, in the compute dtype, a block of queries at a time so that scores
stay small.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mla_prefill.block_list import BlockList, visible
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.softmax import masked_softmax

QUERY_BLOCK = 512
"""Queries whose scores exist at one time; longer rows are walked in blocks and recomputed in the
backward pass.
"""


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
) -> tuple[jax.Array, jax.Array]:
    """See `api.mla_prefill`."""
    rows, tokens, dtype = plan.rows, q_nope.shape[0], q_nope.dtype
    used_s = plan.used_keys()
    k_nope_rshn, v_rshv = (
        jnp.where(used_s[:, None, None], x, 0).reshape(rows, -1, *x.shape[1:]) for x in (k_nope, v)
    )
    k_rope_rsp = jnp.where(used_s[:, None], k_rope, 0).reshape(rows, -1, k_rope.shape[-1])

    def attend(block: tuple[jax.Array, jax.Array, jax.Array]) -> tuple[jax.Array, jax.Array]:
        q_nope_rthn, q_rope_rthp, mask_rths = block
        scores = jnp.einsum(
            "rthn,rshn->rhts", q_nope_rthn, k_nope_rshn, preferred_element_type=jnp.float32
        )
        scores += jnp.einsum(
            "rthp,rsp->rhts", q_rope_rthp, k_rope_rsp, preferred_element_type=jnp.float32
        )
        probs, lse_rht = masked_softmax(scores * scale, mask_rths.swapaxes(1, 2))
        out = jnp.einsum(
            "rhts,rshv->rthv", probs.astype(dtype), v_rshv, preferred_element_type=jnp.float32
        )
        return out.astype(dtype), lse_rht.swapaxes(1, 2)

    queries = (
        q_nope.reshape(rows, -1, *q_nope.shape[1:]),
        q_rope.reshape(rows, -1, *q_rope.shape[1:]),
        visible(plan, blocks).swapaxes(1, 2),
    )
    per_row = tokens // rows
    if per_row <= QUERY_BLOCK or per_row % QUERY_BLOCK:
        out, lse = attend(queries)
    else:
        count = per_row // QUERY_BLOCK
        blocks = jax.tree.map(
            lambda x: x.reshape(rows, count, QUERY_BLOCK, *x.shape[2:]).swapaxes(0, 1), queries
        )
        out, lse = jax.lax.map(jax.checkpoint(attend), blocks)
        out, lse = (x.swapaxes(0, 1) for x in (out, lse))
    return out.reshape(tokens, *v.shape[1:]), lse.reshape(tokens, -1)
