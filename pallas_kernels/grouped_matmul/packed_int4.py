"""Int4 weights packed once, offline, for the Hopper kernel of `grouped_matmul`.

A tile of 64 outputs by 128 inputs is 4096 consecutive bytes, so that copies are long, and a thread
finds what it multiplies in two reads of 16 bytes, in the order in which `wgmma` takes the left
operand from registers.

The e4m3 bytes 0x00 to 0x08 mean 0 to 8 times 2^-9. So a weight w is kept as a sign bit and as three
bits n, and four bytes of e4m3 are made at once, by a mask. With weights of -7 to 7, as rounding to
nearest makes them, n is |w|. Where there are -8 as well, as other quantizers make them, n of a
negative weight is -w - 1, and the signs are added after the mask: more instructions, which show
from 128 rows an expert on.

A word holds two such quadruples: byte j of the first has its sign in bit 7 of byte j, n in bits
0-2; byte j of the second has its sign in bit 3 of byte j, n in bits 4-6 of byte j - 1, where a
rotation by four bits brings it to the places of the first.
"""

import dataclasses
import typing
from typing import Any

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels.quant import INT4_GROUP, QTensor, pack_int4, unpack_int4

OUTPUTS, INPUTS = 64, 128
"""Of a tile."""
UNIT = 2.0**-9
"""Weight 1 as e4m3 by `as_e4m3`."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class PackedInt4:
    """Int4 weights [..., N, K] with a scale per output and 128 inputs, in tiles.

    Attributes:
        words: int32 [..., N / 64, K / 128, 8, 128].
        scales: float32 [..., N / 64, K / 128, 64].
        full_range: weights may be -8.
    """

    words: jax.Array
    scales: jax.Array
    full_range: bool = dataclasses.field(default=True, metadata={"static": True})

    @property
    def shape(self) -> tuple[int, ...]:
        """Logical shape [..., N, K]."""
        *lead, n, k, _, _ = self.words.shape
        return (*lead, n * OUTPUTS, k * INPUTS)

    @property
    def ndim(self) -> int:
        """Number of logical axes."""
        return self.words.ndim - 2

    def __getitem__(self, index: Any) -> "PackedInt4":
        """Indexes leading axes; the last two lie in tiles and stay whole."""
        if index is Ellipsis:
            return self
        return PackedInt4(self.words[index], self.scales[index], self.full_range)


def pack(w: QTensor, *, full_range: bool = True) -> PackedInt4:
    """Rearranges int4 weights [..., N, K] with a scale per output and 128 inputs; exact.

    Args:
        w: the weights.
        full_range: see `PackedInt4`; without it a -8 would become 0. `has_lowest` looks for one.

    Raises:
        ValueError: another format, or N is no multiple of 64, or K none of 128.
    """
    if (w.format, w.block) != (INT4_GROUP.format, INT4_GROUP.block):
        raise ValueError(f"pack takes int4 with blocks of (1, 128), not {w.format} of {w.block}")
    *lead, outputs, inputs = w.shape
    if outputs % OUTPUTS or inputs % INPUTS:
        raise ValueError(
            f"pack takes multiples of {OUTPUTS} outputs and {INPUTS} inputs, not {outputs} and "
            f"{inputs}"
        )
    n, k = outputs // OUTPUTS, inputs // INPUTS
    values = unpack_int4(w.values).astype(jnp.int32)
    sign = (values < 0).astype(jnp.int32)
    # Outputs: tile, warp, half h, g. Inputs: tile, product i, quadruple, lane q, byte j.
    parts = values ^ -sign if full_range else jnp.abs(values) & 7, sign
    magnitude, sign = (a.reshape(*lead, n, 4, 2, 8, k, 4, 2, 4, 4) for a in parts)
    j = jnp.arange(4)
    words = jnp.sum(
        (sign[..., 0, :, :] << (8 * j + 7))
        | (magnitude[..., 0, :, :] << (8 * j))
        | (sign[..., 1, :, :] << (8 * j + 3))
        | (magnitude[..., 1, :, :] << (8 * ((j + 3) % 4) + 4)),
        axis=-1,
        dtype=jnp.int32,
    )  # [..., n, warp, h, g, k, i, q]; no two bits meet, so that a sum is a union
    words = _move(words, len(lead), (0, 4, 2, 1, 3, 6, 5))
    scales = w.scales.reshape(*lead, n, OUTPUTS, k)
    words = words.reshape(*lead, n, k, 8, 128)
    return PackedInt4(words, _move(scales, len(lead), (0, 2, 1)), full_range)


@jax.jit
def has_lowest(w: QTensor) -> jax.Array:
    """Whether an int4 weight is -8."""
    low, high = (w.values & 15) == 8, (w.values >> 4) == 8
    return (low | high).any()


def unpack(w: PackedInt4) -> QTensor:
    """The inverse of `pack`."""
    *lead, n, k, _, _ = w.words.shape
    both = as_e4m3(w.words, w.full_range)
    quadruples = jnp.stack([_bytes(a) for a in both], axis=-2)  # [..., quadruple, j]
    values = jnp.where(quadruples & 0x80, -(quadruples & 0x7F), quadruples)
    # [..., n, k, h, warp, g, q, i, quadruple, j]
    values = values.reshape(*lead, n, k, 2, 4, 8, 4, 4, 2, 4)
    values = _move(values, len(lead), (0, 3, 2, 4, 1, 6, 7, 5, 8))
    values = values.reshape(*lead, n * OUTPUTS, k * INPUTS).astype(jnp.int8)
    scales = _move(w.scales, len(lead), (0, 2, 1)).reshape(*lead, n * OUTPUTS, k)
    return QTensor(pack_int4(values), scales, INT4_GROUP.block, INT4_GROUP.format)


def unpacked(w: Any) -> Any:
    """`w` as it was before `pack`."""
    return unpack(w) if isinstance(w, PackedInt4) else w


def as_e4m3(words: jax.Array, full_range: bool) -> tuple[jax.Array, jax.Array]:
    """The two quadruples of each word as four bytes of e4m3, weight 1 being `UNIT`."""
    # The compilers know rotations and three-operand logic when they see them.
    rotated = (words << 4) | lax.shift_right_logical(words, jnp.int32(28))
    first, second = (_signed(quadruple, full_range) for quadruple in (words, rotated))
    return first, second


def _signed(quadruple: jax.Array, full_range: bool) -> jax.Array:
    masked = quadruple & _bits(0x87878787)
    if not full_range:
        return masked
    return masked + lax.shift_right_logical(quadruple & _bits(0x80808080), jnp.int32(7))


def as_matrix(first: jax.Array, second: jax.Array) -> jax.Array:
    """What the results of `as_e4m3` mean to `wgmma`: e4m3 [64, 128] of int32 [8, 128] twice."""
    both = jnp.stack([first, second], axis=-1).reshape(2, 4, 8, 4, 4, 2)  # h, warp, g, q, i
    values = lax.bitcast_convert_type(both, jnp.float8_e4m3fn)
    return values.transpose(1, 0, 2, 4, 5, 3, 6).reshape(OUTPUTS, INPUTS)


def _bits(value: int) -> jax.Array:
    return jnp.int32(value - 2**32)


def _bytes(words: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(words, jnp.uint8).astype(jnp.int32)


def _move(array: jax.Array, lead: int, order: tuple[int, ...]) -> jax.Array:
    """Transposes the axes after `lead` ones."""
    return array.transpose(*range(lead), *(lead + axis for axis in order))
