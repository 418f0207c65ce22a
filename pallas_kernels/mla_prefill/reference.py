"""The meaning of `mla_prefill`, in fp32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mla_prefill.block_list import BlockList, visible
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.softmax import masked_softmax


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
    rows, tokens = plan.rows, q_nope.shape[0]

    def split(x: jax.Array) -> jax.Array:
        return x.astype(jnp.float32).reshape(rows, -1, *x.shape[1:])

    used_s = plan.used_keys()
    k_nope, v = (jnp.where(used_s[:, None, None], x, 0) for x in (k_nope, v))
    k_rope = jnp.where(used_s[:, None], k_rope, 0)
    scores_rhts = jnp.einsum("rthn,rshn->rhts", split(q_nope), split(k_nope), precision="highest")
    scores_rhts += jnp.einsum("rthp,rsp->rhts", split(q_rope), split(k_rope), precision="highest")
    probs_rhts, lse_rht = masked_softmax(scores_rhts * scale, visible(plan, blocks))
    out_rthv = jnp.einsum("rhts,rshv->rthv", probs_rhts, split(v), precision="highest")
    out = out_rthv.reshape(tokens, *out_rthv.shape[2:]).astype(q_nope.dtype)
    return out, lse_rht.swapaxes(1, 2).reshape(tokens, -1)
