"""Experts move between slots while a model serves: bits stay, text stays, nothing is recompiled."""

import dataclasses

import jax
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskjax.expert_parallel import rebalance
from dskjax.expert_parallel.fetch import Owners, fetch, store
from dskjax.expert_parallel.place import experts_of, unplace, with_experts
from dskjax.expert_parallel.rebalance import Rebalancer, check, moves, plans_of
from dskjax.expert_parallel.replicas import tables
from dskjax.params import named_leaves
from pallas_kernels.testing import assert_close
from serve.programs import CompileCounter
from tests.parallel.common import needs_8
from tests.parallel.placed import (
    EXPERTS,
    GROUPS,
    SLOTS,
    assert_same_bits,
    logical,
    logits,
    placed,
    plain_text,
    random_plan,
    sharding,
    small,
    text,
)
from tests.tolerances import MODEL


def hot_plan(rank: int, ranks: int) -> np.ndarray:
    """Expert 0 fills the redundant slots and its own, none of which is on one rank."""
    mine = np.arange(SLOTS) // (SLOTS // ranks) == rank
    row = np.zeros(SLOTS, int)
    row[mine] = np.arange(1, 1 + mine.sum())
    rest = np.arange(1 + mine.sum(), EXPERTS)
    row[np.flatnonzero(~mine)[: len(rest)]] = rest
    return row


@given(st.integers(0, 2**32), st.sampled_from([1, 2, 4, 8]))
def test_moves_are_what_differs_from_a_near_source(seed, ranks):
    old, new = random_plan(np.random.default_rng(seed), 2)
    found, size = moves(old, new, ranks=ranks), SLOTS // ranks
    np.testing.assert_array_equal(found[:, 0], np.flatnonzero(old != new))
    for slot, source in found:
        assert old[source] == new[slot]
        own = old[slot // size * size : (slot // size + 1) * size]
        assert (source // size == slot // size) == (new[slot] in own)


def test_replicas_of_a_hot_expert_come_from_different_ranks():
    old = np.array([0, 1, 0, 2, 3, 4, 5, 6])
    new = np.array([0, 1, 0, 2, 3, 0, 5, 0])
    assert moves(old, old, ranks=4).shape == (0, 2)
    assert moves(old, new, ranks=4).tolist() == [[5, 0], [7, 2]]


@needs_8
def test_text_and_bits_stay_through_a_sequence_of_plans():
    name, rng = "ep4", np.random.default_rng(0)
    params, cfg = placed(name)
    where = sharding(name)
    mover = Rebalancer(params, cfg, where)
    assert text(params, cfg, name) == plain_text()
    plans = [
        ("moe_layers", 0, random_plan(rng, 1)[0]),
        ("mtp_layers", 0, random_plan(rng, 1)[0]),
        ("moe_layers", 1, hot_plan(0, 4)),
        ("moe_layers", 1, hot_plan(2, 4)),
        ("moe_layers", 0, hot_plan(1, 4)),
    ]
    rank_2 = slice(2 * SLOTS // 4, 3 * SLOTS // 4)  # the fourth plan takes the hot expert from it
    assert 0 in plans[2][2][rank_2]
    assert 0 not in plans[3][2][rank_2]
    compiled = None
    for step, (group, layer, row) in enumerate(plans):
        pending = mover.fetch(params, group, layer, row)
        if step == 2:  # steps between fetch and commit
            check(params, cfg, where)
            assert text(params, cfg, name) == plain_text()
        old = params
        params = mover.commit(params, pending)
        check(params, cfg, where)
        assert text(params, cfg, name) == plain_text()
        np.testing.assert_array_equal(plans_of(params, cfg)[group][layer], row)
        np.testing.assert_array_equal(mover.placement(group).phy2log[layer], row)
        written = {f"{group}.{leaf}" for leaf, _ in named_leaves(old[group]) if ".experts." in leaf}
        now = dict(named_leaves(params))
        for leaf, value in named_leaves(old):
            if leaf not in written:
                assert now[leaf] is value
            elif leaf.endswith("_proj"):  # a tiny map may have been copied
                assert value.is_deleted()
        if step == 0:  # every program has run once
            compiled = CompileCounter()
    assert compiled is not None
    assert compiled.count == 0
    assert mover.fetch(params, "moe_layers", 1, plans[3][2]) is None
    assert_same_bits(unplace(params, cfg, sharding=where)[0], logical())


@needs_8
@pytest.mark.parametrize(("name", "precision"), [("ep8", "w4afp8"), ("one", "fp8")])
def test_quantised_experts_move_with_their_scales(name, precision):
    params, cfg = placed(name, precision=precision)
    where, rng = sharding(name), np.random.default_rng(1)
    mover = Rebalancer(params, cfg, where)
    before = logits(params, cfg, name) if name == "one" else None
    for group, layers in GROUPS.items():
        for layer, row in enumerate(random_plan(rng, layers)):
            params = mover.commit(params, mover.fetch(params, group, layer, row))
            check(params, cfg, where)
    if before is not None:
        assert_close(logits(params, cfg, name), before, MODEL)
    assert_same_bits(unplace(params, cfg, sharding=where)[0], logical(precision))


def moved(params, cfg, row):
    mover = Rebalancer(params, cfg)
    return mover.commit(params, mover.fetch(params, "moe_layers", 1, row))


def test_a_wrong_source_is_seen(monkeypatch):
    params, cfg = placed("one")
    row = np.arange(SLOTS) % EXPERTS
    row[20] = 2  # expert 2 gets a third slot; it was in 2 and 18
    monkeypatch.setattr(rebalance, "moves", lambda old, new, ranks: np.array([[20, 3]]))
    params = moved(params, cfg, row)
    with pytest.raises(ValueError, match="moe_layers layer 1: slots 2 and 20 both hold expert 2,"):
        check(params, cfg)


@pytest.mark.parametrize("precision", ["fp8", "w4afp8"])
def test_forgotten_scales_are_seen(monkeypatch, precision):
    params, cfg = placed("one", precision=precision)
    real = rebalance._fetch

    def without_scales(params, cfg, group, layer, source, owners):
        buffer = real(params, cfg, group, layer, source, owners)
        old = experts_of(params, group)["down_proj"].scales[layer]
        return buffer | {"down_proj": dataclasses.replace(buffer["down_proj"], scales=old)}

    with monkeypatch.context() as patch:
        patch.setattr(rebalance, "_fetch", without_scales)
        row = np.arange(SLOTS) % EXPERTS
        row[20] = 2
        params = moved(params, cfg, row)
    with pytest.raises(ValueError, match="slots 2 and 20 both hold expert 2,"):
        check(params, cfg)


def test_maps_before_weights_are_seen():
    params, cfg = placed("one")
    want = logits(params, cfg, "one")
    row = hot_plan(0, 4)
    maps = {name: x[0] for name, x in tables(row[None], cfg.moe).items()}
    experts = experts_of(params, "moe_layers")
    early = {name: experts[name].at[1].set(maps[name]) for name in maps}
    params = with_experts(params, "moe_layers", experts | early)
    with pytest.raises(ValueError, match="moe_layers layer 1: slots .* both hold expert 0,"):
        check(params, cfg)
    assert np.abs(logits(params, cfg, "one") - want).max() > 0.1


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda x: x.at[1, 3, 0].set(4), "layer 1 name slot 3 0 times"),
        (lambda x: x.at[0, 5, 0].set(-1), "layer 0 name slot"),
    ],
)
def test_maps_that_contradict_are_seen(change, said):
    params, cfg = placed("one")
    experts = experts_of(params, "moe_layers")
    broken = with_experts(params, "moe_layers", experts | {"replicas": change(experts["replicas"])})
    for look in (check, Rebalancer, unplace):
        with pytest.raises(ValueError, match=said):
            look(broken, cfg)


def test_what_cannot_be_committed():
    params, cfg = placed("one")
    mover = Rebalancer(params, cfg)
    row = np.arange(SLOTS) % EXPERTS
    with pytest.raises(ValueError, match="moe_layers layer 1: no slot of layer 0 holds expert 7"):
        mover.fetch(params, "moe_layers", 1, np.where(row == 7, 0, row))
    with pytest.raises(ValueError, match=r"\(1, 24\)"):
        mover.fetch(params, "moe_layers", 1, row[:-1])
    late = mover.fetch(params, "moe_layers", 1, np.roll(row, 1))
    params = mover.commit(params, mover.fetch(params, "moe_layers", 1, np.roll(row, 2)))
    with pytest.raises(ValueError, match="layer 1 was committed after this fetch"):
        mover.commit(params, late)
    check(params, cfg)
    with pytest.raises(ValueError, match="no redundant experts"):
        Rebalancer(params, small())


@needs_8
@pytest.mark.parametrize("name", ["ep4", "ep8"])
def test_a_move_needs_one_layer_of_memory_and_gathers_nothing(name):
    params, cfg = placed(name)
    owners = Owners(sharding(name))
    stack = rebalance._weights(params, "moe_layers")
    routes = owners.routes(np.arange(SLOTS)[::-1], SLOTS)
    how = {"owners": owners, "cfg": cfg}
    shards = [x.sharding.shard_shape(x.shape) for x in jax.tree.leaves(stack)]
    layer = sum(4 * np.prod(shape[1:]) for shape in shards)  # bytes on one device
    got = fetch.lower(stack, 0, routes, slots=SLOTS, **how).compile()
    assert "all-gather" not in got.as_text()
    assert got.memory_analysis().output_size_in_bytes == pytest.approx(layer, rel=0.01)
    assert got.memory_analysis().temp_size_in_bytes < layer
    buffer = fetch(stack, 0, routes, slots=SLOTS, **how)
    put = store.lower(stack, 0, buffer, **how).compile().memory_analysis()
    assert put.alias_size_in_bytes == GROUPS["moe_layers"] * layer
    assert put.temp_size_in_bytes < layer / 10
