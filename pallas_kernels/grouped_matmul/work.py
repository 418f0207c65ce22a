"""Which rows a tile of the Hopper kernels of `grouped_matmul` takes: a list made on the device."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Work:
    """Tiles of rows, in order of rows; none without a row of its own.

    A tile is `size` consecutive rows from a multiple of `align` on, see `share_out`. It loads them
    all and stores those of one expert, or zeros where rows belong to none. A tile at the very end
    begins before its own rows, so that no tile reaches past the last row.

    Attributes:
        tiles: i32 [N, 4], see the column names below; tiles of no expert come last.
        counts: i32 [2], how many tiles there are, and how many of these have an expert.
        size: rows of a tile.
    """

    tiles: jax.Array
    counts: jax.Array
    size: int = dataclasses.field(metadata={"static": True})


ALIGN = 4
"""Rows whose scales are 16 bytes: copies to shared memory begin at such addresses only."""
EXPERT, FIRST, SKIP, ROWS = range(4)
"""Columns of `Work.tiles`: the expert, -1 for none; the first row that is loaded; how many rows
from there are not stored; how many after these are.
"""


def share_out(group_sizes: Int[Array, " E"], *, rows: int, size: int, align: int = ALIGN) -> Work:
    """Cuts every group into tiles, and the rows past the groups as well.

    Args:
        group_sizes: rows of each group.
        rows: M, all rows; a multiple of `align`, at least `size`.
        size: rows of a tile; a multiple of `align`.
        align: tiles begin at multiples of it.
    """
    assert rows >= size and rows % align == size % align == 0
    sizes = group_sizes.astype(jnp.int32)
    sizes = jnp.append(sizes, rows - sizes.sum())
    groups = sizes.size
    most = (rows + min(groups, rows) * (size + align - 2)) // size
    # Comparisons with all groups: cheaper on a GPU than a scan and a binary search.
    before = jnp.arange(groups)[:, None] >= jnp.arange(groups)
    stops = jnp.where(before, sizes, 0).sum(axis=1)
    starts = stops - sizes
    aligned = starts // align * align
    tiles = jnp.where(sizes > 0, -(-(stops - aligned) // size), 0)
    ends = jnp.where(before, tiles, 0).sum(axis=1)
    number = jnp.arange(most)
    group = jnp.minimum((ends <= number[:, None]).sum(axis=1), groups - 1)
    own = aligned[group] + (number - ends[group] + tiles[group]) * size
    first = jnp.minimum(own, rows - size)
    begin = jnp.maximum(own, starts[group])
    count = jnp.maximum(jnp.minimum(own + size, stops[group]) - begin, 0)
    expert = jnp.where(group < groups - 1, group, -1)
    return Work(
        tiles=jnp.stack([expert, first, begin - first, count], axis=1).astype(jnp.int32),
        counts=jnp.stack([ends[-1], ends[-2]]).astype(jnp.int32),
        size=size,
    )
