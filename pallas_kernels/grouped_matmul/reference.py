"""The meaning of `grouped_matmul`, in fp32."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.grouped_matmul.packed_int4 import PackedInt4, unpacked
from pallas_kernels.quant import QTensor, dequantise


def grouped_matmul(
    x: Float[Array, "M K"] | QTensor,
    w: Float[Array, "E *L K"] | QTensor | PackedInt4,
    group_sizes: Int[Array, " E"],
) -> Float[Array, "M *L"]:
    """See `api.grouped_matmul`."""
    weights = dequantise(unpacked(w))
    experts, *lead, k = weights.shape
    used_m1 = (jnp.arange(x.shape[0]) < group_sizes.sum())[:, None]
    x32 = jnp.where(used_m1, dequantise(x), 0)
    flat_ekn = weights.reshape(experts, -1, k).swapaxes(1, 2)
    out = jax.lax.ragged_dot(
        x32, flat_ekn, group_sizes.astype(jnp.int32), precision=jax.lax.Precision.HIGHEST
    )
    return out.reshape(x.shape[0], *lead).astype(
        jnp.bfloat16 if isinstance(x, QTensor) else x.dtype
    )
