"""Quantized tensors: values, scales and the block one scale stands for.

The formats are those of DeepSeek checkpoints and activations: e4m3 with a scale per 128x128 weight
block, per 1x128 activation tile, per token or per tensor; and symmetric int4 with a scale per row
and 128 inputs. Scales are *multipliers*: the real value is `values * scale` (DeepSeek calls theirs
`weight_scale_inv` all the same).
"""

import dataclasses
import typing
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

E4M3_MAX = 448.0
"""Largest finite float8_e4m3fn. JAX turns what rounds above it into NaN, so values are clipped
before every cast.
"""

MIN_AMAX = 1e-4
"""Floor of the largest magnitude in an activation tile, as in DeepSeek's `act_quant`."""

Format = Literal["e4m3", "int4"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe:
    """How a tensor [..., N, K] is quantized.

    Attributes:
        format: element format.
        block: rows and columns that share one scale; 0 means the whole extent.
        ue8m0: round scales up to a power of two (never to the nearest: that would overflow).
        floor: smallest magnitude a scale is computed from.
    """

    format: Format
    block: tuple[int, int]
    ue8m0: bool = False
    floor: float = 0.0


FP8_BLOCK = Recipe(format="e4m3", block=(128, 128))
FP8_TILE = Recipe(format="e4m3", block=(1, 128), floor=MIN_AMAX)
FP8_TILE_UE8M0 = Recipe(format="e4m3", block=(1, 128), floor=MIN_AMAX, ue8m0=True)
FP8_TOKEN = Recipe(format="e4m3", block=(1, 0), floor=MIN_AMAX)
FP8_TENSOR = Recipe(format="e4m3", block=(0, 0), floor=MIN_AMAX)
INT4_GROUP = Recipe(format="int4", block=(1, 128))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class QTensor:
    """A quantized tensor [..., N, K]; stands wherever a weight array may.

    Invariants: `scales` has the leading axes of `values` and then ceil(N / block[0]), ceil(K /
    block[1]); scales are finite fp32. Int4 values are two's complement nibbles packed along K as
    uint8 [..., N, K / 2], the even column in the low nibble.

    Attributes:
        values: float8_e4m3fn [..., N, K] or uint8 [..., N, K / 2].
        scales: float32, one multiplier per block.
        block: rows and columns per scale.
        format: element format.
    """

    values: jax.Array
    scales: jax.Array
    block: tuple[int, int] = dataclasses.field(metadata={"static": True})
    format: Format = dataclasses.field(metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., N, K]."""
        *lead, k = self.values.shape
        return (*lead, 2 * k) if self.format == "int4" else (*lead, k)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return self.values.ndim

    def __getitem__(self, index: Any) -> "QTensor":
        """Indexes leading axes; the last two belong to the blocks and stay whole."""
        if index is Ellipsis:
            return self
        return QTensor(self.values[index], self.scales[index], self.block, self.format)


Weight = jax.Array | QTensor
"""What an op accepts as a weight."""


def _scale_of(amax: jax.Array, limit: float, ue8m0: bool) -> jax.Array:
    scale = amax / limit
    # Not amax > 0: a quotient below 2^-126 is flushed to 0, and 0 / 0 is NaN.
    scale = jnp.where(scale > 0, scale, 1.0)
    if not ue8m0:
        return scale
    # 2^ceil(log2 s) from the exponent bits: log2 is off by one near powers of two.
    mantissa, exponent = jnp.frexp(scale)
    return jnp.ldexp(jnp.float32(1), jnp.where(mantissa == 0.5, exponent - 1, exponent))


def _blocks(shape: tuple[int, ...], block: tuple[int, int]) -> tuple[int, int, int, int]:
    n, k = shape[-2:]
    bn, bk = block[0] or n, block[1] or k
    return bn, bk, -(-n // bn), -(-k // bk)


def expand_scales(
    scales: Float[Array, "... nb kb"], shape: tuple[int, ...], block: tuple[int, int]
) -> jax.Array:
    """Repeats block scales to [..., N, K], cutting the last blocks where they are ragged."""
    n, k = shape[-2:]
    bn, bk, _, _ = _blocks(shape, block)
    return jnp.repeat(jnp.repeat(scales, bn, axis=-2)[..., :n, :], bk, axis=-1)[..., :k]


def quantise(x: Float[Array, "... n k"], recipe: Recipe) -> QTensor:
    """Quantizes by round-to-nearest-even with one scale per block.

    Args:
        x: [..., N, K], any float dtype; computed in fp32. N and K need not be multiples of the
            block.
        recipe: format, block and scale rounding.

    Returns:
        A QTensor with fp32 scales. A block of zeros, or of values too small for a normal
        scale, has scale 1 (or `floor`'s) and zero values.

    Raises:
        ValueError: int4 with an odd K.
    """
    x = x.astype(jnp.float32)
    bn, bk, rows, cols = _blocks(x.shape, recipe.block)
    n, k = x.shape[-2:]
    pad = [(0, 0)] * (x.ndim - 2) + [(0, rows * bn - n), (0, cols * bk - k)]
    tiles = jnp.abs(jnp.pad(x, pad)).reshape(*x.shape[:-2], rows, bn, cols, bk)
    amax = jnp.maximum(tiles.max(axis=(-3, -1)), recipe.floor)
    limit = E4M3_MAX if recipe.format == "e4m3" else 7.0
    scales = _scale_of(amax, limit, recipe.ue8m0)
    scaled = x / expand_scales(scales, x.shape, (bn, bk))
    if recipe.format == "e4m3":
        values = jnp.clip(scaled, -E4M3_MAX, E4M3_MAX).astype(jnp.float8_e4m3fn)
    else:
        values = pack_int4(jnp.clip(jnp.round(scaled), -8, 7).astype(jnp.int8))
    return QTensor(values, scales, (bn, bk), recipe.format)


def dequantise(q: Weight, dtype: Any = jnp.float32) -> jax.Array:
    """The real values [..., N, K]; an array passes through with a cast. Scaling is done in fp32,
    the cast comes last.
    """
    if not isinstance(q, QTensor):
        return q.astype(dtype)
    values = unpack_int4(q.values) if q.format == "int4" else q.values
    return (values.astype(jnp.float32) * expand_scales(q.scales, q.shape, q.block)).astype(dtype)


def pack_int4(q: jax.Array) -> jax.Array:
    """int8 [..., K] in -8..7 -> uint8 [..., K / 2], even column in the low nibble.

    Raises:
        ValueError: K is odd.
    """
    if q.shape[-1] % 2:
        raise ValueError(f"int4 packing needs an even number of columns, got {q.shape[-1]}")
    nibbles = q.astype(jnp.uint8) & 15
    return nibbles[..., ::2] | (nibbles[..., 1::2] << 4)


def unpack_int4(packed: jax.Array) -> jax.Array:
    """uint8 [..., K / 2] -> int8 [..., K]; the inverse of `pack_int4`."""
    both = (
        jnp.stack([packed & 15, packed >> 4], axis=-1)
        .reshape(*packed.shape[:-1], -1)
        .astype(jnp.int8)
    )
    return jnp.where(both > 7, both - 16, both).astype(jnp.int8)
