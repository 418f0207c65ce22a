"""Placements in use: new loads move few experts, and the plan is nearly as even as a fresh one."""

import itertools
from collections import Counter

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskjax.eplb import Layout, Placement, Policy, plan, replan
from dskjax.eplb.plan import Scope, scope
from dskjax.eplb.rename import match, renamed, stay
from dskjax.eplb.replan import _keeps_groups, _mended
from tests.placements import check_valid, problems, ratio, zipf

EP32 = Layout(num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32)


def drifted(loads, by, seed=0):
    return loads * np.exp(by * np.random.default_rng(seed).standard_normal(loads.shape))


def check_moves(current, found, num_gpus):
    """The moves lead from one placement to the other, one a slot, in order, and no replica that
    stays on its GPU moves.
    """
    slots = current.phy2log.copy()
    for layer, slot, before, after in found.moves.tolist():
        assert slots[layer, slot] == before != after
        slots[layer, slot] = after
    assert np.array_equal(slots, found.placement.phy2log)
    places = [tuple(move[:2]) for move in found.moves.tolist()]
    assert places == sorted(set(places))
    old, new = (
        p.phy2log.reshape(-1, slots.shape[1] // num_gpus) for p in (current, found.placement)
    )
    kept = sum((Counter(a) & Counter(b)).total() for a, b in zip(old, new, strict=True))
    assert len(places) == slots.size - kept


@pytest.mark.parametrize(
    ("policy", "by", "part"),
    [
        (Policy.GLOBAL_REFINED, 0.05, 0.07),
        (Policy.GLOBAL_REFINED, 0.3, 0.15),
        (Policy.GLOBAL_REFINED, 1.0, 0.25),
        (Policy.HIERARCHICAL_REFINED, 0.05, 0.07),
        (Policy.HIERARCHICAL_REFINED, 0.3, 0.4),  # groups go to other nodes
        (Policy.HIERARCHICAL_REFINED, 1.0, 0.6),
    ],
)
def test_drifting_loads_move_few_experts(policy, by, part):
    """Of the moves of a fresh plan, even of one with the best names for GPUs, at most that part."""
    old = zipf(6, 256, 1.0)
    current = plan(old, EP32, policy)
    loads = drifted(old, by)
    fresh, found = plan(loads, EP32, policy), replan(current, loads, EP32, policy)
    assert (ratio(loads, found.placement, 32) <= 1.02 * ratio(loads, fresh, 32) + 1e-9).all()
    nodes = 1 if policy is Policy.GLOBAL_REFINED else 4
    slots = (p.phy2log.astype(np.int64) for p in (current, fresh))
    named = renamed(*slots, 256, 32, nodes)
    for layer in range(6):
        moves = int((found.moves[:, 0] == layer).sum())
        assert 0 <= moves < (named[layer] != current.phy2log[layer]).sum()
        assert moves < (fresh.phy2log[layer] != current.phy2log[layer]).sum()
    assert 0 < len(found.moves) <= part * (named != current.phy2log).sum()
    check_moves(current, found, 32)
    check_valid(found.placement, 256, EP32)
    if nodes > 1:
        assert _keeps_groups(found.placement.phy2log, 256, Scope(8, 4)).all()


@pytest.mark.parametrize("policy", list(Policy))
def test_unchanged_loads_move_nothing(policy):
    old = zipf(3, 256, 1.2)
    current = plan(old, EP32, policy)
    assert not len(replan(current, old, EP32, policy, tolerance=0.0).moves)
    loads = drifted(old, 0.2)
    later = replan(current, loads, EP32, policy)
    assert len(later.moves)
    assert not len(replan(later.placement, loads, EP32, policy).moves)


def test_loads_that_changed_little_are_within_the_threshold():
    old = zipf(3, 256, 1.0)
    current = plan(old, EP32)
    loads = drifted(old, 0.1)
    assert ratio(loads, current, 32).max() < 1.2
    assert len(replan(current, loads, EP32).moves)
    assert not len(replan(current, loads, EP32, threshold=1.2).moves)
    wide = replan(current, loads, EP32, tolerance=0.05)
    assert 0 < len(wide.moves) < len(replan(current, loads, EP32, tolerance=0.01).moves)


def test_new_loads_move_less_than_all():
    """Nothing of the old plan is worth keeping, except that most experts need no other GPU."""
    current = plan(zipf(4, 256, 1.5, 0), EP32)
    loads = zipf(4, 256, 1.5, 1)
    found = replan(current, loads, EP32)
    fresh = ratio(loads, plan(loads, EP32), 32)
    assert (ratio(loads, found.placement, 32) <= 1.02 * fresh + 1e-9).all()
    assert len(found.moves) / 4 < 120  # of 288
    check_moves(current, found, 32)


def test_renaming_the_fresh_plan_never_moves_less():
    layout = Layout(num_replicas=32, num_gpus=16)
    current, loads = plan(zipf(20, 24, 1.0), layout), zipf(20, 24, 1.0, seed=100)
    now, fresh = (p.phy2log.astype(np.int64) for p in (current, plan(loads, layout)))
    assert (ratio(loads, current, 16) > 2.1 * ratio(loads, plan(loads, layout), 16)).all()
    named = stay(now, renamed(now, fresh, 24, 16, 1), 16)
    found = replan(current, loads, layout)
    moves = np.bincount(found.moves[:, 0], minlength=20)
    assert (moves <= (named != now).sum(axis=1)).all() and (
        moves < (named != now).sum(axis=1)
    ).any()
    check_moves(current, found, 16)


def test_layers_without_loads_stay():
    current = plan(zipf(2, 256, 1.0), EP32)
    loads = zipf(2, 256, 1.0, seed=1)
    loads[0] = 0
    found = replan(current, loads, EP32)
    assert set(found.moves[:, 0]) == {1}


def test_groups_come_together_if_the_plan_in_use_scattered_them():
    loads = zipf(2, 256, 1.0)
    current = plan(loads, EP32)  # global
    assert not _keeps_groups(current.phy2log, 256, Scope(8, 4)).any()
    policy = Policy.HIERARCHICAL_REFINED
    found = replan(current, loads, EP32, policy)
    assert _keeps_groups(found.placement.phy2log, 256, Scope(8, 4)).all()
    fresh = ratio(loads, plan(loads, EP32, policy), 32)
    assert (ratio(loads, found.placement, 32) <= 1.02 * fresh + 1e-9).all()
    check_moves(current, found, 32)


@given(
    problems(),
    problems(),
    st.sampled_from(Policy),
    st.sampled_from([0.0, 0.02, 0.3]),
    st.none() | st.randoms(use_true_random=False),
)
def test_any_replan_is_valid_and_even_enough(problem, other, policy, tolerance, shuffle):
    loads, layout = problem
    current = plan(np.resize(other[0], loads.shape), layout, Policy.GLOBAL)
    if shuffle is not None:
        slots = current.phy2log.copy()
        for row in slots:
            shuffle.shuffle(row)
        current = Placement.of(slots, loads.shape[1])
    if policy.startswith("hierarchical") and not layout.groups_divide:
        policy = Policy.GLOBAL_REFINED
    found = replan(current, loads, layout, policy, tolerance=tolerance)
    check_valid(found.placement, loads.shape[1], layout)
    check_moves(current, found, layout.num_gpus)
    fresh = ratio(loads, plan(loads, layout, policy), layout.num_gpus)
    reached = ratio(loads, found.placement, layout.num_gpus)
    assert (reached <= (1 + tolerance) * fresh + 1e-9).all()
    assert _keeps_groups(found.placement.phy2log, loads.shape[1], scope(policy, layout)).all()


def test_a_plan_in_use_of_another_size_is_refused():
    loads = zipf(2, 256, 1.0)
    current = plan(loads, EP32)
    larger = Layout(num_replicas=320, num_gpus=32)
    with pytest.raises(
        ValueError, match=r"\(2, 256, 288\), the loads and the layout \(2, 256, 320"
    ):
        replan(current, loads, larger)
    with pytest.raises(
        ValueError, match=r"\(2, 256, 288\), the loads and the layout \(1, 256, 288"
    ):
        replan(current, loads[:1], EP32)
    for wrong in ({"tolerance": -0.1}, {"tolerance": float("nan")}, {"threshold": 0.9}):
        with pytest.raises(ValueError, match="must be 0 or more, and .* at least 1"):
            replan(current, loads, EP32, **wrong)


# ------------------------------------------------------------------ names and slots


@pytest.mark.parametrize("nodes", [1, 4])
def test_shuffled_names_are_found_again(nodes):
    now = plan(zipf(3, 64, 1.0), Layout(num_replicas=80, num_gpus=16)).phy2log.astype(np.int64)
    rng = np.random.default_rng(0)
    by_gpu = now.reshape(3, nodes, 16 // nodes, 5)
    other = np.stack([layer[rng.permutation(nodes)] for layer in by_gpu])
    other = rng.permuted(
        np.stack([layer[:, rng.permutation(16 // nodes)] for layer in other]), axis=3
    )
    other = other.reshape(now.shape)
    assert (other != now).mean() > 0.8
    assert np.array_equal(stay(now, renamed(now, other, 64, 16, nodes), 16), now)


def test_names_stay_within_the_node():
    """GPU 0 of the plan is best where GPU 3 is, on another node, with the rest of its node."""
    now = np.array([[0, 1, 2, 3]])
    assert renamed(now, np.array([[3, 2, 1, 0]]), 4, 4, 2).tolist() == [[0, 1, 2, 3]]
    assert renamed(now, np.array([[3, 0, 1, 2]]), 4, 4, 1).tolist() == [[0, 1, 2, 3]]
    split = renamed(now, np.array([[3, 0, 1, 2]]), 4, 4, 2)
    assert sorted(split[0, :2].tolist()) in ([0, 3], [1, 2]) and (split == now).sum() == 2


def test_each_of_several_replicas_on_a_gpu_counts():
    now, new = np.array([[0, 0, 1, 2]]), np.array([[0, 3, 0, 0]])
    assert renamed(now, new, 4, 2, 1).tolist() == [[0, 0, 0, 3]]


def test_matching_is_close_to_the_best():
    scores = np.random.default_rng(0).integers(0, 6, (40, 5, 5)).astype(np.float32)
    columns = match(scores)
    assert np.array_equal(np.sort(columns, axis=1), np.broadcast_to(np.arange(5), (40, 5)))
    reached = np.take_along_axis(scores, columns[:, :, None], axis=2).sum(axis=(1, 2))
    orders = np.array(list(itertools.permutations(range(5))))
    best = scores[:, np.arange(5), orders].sum(axis=2).max(axis=1)
    assert (reached <= best).all() and reached.sum() > 0.97 * best.sum()
    greedy_errs = np.array([[[5.0, 4], [4, 0]]])
    assert match(greedy_errs).tolist() == [[1, 0]]  # 4 + 4, not 5 + 0


def test_replicas_that_stay_keep_their_slots():
    now = np.array([[4, 5, 6, 4, 0, 1, 2, 3]])
    new = np.array([[4, 7, 4, 5, 3, 2, 1, 0]])
    assert stay(now, new, 2).tolist() == [[4, 5, 7, 4, 0, 1, 2, 3]]


def test_mended_slots_have_the_wanted_replicas_near_where_they_were():
    now = np.array([0, 1, 2, 1, 0, 4, 5, 3])  # 4 GPUs
    wanted = np.array([0, 1, 2, 5, 5, 4, 5, 3])
    loads = np.array([9.0, 1, 1, 1, 1, 30])
    slots = _mended(now, wanted, loads, 4, 1)
    assert sorted(slots.tolist()) == sorted(wanted.tolist())
    assert (slots != now).sum() == 2
    assert sum(5 in slots[2 * gpu : 2 * gpu + 2] for gpu in range(4)) == 3
