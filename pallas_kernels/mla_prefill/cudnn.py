"""`mla_prefill` by cuDNN's fused attention, forward and backward, through `jax.nn`.

Rope and nope parts are put side by side and the shared rope key is copied per head; values are
padded to the width of a query head, because the public API wants one head size. cuDNN hands out its
log-sum-exp in 16 bits only, so callers that merge partial results take another implementation.
"""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from pallas_kernels.mla_prefill.block_list import BlockList
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.select import order_is_kept


def supports(
    q_nope: jax.Array,
    q_rope: jax.Array,
    k_nope: jax.Array,
    k_rope: jax.Array,
    v: jax.Array,
    plan: MlaPrefillPlan,
    *,
    with_lse: bool,
    blocks: BlockList | None = None,
) -> str | None:
    """Why cuDNN cannot take these arguments, or None."""
    width = q_nope.shape[-1] + q_rope.shape[-1]
    if jax.default_backend() != "gpu":
        return "cuDNN needs an NVIDIA GPU"
    if order_is_kept():
        return "cuDNN adds gradients in no fixed order"
    if with_lse:
        return "cuDNN returns the log-sum-exp in 16 bits only"
    if blocks is not None:
        return "cuDNN takes no list of blocks"
    if q_nope.dtype not in (jnp.bfloat16, jnp.float16):
        return f"cuDNN needs bfloat16 or float16, not {q_nope.dtype}"
    if width % 8 or width > 256 or v.shape[-1] > width:
        return f"cuDNN needs query heads of a multiple of 8 up to 256 and v no wider, not {width}"
    if (q_nope.shape[0] // plan.rows) % 2 or (k_nope.shape[0] // plan.rows) % 2:
        return "cuDNN needs an even number of queries and of keys a row"
    return None


def mla_prefill(
    q_nope: Float[Array, "T H N"],
    q_rope: Float[Array, "T H P"],
    k_nope: Float[Array, "S H N"],
    k_rope: Float[Array, "S P"],
    v: Float[Array, "S H V"],
    plan: MlaPrefillPlan,
    *,
    scale: float,
    with_lse: bool,
) -> tuple[jax.Array, None]:
    """See `api.mla_prefill`."""
    rows, heads, width = plan.rows, q_nope.shape[1], q_nope.shape[2] + q_rope.shape[2]
    used_s11 = plan.used_keys()[:, None, None]
    k_rope_shp = jnp.broadcast_to(k_rope[:, None], (k_rope.shape[0], heads, k_rope.shape[1]))
    q = jnp.concatenate([q_nope, q_rope], axis=-1)
    k = jnp.where(used_s11, jnp.concatenate([k_nope, k_rope_shp], axis=-1), 0)
    wide_v = jnp.pad(jnp.where(used_s11, v, 0), ((0, 0), (0, 0), (0, width - v.shape[-1])))
    out = jax.nn.dot_product_attention(
        *(x.reshape(rows, -1, heads, width) for x in (q, k, wide_v)),
        mask=plan.mask()[:, None],
        scale=scale,
        is_causal=plan.same_rows,
        implementation="cudnn",
    )
    out = out.reshape(-1, heads, width)[..., : v.shape[-1]]
    # A row without keys comes back as an average of what it must not see.
    return jnp.where((plan.query_seq >= 0)[:, None, None], out, 0), None
