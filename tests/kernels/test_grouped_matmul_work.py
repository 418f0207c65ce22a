"""The Hopper kernels' list of work for `grouped_matmul`, against what it promises, exactly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from pallas_kernels.grouped_matmul.work import ALIGN, EXPERT, FIRST, ROWS, SKIP, share_out

SIZE, MOST = 8, 40


@functools.cache
def shared_out(experts, rows, size, align=ALIGN):
    return jax.jit(functools.partial(share_out, rows=rows, size=size, align=align))


def check(work, sizes, rows, align=ALIGN):
    """Every row is stored once, by a tile of its expert that loads it, in order."""
    count, with_expert = (int(n) for n in work.counts)
    tiles = np.asarray(work.tiles)
    assert tiles.dtype == np.int32 and count <= len(tiles)
    experts = np.repeat(np.append(np.arange(len(sizes)), -1), np.append(sizes, rows - sum(sizes)))
    at = 0
    for number, tile in enumerate(tiles[:count]):
        assert 0 <= tile[FIRST] <= rows - work.size and tile[FIRST] % align == 0
        assert tile[FIRST] + tile[SKIP] == at, "rows are stored in order"
        assert 0 < tile[ROWS] <= work.size - tile[SKIP]
        stored = experts[at : at + tile[ROWS]]
        np.testing.assert_array_equal(stored, tile[EXPERT])
        assert (tile[EXPERT] >= 0) == (number < with_expert)
        at += tile[ROWS]
    assert at == rows
    padded = np.append(sizes, rows - sum(sizes))
    lead = (np.cumsum(padded) - padded) % align
    needed = -(-(lead + padded) // work.size) * (padded > 0)
    assert count == needed.sum(), "no tile more than needed"


def made(sizes, rows, size=SIZE, align=ALIGN):
    sizes = np.asarray(sizes, np.int32)
    return shared_out(len(sizes), rows, size, align)(jnp.asarray(sizes)), sizes


@given(
    st.lists(st.integers(0, MOST), min_size=5, max_size=5),
    st.sampled_from([8, 16, 128]),
    st.sampled_from([4, 8]),
)
@example([0, 0, 0, 0, 0], 8, 4)
@example([MOST] * 5, 8, 4)  # no rows past the groups
@example([1, 1, 1, 1, 1], 128, 8)
@example([0, 0, 0, 0, MOST], 16, 4)
@example([1, 7, 1, 7, 9], 8, 8)
def test_every_row_once(sizes, size, align):
    work, sizes = made(sizes, 5 * MOST, size, align)
    check(work, sizes, 5 * MOST, align)


@pytest.mark.parametrize("sizes", [[8], [0], [3], [1] * 8, [0] * 7 + [8], [1, 0] * 4])
def test_one_tile_of_rows(sizes):
    work, sizes = made(sizes, SIZE)
    check(work, sizes, SIZE)


@pytest.mark.parametrize("alone", [1, 2, 3, 5, 6, 7, 9])
@pytest.mark.parametrize(
    ("rows", "align"), [(12, 4), (64, 4), (100, 4), (16, 8), (64, 8), (104, 8)]
)
def test_there_is_room_for_all_tiles(rows, align, alone):
    """As many experts as possible with the same few rows: sizes that need the most tiles."""
    groups = min(rows // alone, 20)
    for rest in (0, rows - groups * alone):
        sizes = [alone] * groups + [0] * (20 - groups) + [rest]
        work, sizes = made(sizes, rows, align=align)
        check(work, sizes, rows, align)


BUGS = {
    "a row twice": lambda t, n: (t.at[1, SKIP].add(-1).at[1, ROWS].add(1), n),
    "a row lost": lambda t, n: (t.at[1, ROWS].add(-1), n),
    "another expert": lambda t, n: (t.at[1, EXPERT].add(1), n),
    "past the end": lambda t, n: (t.at[:, FIRST].add(t[:, SKIP]).at[:, SKIP].set(0), n),
    "copies from between": lambda t, n: (t.at[1, FIRST].add(-1).at[1, SKIP].add(1), n),
    "a tile lost": lambda t, n: (t, n.at[0].add(-1)),
    "an empty tile": lambda t, n: (jnp.insert(t, 1, t[0].at[ROWS].set(0), axis=0), n + 1),
    "a tile without expert is loaded": lambda t, n: (t, n.at[1].add(1)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_check_sees(bug):
    work, sizes = made([3, 0, 21, 5], 40)
    check(work, sizes, 40)
    tiles, counts = BUGS[bug](work.tiles, work.counts)
    with pytest.raises(AssertionError):
        check(dataclasses.replace(work, tiles=tiles, counts=counts), sizes, 40)
