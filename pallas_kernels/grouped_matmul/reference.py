"""The meaning of `grouped_matmul`, in fp32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.quant import QTensor, dequantise


def grouped_matmul(
    x: Float[Array, "M K"], w: Float[Array, "E *L K"] | QTensor, group_sizes: Int[Array, " E"]
) -> Float[Array, "M *L"]:
    """See `api.grouped_matmul`."""
    weights = dequantise(w)
    experts, *lead, k = weights.shape
    used_m1 = (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]
    x32 = jnp.where(used_m1, x.astype(jnp.float32), 0)
    flat_ekn = weights.reshape(experts, -1, k).swapaxes(1, 2)
    out = jax.lax.ragged_dot(
        x32, flat_ekn, group_sizes.astype(jnp.int32), precision=jax.lax.Precision.HIGHEST
    )
    return out.reshape(x.shape[0], *lead).astype(x.dtype)
