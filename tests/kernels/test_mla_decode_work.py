"""The list of work of the Hopper kernels: everything is seen once and shares are even."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pallas_kernels.mla_decode import work
from pallas_kernels.mla_decode.work import ITEM_COST, MIN_COST, PIECE_COST, SPLIT_COST, TILE
from pallas_kernels.testing import jit

WIDTH, GROUPS, QUERIES, SMS = 6, 7, 2, 4
LONG = 20 * TILE
share_out = jit(work.share_out, static_argnames=("row_tiles", "sms"))


def shared(lens, queries=QUERIES, width=WIDTH, sms=SMS, row_tiles=1):
    """(Work as NumPy, visible, pages) of sequences with so many cached rows."""
    visible = np.asarray(lens)[:, None] - queries + 1 + np.arange(queries)
    pages = np.random.default_rng(0).integers(0, 1000, (len(lens), width))
    found = share_out(
        jnp.asarray(visible, jnp.int32),
        jnp.asarray(pages, jnp.int32),
        row_tiles=row_tiles,
        sms=sms,
    )
    return jax.tree.map(np.array, found), visible, pages


def tiles_of(length):
    return max(-(-length // TILE), 1)


def check(found, visible, pages, lens):
    """Walks the list as the kernels do."""
    seen, partials = {g: [] for g in range(len(lens))}, {g: [] for g in range(len(lens))}
    for (item, step), (end, last) in zip(found.workers[:-1], found.workers[1:], strict=True):
        for group, first, count, whole, rows, partial in found.items[item:end]:
            assert count > 0 and rows == lens[group]
            assert found.steps[step] == -1 - group
            index = np.arange(first, first + count)
            want = pages[group, index] if rows else np.zeros(count)
            np.testing.assert_array_equal(found.steps[step + 1 : step + 1 + count], want)
            limit = min(visible[group][visible[group] > 0], default=0)
            assert whole == ((index + 1) * TILE <= limit).sum()
            seen[group] += index.tolist()
            partials[group].append(partial)
            step += 1 + count
        assert step == last
    splits = {g: (first, count) for g, first, count in found.splits.tolist() if g >= 0}
    for group, length in enumerate(lens):
        assert seen[group] == list(range(tiles_of(length)))
        if len(partials[group]) == 1:
            assert partials[group] == [-1] and group not in splits
        else:
            first, count = splits[group]
            assert partials[group] == list(range(first, first + count))
    assert found.items[:, 5].max() < 2 * (len(found.workers) - 1)
    assert (found.steps[last:] == -1).all() and len(found.steps) >= last + work.LOOK_AHEAD


def shares(found):
    """Tiles of each worker, with what its items cost."""
    bounds = found.workers[:, 0]
    return [
        (found.items[a:b, 2] + ITEM_COST).sum()
        for a, b in zip(bounds[:-1], bounds[1:], strict=True)
    ]


@settings(max_examples=60)
@given(st.lists(st.integers(0, WIDTH * TILE), min_size=GROUPS, max_size=GROUPS))
def test_every_tile_is_seen_once_and_shares_are_even(lens):
    found, visible, pages = shared(lens)
    check(found, visible, pages, lens)
    even = -(-sum(tiles_of(n) + ITEM_COST for n in lens) // SMS)
    # Shares that are cut evenly begin a group twice, and no worker gets more than they cost.
    combined = SPLIT_COST + PIECE_COST * SMS
    assert max(shares(found)) <= max(even, MIN_COST) + ITEM_COST + 2 * PIECE_COST + combined


@pytest.mark.parametrize(
    ("lens", "sms"), [([384], 3), ([0] * 3, 2), ([1], 9), ([384, 0, 1, 64, 65], 1)]
)
def test_few_or_many_workers(lens, sms):
    found, visible, pages = shared(lens, sms=sms)
    check(found, visible, pages, lens)


def test_groups_are_cut_only_where_it_pays():
    assert (shared([LONG] * 8, width=20, sms=4)[0].splits[:, 0] == -1).all()  # two for each worker
    assert (shared([LONG] * 2, width=20, sms=4)[0].splits[:, 0] >= 0).sum() == 2  # half of one
    assert (shared([384] * 2, sms=4)[0].splits[:, 0] == -1).all()  # too short to be worth it


def test_fewer_workers_may_cut_groups_into_fewer_pieces():
    """32 sequences of 128 tiles: two workers each, not 66 shares that end within sequences."""
    lens = [128 * TILE] * 32
    found, visible, pages = shared(lens, width=128, sms=132, row_tiles=2)
    check(found, visible, pages, lens)
    assert (found.splits[:32, 2] == 2).all() and (found.splits[32:, 0] == -1).all()
    assert max(shares(found)) - ITEM_COST in (64, 65)


def test_whole_groups_are_taken_where_pieces_save_less_than_they_cost():
    """128 sequences for 33 workers: four each is 3 % more than an even share."""
    found, *_ = shared([64 * TILE] * 128, width=64, sms=132, row_tiles=4)
    assert (found.splits[:, 0] == -1).all() and max(shares(found)) == 4 * (64 + ITEM_COST)


def test_thread_blocks_of_a_worker_share_the_gpu():
    assert len(shared([384] * 4, sms=12, row_tiles=4)[0].workers) == 12 // 4 + 1
    assert len(shared([384] * 4, sms=12, row_tiles=40)[0].workers) == 2


@pytest.mark.parametrize(
    "damage",
    [
        lambda w: w.items.__setitem__((0, 2), w.items[0, 2] - 1),
        lambda w: w.steps.__setitem__(1, w.steps[1] + 1),
        lambda w: w.splits.__setitem__((0, 2), 1),
        lambda w: w.items.__setitem__((0, 3), w.items[0, 3] + 1),
    ],
    ids=["a tile less", "another page", "a partial less", "one more whole tile"],
)
def test_check_sees(damage):
    lens = [LONG] * 2
    found, visible, pages = shared(lens, width=20, sms=4)
    check(found, visible, pages, lens)
    damage(found)
    with pytest.raises(AssertionError):
        check(found, visible, pages, lens)
