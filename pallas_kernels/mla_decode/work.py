"""Who attends to which cached rows: a balanced list of work for the persistent GPU kernels."""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int

TILE = 64
"""Cached rows that a kernel takes at once; a page of the cache. Also query rows of a thread
block.
"""
ITEM_COST = 2
"""What beginning and ending an item costs, in tiles."""
SPLIT_COST = 3
"""What a second pass over split groups costs at least, in tiles."""
PIECE_COST = 1
"""What each partial result of a group costs that pass, and who writes it, in tiles."""
SPARED = 8
"""As many workers may get nothing, if the others' shares then end where groups do, or halves of
groups.
"""
LOOK_AHEAD = 4
"""Entries after the last step that a kernel may read."""
MIN_COST = 6
"""No worker gets less than this, in tiles with `ITEM_COST`: each one adds a partial result."""


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Work:
    """Workers take items, items are runs of tiles of one group.

    A group is a run of query rows with the same pages (a sequence, or one query row of it). A
    worker is one thread block for every 64 rows (tokens x heads) of a group. Items stand in order
    of group and tile, and a worker's items are neighbours: most groups are seen by one worker, the
    others by neighbouring workers, whose partial results are combined afterwards.

    Attributes:
        workers: i32 [W + 1, 2], first item and first step of each worker.
        items: i32 [I, 6], see the column names below.
        steps: i32 [N], what a worker loads in each step: a page, or -1 - group for the queries of a
            group, which come before its pages in every item.
        splits: i32 [W, 3], the groups of several items: group (-1: none), its first partial result,
            how many there are.
    """

    workers: jax.Array
    items: jax.Array
    steps: jax.Array
    splits: jax.Array


GROUP, FIRST, TILES, WHOLE, SEEN, PARTIAL = range(6)
"""Columns of `Work.items`: group; its first tile here; tiles; how many of these (from the first on)
every query row sees whole; cached rows that some query row of the group sees; where the partial
result goes, or -1 if this is the whole result.
"""


def share_out(
    visible: Int[Array, "G Q"], pages: Int[Array, "G W"], *, row_tiles: int, sms: int
) -> Work:
    """Cuts the tiles of all groups into about equal shares.

    Of even shares for all workers and for some fewer, with cuts wherever they fall and with cuts
    moved to the nearest edge of a group, those are taken that end first, partial results included.

    Args:
        visible: cached rows each query row of a group sees; 0 or less for none.
        pages: page ids of each group; those beyond its rows may be anything.
        row_tiles: thread blocks a group needs for its query rows.
        sms: thread blocks that run at the same time.
    """
    workers = max(sms // row_tiles, 1)
    width = pages.shape[1]
    rows = jnp.clip(visible.max(axis=1), 0, width * TILE)
    tiles = jnp.maximum(-(-rows // TILE), 1)  # an empty group has a tile that nobody sees
    firsts = _starts(tiles)
    cuts = _cuts(tiles, firsts, workers)

    begins, total = jnp.concatenate([firsts[:-1], cuts[:-1]]), firsts[-1]
    begins = jnp.unique(begins, size=begins.size, fill_value=total)
    group = jnp.minimum(rank(firsts, begins, "right"), tiles.size) - 1
    first, count = begins - firsts[group], jnp.append(begins[1:], total) - begins
    seen_by_all = jnp.where(visible > 0, visible, rows[:, None]).min(axis=1) // TILE
    whole = jnp.clip(seen_by_all[group] - first, 0, count)
    split = (count > 0) & (count < tiles[group])
    partial = jnp.where(split, jnp.cumsum(split) - 1, -1)
    steps = _starts(jnp.where(count > 0, count + 1, 0))
    item = rank(begins, cuts, "left")
    return Work(
        workers=_i32(item, steps[item]),
        items=_i32(group, first, count, whole, rows[group], partial),
        steps=_loads(steps, group, first, jnp.where(rows[:, None] > 0, pages, 0)),
        splits=_splits(jnp.where(split, group, -1), partial, workers),
    )


def _starts(sizes: Int[Array, " N"]) -> Int[Array, " N+1"]:
    return jnp.concatenate([jnp.zeros(1, sizes.dtype), jnp.cumsum(sizes)])


def rank(
    ascending: Int[Array, " N"], values: Int[Array, "*M"], side: typing.Literal["left", "right"]
) -> Int[Array, "*M"]:
    """Where values would go. All are compared at once: a search is a loop of launches on a GPU."""
    return jnp.searchsorted(ascending, values, side=side, method="compare_all")


def _i32(*columns: Int[Array, " N"]) -> Int[Array, "N _"]:
    return jnp.stack(columns, axis=1).astype(jnp.int32)


def _cuts(tiles: Int[Array, " G"], firsts: Int[Array, " G+1"], workers: int) -> Int[Array, " _"]:
    """[W + 1]: the first tile of each worker, and the number of tiles."""
    costs = _starts(tiles + ITEM_COST)
    counts = workers - jnp.arange(min(SPARED, workers - 1) + 1)
    shares = jnp.maximum(-(-costs[-1] // counts), MIN_COST)
    marks = jnp.minimum(jnp.arange(workers + 1) * shares[:, None], costs[-1])
    group = rank(costs[1:-1], marks, "right")
    inside = marks - costs[group]
    exact = firsts[group] + jnp.clip(inside - ITEM_COST, 0, tiles[group])
    edge = firsts[group + (2 * inside > tiles[group] + ITEM_COST)]
    choices = jnp.concatenate([edge, exact])
    return choices[jnp.argmin(jax.vmap(_price, in_axes=(0, None))(choices, firsts))]


def _price(cuts: Int[Array, " _"], firsts: Int[Array, " _"]) -> Int[Array, ""]:
    """When the last worker ends and partial results are combined, in tiles."""
    begin, end = cuts[:-1], cuts[1:]
    first = rank(firsts, begin, "right") - 1
    last = rank(firsts, end, "left") - 1
    items = jnp.where(end > begin, last - first + 1, 0)
    opens = (end > begin) & (begin > firsts[first])  # the first item is not whole
    closes = (end > begin) & (end < firsts[jnp.minimum(last + 1, firsts.size - 1)])
    partials = opens.astype(jnp.int32) + (closes & ~(opens & (items == 1)))
    longest = (end - begin + ITEM_COST * items + PIECE_COST * partials).max()
    pieces = jnp.zeros(firsts.size, jnp.int32).at[first].add(opens).max() + 1
    return longest + jnp.where(pieces > 1, SPLIT_COST + PIECE_COST * pieces, 0)


def _loads(
    steps: jax.Array, group: Int[Array, " I"], first: Int[Array, " I"], pages: Int[Array, "G W"]
) -> Int[Array, " _"]:
    """What each step loads; `steps` are the first steps of the items."""
    step = jnp.arange(pages.size + group.size + LOOK_AHEAD)
    # Too many to compare with all; unrolled, as a loop would be a launch and a wait for each turn.
    item = jnp.searchsorted(steps, step, side="right", method="scan_unrolled") - 1
    item = jnp.minimum(item, group.size - 1)
    tile = first[item] + step - steps[item] - 1
    page = pages[group[item], jnp.clip(tile, 0, pages.shape[1] - 1)]
    load = jnp.where(step == steps[item], -1 - group[item], page)
    return jnp.where(step < steps[-1], load, -1).astype(jnp.int32)


def _splits(group: Int[Array, " I"], partial: Int[Array, " I"], size: int) -> Int[Array, "_ 3"]:
    """(group, first partial, partials) of each group that has some, then rows of -1."""
    begins = (group >= 0) & (group != jnp.append(-1, group[:-1]))
    (item,) = jnp.nonzero(begins, size=size, fill_value=-1)
    found = item >= 0
    partials = (group[None] == group[item][:, None]).sum(axis=1)
    columns = (group[item], partial[item], partials)
    return _i32(*(jnp.where(found, column, -1) for column in columns))
