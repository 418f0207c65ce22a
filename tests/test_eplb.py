"""Expert placement: DeepSeek's plans to the slot, even plans, loads, and the command."""

import itertools
import json
import time
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskjax.eplb import (
    ExpertLoads,
    Layout,
    Policy,
    gpu_loads,
    imbalance,
    lower_bound,
    plain_loads,
    plan,
    rebalance_experts,
)
from dskjax.eplb.exchange import _after_spare, _after_swap, _State, separate, settle
from dskjax.eplb.greedy import balanced_packing, replicate_experts
from dskjax.eplb.plan import CLOSE
from dskjax.eplb.replan import _keeps_groups, scope
from tests.placements import check_valid, doubles, problems, ratio, zipf

# tests/eplb_vectors.json: outputs of deepseek-ai/EPLB under torch, as its "source" says.
CASES = json.loads((Path(__file__).parent / "eplb_vectors.json").read_text())["cases"]
REFINED = [Policy.GLOBAL_REFINED, Policy.HIERARCHICAL_REFINED]


# ------------------------------------------------------------------ DeepSeek's plans


@pytest.mark.parametrize("case", CASES, ids=lambda case: case["name"])
def test_plans_are_those_of_deepseek(case):
    weight = np.array(case["weight"])
    sizes = [case[name] for name in ("num_replicas", "num_groups", "num_nodes", "num_gpus")]
    found = rebalance_experts(weight, *sizes)
    for name, value in found.to_dict().items():
        assert value == case[name], name
    for loads, name in (
        (gpu_loads(weight.astype(float), found.phy2log, sizes[3]), "gpu_imbalance"),
        (plain_loads(weight.astype(float), sizes[3]), "gpu_imbalance_identity"),
    ):
        golden = case[name]
        if golden is None:
            assert loads is None
        else:
            golden = [1.0 if value is None else value for value in golden]
            np.testing.assert_allclose(imbalance(loads), golden, rtol=1e-12)
    layout = Layout(**{n: case[n] for n in ("num_replicas", "num_groups", "num_nodes", "num_gpus")})
    policy = Policy(case["policy"])
    for name in (policy, Policy.DEEPSEEK):
        assert plan(weight, layout, name).to_dict() == found.to_dict()


def test_the_vectors_tell_a_stable_sort_and_float32():
    """Else the test above would not see what it is there for."""
    assert sum(case["stable_differs"] for case in CASES) >= 8
    case = next(case for case in CASES if case["name"] == "large_ints_float32_rounding")
    exact = np.array(case["weight"])
    assert (exact.astype(np.float32) != exact).any()


def test_packing_of_one_item_a_pack_moves_nothing():
    packing = balanced_packing(np.array([[1.0, 3.0, 2.0]], np.float32), 3)
    assert packing.pack.tolist() == [[0, 1, 2]] and not packing.rank.any()


def test_61_layers_take_less_than_half_a_second():
    loads = zipf(61, 256, 1.0)
    layout = Layout(num_replicas=288, num_groups=8, num_nodes=4, num_gpus=32)

    def seconds(policy):
        begun = time.thread_time()  # of this thread alone: other processes do not count
        plan(loads, layout, policy)
        return time.thread_time() - begun

    assert min(seconds(Policy.DEEPSEEK) for _ in range(3)) < 0.5
    assert min(seconds(Policy.GLOBAL_REFINED) for _ in range(3)) < 1.0


@pytest.mark.parametrize(
    ("sizes", "message"),
    [
        ((16, 4, 2, 5), "num_replicas=16 must be a multiple of self.num_gpus=5"),
        ((18, 4, 4, 6), "num_gpus=6 must be a multiple of self.num_nodes=4"),
        ((16, 8, 2, 8), "12 experts must be a multiple of self.num_groups=8"),
        ((8, 4, 2, 8), "num_replicas=8 is less than 12 experts"),
        ((16, 0, 2, 8), "num_groups=0 must be at least 1"),
    ],
)
def test_sizes_that_do_not_fit_are_refused(sizes, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(np.ones((2, 12)), *sizes)


@pytest.mark.parametrize(
    ("loads", "message"),
    [
        (np.array([[1.0, 2.0], [3.0, -1.0]]), "layer 1, expert 1 is -1"),
        (np.array([[1.0, np.nan]]), "layer 0, expert 1 is nan"),
        (np.array([[np.inf, 1.0]]), "layer 0, expert 0 is inf"),
        (np.array([[1.0, 1e39]]), "layer 0, expert 1 is 1e"),
        (np.full((1, 2), 3e38), "layer 0, expert 0 is 3e"),
        (np.ones(2), r"float64 \(2,\)"),
        (np.ones((0, 2)), r"float64 \(0, 2\)"),
        (np.ones((1, 2), complex), "complex128"),
        (np.ones((1, 2), bool), "bool"),
    ],
)
def test_loads_that_are_none_are_refused(loads, message):
    with pytest.raises(ValueError, match=message):
        rebalance_experts(loads, 4, 1, 1, 2)


def test_hierarchical_needs_groups_that_divide():
    layout = Layout(num_replicas=16, num_groups=3, num_nodes=2, num_gpus=4)
    for policy in (Policy.HIERARCHICAL, Policy.HIERARCHICAL_REFINED):
        with pytest.raises(ValueError, match="num_groups=3 to be a multiple of num_nodes=2"):
            plan(np.ones((1, 12)), layout, policy)


# ------------------------------------------------------------------ balance


def test_imbalance_by_hand():
    slots = np.array([[0, 1, 1, 2], [0, 0, 1, 2]])
    loads = np.array([[6.0, 4.0, 2.0], [0.0, 0.0, 0.0]])
    by_gpu = gpu_loads(loads, slots, 2)
    assert by_gpu.tolist() == [[8, 4], [0, 0]]
    assert imbalance(by_gpu).tolist() == [8 / 6, 1]  # no load: nothing is uneven
    assert plain_loads(loads, 2) is None
    assert plain_loads(loads, 3).tolist() == loads.tolist()


def test_lower_bound_holds_for_every_placement():
    rng = np.random.default_rng(0)
    layout = Layout(num_replicas=6, num_gpus=3)
    for loads in rng.integers(0, 9, (12, 1, 4)):
        slots = np.array(list(itertools.product(range(4), repeat=6)))
        slots = slots[[len(set(row)) == 4 for row in slots.tolist()]]
        best = imbalance(gpu_loads(np.repeat(loads, len(slots), 0) * 1.0, slots, 3)).min()
        bound = lower_bound(loads * 1.0, layout)[0]
        assert bound <= best + 1e-12
    alone = Layout(num_replicas=6, num_gpus=6)  # 3 replicas of 10, and a mean of 33 / 6
    assert lower_bound(np.array([[30, 1, 1, 1]]), alone)[0] == pytest.approx(60 / 33)
    assert lower_bound(np.zeros((1, 4)), layout).tolist() == [1]


def test_lower_bound_of_whole_groups():
    """The heaviest group (60) shares its node with at least the lightest (1)."""
    loads = np.array([[60.0, 0, 1, 0, 9, 0, 10, 0]])
    layout = Layout(num_replicas=16, num_groups=4, num_nodes=2, num_gpus=8)
    assert lower_bound(loads, layout, hierarchical=True)[0] == pytest.approx(61 / 40)
    reached = ratio(loads, plan(loads, layout, Policy.HIERARCHICAL_REFINED), 8)[0]
    assert 61 / 40 <= reached < 1.7


# ------------------------------------------------------------------ refined plans


@pytest.mark.parametrize(("exponent", "most"), [(0.5, 1.01), (1.0, 1.05), (1.5, 1.2)])
def test_refined_plans_are_even(exponent, most):
    """32 GPUs, 256 experts, 32 spare slots: the bars, and far below them what is reached."""
    layout = Layout(num_replicas=288, num_gpus=32)
    for seed in range(3):
        loads = zipf(8, 256, exponent, seed)
        found = plan(loads, layout)
        assert ratio(loads, found, 32).max() <= min(most, 1.005)
        assert not doubles(found.phy2log, 32)
        check_valid(found, 256, layout)


@given(problems())
def test_any_plan_is_valid_and_refined_ones_are_no_worse(problem):
    loads, layout = problem
    reached = {}
    for policy in Policy:
        if policy.startswith("hierarchical") and not layout.groups_divide:
            continue
        found = plan(loads, layout, policy)
        check_valid(found, loads.shape[1], layout)
        kept = scope(policy, layout)
        assert _keeps_groups(found.phy2log, loads.shape[1], kept).all()
        reached[policy] = ratio(loads * 1.0, found, layout.num_gpus)
        bound = lower_bound(loads * 1.0, layout, hierarchical=kept.nodes > 1)
        assert (reached[policy] >= bound - 1e-12).all()
    for policy in REFINED:
        greedy = Policy(policy.removesuffix("_refined"))
        if policy in reached:
            assert (reached[policy] <= reached[greedy] * (1 + CLOSE) + 1e-12).all()


@pytest.mark.parametrize("policy", REFINED)
def test_spare_slots_are_spread_without_loads(policy):
    """DeepSeek's plan gives all of them to expert 0."""
    layout = Layout(num_replicas=24, num_groups=4, num_nodes=2, num_gpus=4)
    found = plan(np.zeros((1, 16)), layout, policy)
    assert found.logcnt.max() == 2
    assert not doubles(found.phy2log, 4)
    assert plan(np.zeros((1, 16)), layout, Policy.GLOBAL).logcnt.max() == 9


def test_a_hot_expert_has_one_replica_a_gpu():
    loads = np.zeros((1, 8))
    loads[0, 3] = 1
    layout = Layout(num_replicas=16, num_gpus=4)
    found = plan(loads, layout)
    assert ratio(loads, found, 4)[0] == 1
    assert sorted(found.logcnt[0]) == [1, 1, 2, 2, 2, 2, 2, 4]  # the rest is spread, too
    assert ratio(loads, plan(loads, layout, Policy.GLOBAL), 4)[0] > 1.3  # 9 replicas on 4 GPUs


def test_replicas_that_are_light_enough_leave_slots_to_light_experts():
    made = replicate_experts(np.array([[9.0, 4.0, 1.0]]), 6, enough=np.array([4.5]))
    assert made.count.tolist() == [[2, 1, 3]]
    capped = replicate_experts(np.array([[9.0, 4.0, 1.0]]), 6, most=2)
    assert capped.count.tolist() == [[2, 2, 2]]
    assert replicate_experts(np.array([[9.0, 4.0, 1.0]]), 6).count.tolist() == [[3, 2, 1]]


def test_groups_are_spread_better_than_heaviest_first():
    """3 + 2 + 0 and 3 + 2 + 2 by DeepSeek's packing; 3 + 3 + 0 and 2 + 2 + 2 are possible."""
    loads = np.repeat([[3.0, 3, 2, 2, 2, 0]], 2, axis=1)
    layout = Layout(num_replicas=16, num_groups=6, num_nodes=2, num_gpus=4)
    assert gpu_loads(loads, plan(loads, layout, Policy.HIERARCHICAL).phy2log, 2).max() == 14
    refined = plan(loads, layout, Policy.HIERARCHICAL_REFINED)
    assert gpu_loads(loads, refined.phy2log, 2).tolist() == [[12, 12]]


# ------------------------------------------------------------------ exchanges


@given(problems(max_layers=1), st.randoms(use_true_random=False))
def test_exchanges_do_what_is_predicted(problem, random):
    """Against carrying out every exchange: swaps exactly, spares never worse than foretold."""
    loads, layout = problem[0] * 1.0, problem[1]
    slots = plan(loads, layout, Policy.GLOBAL).phy2log.astype(np.int64)
    random.shuffle(slots[0])
    gpus, nodes = layout.num_gpus, layout.num_nodes
    state = _State.of(slots, loads, gpus, nodes)
    before = gpu_loads(loads, slots, gpus)[0]
    gpu = np.arange(slots.shape[1]) // (slots.shape[1] // gpus)
    node = gpu // (gpus // nodes)
    swap, spare = _after_swap(state)[0], _after_spare(state)[0]
    for i, mine in enumerate(state.at[0]):
        for j in range(slots.shape[1]):
            x, y = slots[0, mine], slots[0, j]
            new = slots.copy()
            new[0, j], new[0, mine] = x, y
            near = node[j] == node[mine] and gpu[j] != gpu[mine]
            single = x not in slots[0, gpu == gpu[j]]
            after = gpu_loads(loads, new, gpus)[0]
            legal = near and single and y not in slots[0, gpu == gpu[mine]]
            assert np.isfinite(swap[i, j]) == legal
            if legal:
                assert swap[i, j] == pytest.approx(max(after[gpu[mine]], after[gpu[j]]), abs=1e-9)
            new[0, mine] = x
            legal = near and single and (slots[0] == y).sum() > 1
            assert np.isfinite(spare[i, j]) == legal
            if legal:
                after = gpu_loads(loads, new, gpus)[0]
                touched = np.isin(slots[0], [x, y])
                most = after[np.unique(gpu[touched])].max()
                assert most <= spare[i, j] + 1e-9
                both = np.intersect1d(gpu[slots[0] == x], gpu[slots[0] == y])
                if not both.size and (gpu[slots[0] == x] == gpu[mine]).all():
                    assert most == pytest.approx(spare[i, j], abs=1e-9)
    settled = settle(slots, loads, gpus, np.zeros(1), num_nodes=nodes)
    assert gpu_loads(loads, settled, gpus).max() <= before.max() + 1e-9
    assert doubles(settled, gpus) <= doubles(slots, gpus)


def test_counting_moves_saves_some():
    """Against exchanges that are chosen only by what they gain."""
    old = zipf(8, 256, 1.0)
    slots = plan(old, Layout(num_replicas=288, num_gpus=32)).phy2log.astype(np.int64)
    loads = old * np.exp(0.3 * np.random.default_rng(0).standard_normal(old.shape))
    limit = 1.02 * loads.sum(axis=1) / 32
    few, any_ = (settle(slots, loads, 32, limit, origin=origin) for origin in (slots, None))
    for found in (few, any_):
        assert (gpu_loads(loads, found, 32).max(axis=1) <= limit).all()
    assert (few != slots).sum() < 0.9 * (any_ != slots).sum()


def test_settling_stops_at_the_limit_and_after_its_rounds():
    loads = zipf(2, 32, 1.0)
    slots = plan(loads, Layout(num_replicas=40, num_gpus=8), Policy.GLOBAL).phy2log
    slots = np.sort(slots.astype(np.int64), axis=1)
    fullest = gpu_loads(loads, slots, 8).max(axis=1)
    assert np.array_equal(settle(slots, loads, 8, fullest), slots)
    some = settle(slots, loads, 8, 0.8 * fullest)
    reached = gpu_loads(loads, some, 8).max(axis=1)
    assert (reached <= 0.8 * fullest).all()
    assert (gpu_loads(loads, settle(slots, loads, 8, 0 * fullest), 8).max(axis=1) < reached).all()
    once = settle(slots, loads, 8, 0.8 * fullest, rounds=1)
    assert ((once != slots).sum(axis=1) <= 2).all() and (once != slots).any(axis=1).all()


def test_doubles_are_swapped_away_within_the_node():
    slots = np.array([[0, 0, 1, 2, 3, 3, 4, 5]])
    apart = separate(slots, np.arange(1.0, 7.0)[None], 4, num_nodes=2)
    assert doubles(slots, 4) == 2 and doubles(apart, 4) == 0
    assert np.array_equal(np.sort(apart.reshape(2, 4)), np.sort(slots.reshape(2, 4)))
    lonely = np.array([[0, 0, 0, 1]])  # 3 replicas on 2 GPUs
    assert doubles(separate(lonely, np.ones((1, 2)), 2), 2) == 1


# ------------------------------------------------------------------ loads


def test_loads_are_an_exponential_mean():
    rng = np.random.default_rng(0)
    loads = ExpertLoads(2, 3, half_life=2.0)
    assert not loads.mean("decode").any()
    steps = rng.integers(0, 9, (5, 2, 3))
    for step in steps:
        loads.update("decode", step)
        loads.update("decode", np.zeros((2, 3)))  # an idle step: not one
    weights = 0.5 ** (np.arange(5)[::-1] / 2)
    expected = np.tensordot(weights / weights.sum(), steps, axes=1)
    np.testing.assert_allclose(loads.mean("decode"), expected, rtol=1e-12)
    assert loads.steps("decode") == 5
    assert loads.steps("prefill") == 0 and not loads.mean("prefill").any()
    loads.update("prefill", steps[0])
    np.testing.assert_allclose(loads.mean("prefill"), steps[0], rtol=1e-12)
    np.testing.assert_allclose(loads.mean("decode"), expected, rtol=1e-12)


def test_loads_of_long_half_lives_are_plain_means():
    loads = ExpertLoads(1, 2, half_life=1e9)
    for count in range(5):
        loads.update("prefill", np.array([[count, 2.0]]))
    np.testing.assert_allclose(loads.mean("prefill"), [[2, 2]], rtol=1e-6)


def test_counts_that_are_none_are_refused():
    loads = ExpertLoads(2, 3)
    with pytest.raises(ValueError, match=r"counts are \(3, 2\); expected .* \(2, 3\)"):
        loads.update("decode", np.ones((3, 2)))
    with pytest.raises(ValueError, match="layer 0, expert 0 is -1"):
        loads.update("decode", -np.ones((2, 3)))
    assert loads.steps("decode") == 0
    for arguments in ((0, 3, 1.0), (2, 0, 1.0), (2, 3, 0.0), (2, 3, np.inf)):
        with pytest.raises(ValueError, match="must be positive"):
            ExpertLoads(arguments[0], arguments[1], half_life=arguments[2])
