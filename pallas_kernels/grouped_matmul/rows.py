"""Rows of `grouped_matmul` and their work, as its Hopper kernels read them."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

from pallas_kernels.grouped_matmul.work import ALIGN, Work, share_out
from pallas_kernels.quant import QTensor


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Rows:
    """Rows in group order.

    Attributes:
        values: e4m3 [M', K], at least as many rows as a tile has.
        scales: fp32 [scales of a row, M'']: a tile's are next to each other.
        work: which rows are whose.
    """

    values: jax.Array
    scales: jax.Array
    work: Work


def prepare(x: QTensor, group_sizes: Int[Array, " E"], *, size: int, scales: int) -> Rows:
    """Puts scales in order and shares out the work.

    Args:
        x: e4m3 rows.
        group_sizes: rows of each group.
        size: rows of a tile.
        scales: how many rows' scales are copied for a tile: a multiple of `ALIGN`, at least `size`.
    """
    have = x.shape[0]
    rows = -(-max(have, size) // ALIGN) * ALIGN
    wide = rows - size + scales  # the copy of the last tile's scales ends inside
    return Rows(
        values=jnp.pad(x.values, ((0, rows - have), (0, 0))),
        scales=jnp.pad(x.scales.T, ((0, 0), (0, wide - have))),
        work=share_out(group_sizes, rows=rows, size=size),
    )
