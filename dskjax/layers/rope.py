"""Rotary positions with YaRN (arXiv:2309.00071), in half-split channel order.

DeepSeek checkpoints store rotary channels interleaved (pair 2j, 2j+1). The loader reorders those
rows once with `half_split_order`; from then on channel j rotates with channel j + P/2, in weights,
activations and caches alike.
"""

import math

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from dskjax.config import RopeConfig


def inverse_frequencies(dim: int, rope: RopeConfig) -> np.ndarray:
    """Rotation speed of each channel pair, float64 [dim / 2], in radians per position.

    With YaRN, fast channels keep their speed, slow ones are divided by `factor`, and a linear ramp
    lies between the channels that turn `beta_fast` and `beta_slow` times over the original context.
    """
    plain = rope.rope_theta ** -(np.arange(0, dim, 2, dtype=np.float64) / dim)
    yarn = rope.yarn
    if yarn is None:
        return plain

    def channel(turns: float) -> float:
        return (
            dim
            * math.log(yarn.original_max_position_embeddings / (turns * 2 * math.pi))
            / (2 * math.log(rope.rope_theta))
        )

    low = max(math.floor(channel(yarn.beta_fast)), 0)
    high = min(math.ceil(channel(yarn.beta_slow)), dim - 1)
    ramp = np.clip((np.arange(dim // 2) - low) / (high - low if high != low else 1e-3), 0, 1)
    return plain * (ramp / yarn.factor + (1 - ramp))


def rope_tables(
    positions: Int[Array, " T"], dim: int, rope: RopeConfig
) -> tuple[Float[Array, "T half"], Float[Array, "T half"]]:
    """fp32 cosines and sines of each position; bf16 angles would be wrong past position 256."""
    angles = positions.astype(jnp.float32)[:, None] * jnp.asarray(
        inverse_frequencies(dim, rope), jnp.float32
    )
    factor = 1.0 if rope.yarn is None else rope.yarn.attention_factor
    return jnp.cos(angles) * factor, jnp.sin(angles) * factor


def half_split_order(dim: int) -> np.ndarray:
    """Row order that turns interleaved rotary channels into half-split ones: 0, 2, 4, ... 1, 3, 5,
    ...
    """
    return np.concatenate([np.arange(0, dim, 2), np.arange(1, dim, 2)])
