"""A model with replicas computes what it computes without them; rows share replicas evenly."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import model
from dskjax.checkpoint import save_hf
from dskjax.config import ModelConfig
from dskjax.eplb import Placement
from dskjax.expert_parallel.place import experts_of, place, unplace
from dskjax.expert_parallel.replicas import physical, plan_of, tables
from dskjax.params import cast, count, initialise, named_leaves, unstack
from dskjax.quantise import quantise
from pallas_kernels.testing import assert_close, jit
from tests.parallel.common import needs_8
from tests.parallel.placed import (
    EXPERTS,
    GROUPS,
    MESHES,
    REDUNDANT,
    SLOTS,
    TOKENS,
    assert_same_bits,
    draw,
    logical,
    placed,
    plain_text,
    random_plan,
    sharding,
    small,
    text,
)
from tests.tolerances import MODEL


def plans(seed=0):
    rng = np.random.default_rng(seed)
    return {
        group: Placement.of(random_plan(rng, layers), EXPERTS) for group, layers in GROUPS.items()
    }


def outputs(params, cfg, where):
    """Logits, chosen experts of the trunk, and those of the MTP module."""

    def run(params, tokens):
        out = model.trunk(params, tokens, cfg=cfg, sharding=where)
        mtp = model.mtp_chain(params, tokens, out.hidden, cfg=cfg, depths=1, sharding=where)
        logits = [model.head(params, hidden, cfg=cfg) for hidden in (out.hidden, *mtp.hidden)]
        return logits, out.experts, mtp.experts[0]

    return jit(run)(params, jnp.asarray(TOKENS))


@functools.cache
def plain_outputs():
    return outputs(jax.device_put(logical()), small(), None)


@needs_8
@pytest.mark.parametrize("name", ["one", "ep4"])
def test_logits_and_chosen_experts_equal_those_of_the_plain_model(name):
    params, cfg = placed(name, plans())
    logits, experts, mtp_experts = outputs(params, cfg, sharding(name))
    want, want_experts, want_mtp_experts = plain_outputs()
    np.testing.assert_array_equal(experts, want_experts)
    np.testing.assert_array_equal(mtp_experts, want_mtp_experts)
    for got, expected in zip(logits, want, strict=True):
        got, expected = np.asarray(got)[:, :-1], np.asarray(expected)[:, :-1]  # h^1 ends there
        assert_close(got / np.abs(expected).max(), expected / np.abs(expected).max(), MODEL)


@needs_8
@pytest.mark.parametrize("name", [pytest.param("one", marks=pytest.mark.full), "ep8"])
def test_greedy_text_equals_that_of_the_plain_model(name):
    params, cfg = placed(name, plans())
    assert text(params, cfg, name) == plain_text()


@needs_8
@pytest.mark.parametrize(("name", "precision"), [("one", None), ("one", "fp8"), ("ep4", "w4afp8")])
def test_slots_hold_the_experts_of_the_plan_and_unplace_gives_them_back(name, precision):
    given = plans(seed=1)
    params, cfg = placed(name, given, precision)
    for group, plan in given.items():
        got, want = experts_of(params, group), experts_of(logical(precision), group)
        np.testing.assert_array_equal(plan_of(got, cfg.moe, group), plan.phy2log)
        for leaf in ("gate_up_proj", "down_proj"):
            parts = zip(jax.tree.leaves(got[leaf]), jax.tree.leaves(want[leaf]), strict=True)
            for stack, expected in parts:
                rows = np.arange(len(expected))[:, None]
                assert np.asarray(stack).tobytes() == expected[rows, plan.phy2log].tobytes()
                if name != "one":  # no device holds more than its slots
                    shard = stack.sharding.shard_shape(stack.shape)
                    assert shard[1] == SLOTS // MESHES[name]["ep"]
    where = sharding(name)
    if where is not None:
        wanted = where.params(model.param_specs(cfg), params)
        for (path, x), (_, to) in zip(named_leaves(params), named_leaves(wanted), strict=True):
            for part, at in zip(jax.tree.leaves(x), jax.tree.leaves(to), strict=True):
                assert part.sharding.is_equivalent_to(at, part.ndim), path
    back, back_cfg = unplace(params, cfg, sharding=where)
    assert back_cfg == small()
    assert_same_bits(back, logical(precision))


@needs_8
def test_logical_experts_need_not_divide():
    where = sharding("ep4")
    moe = dataclasses.replace(small().moe, n_routed_experts=14, n_group=2)
    cfg = dataclasses.replace(small(), moe=moe)
    params = draw(cfg)
    back = jax.device_put(params)
    for _ in range(2):  # from one device, then from the mesh
        out, after = place(back, cfg, redundant=2, sharding=where)
        back, _ = unplace(out, after, sharding=where)
        assert_same_bits(back, params)


@pytest.mark.parametrize("seed", range(3))
def test_rows_share_replicas_evenly(seed):
    rng = np.random.default_rng(seed)
    plan, moe = random_plan(rng, 1), dataclasses.replace(small().moe, num_redundant_experts=8)
    maps = {name: jnp.asarray(x[0]) for name, x in tables(plan, moe).items()}
    chosen = rng.permuted(np.tile(np.arange(EXPERTS, dtype=np.int32), (48, 1)), axis=1)
    chosen[rng.random(48) < 0.2, 3] = -1
    slots = np.asarray(physical(jnp.asarray(chosen), maps["replicas"], maps["replica_counts"]))
    np.testing.assert_array_equal(slots < 0, chosen < 0)
    np.testing.assert_array_equal(plan[0][slots[chosen >= 0]], chosen[chosen >= 0])
    load = np.zeros(SLOTS, int)
    for row in slots:
        for slot in row[row >= 0]:
            load[slot] += 1
    full = [e for e in range(EXPERTS) if (chosen == e).sum() == 48]  # chosen by every row
    assert len(full) > 0
    for expert in full:
        mine = load[plan[0] == expert]
        assert mine.sum() == 48
        assert mine.max() - mine.min() <= 1, mine


def test_the_default_repeats_the_first_experts():
    params, cfg = placed("one")
    want = [*range(EXPERTS), *range(REDUNDANT)]
    for group, layers in GROUPS.items():
        found = plan_of(experts_of(params, group), cfg.moe, group)
        np.testing.assert_array_equal(found, np.tile(want, (layers, 1)))


@needs_8
@pytest.mark.parametrize(
    ("redundant", "said"),
    [(3, "19 slots, which do not divide over 8 ranks; nearest: 8"), (13, "nearest: 8 or 16")],
)
def test_slots_must_divide_over_the_ranks(redundant, said):
    with pytest.raises(ValueError, match=said):
        place(logical(), small(), redundant=redundant, sharding=sharding("ep8"))


def without(expert):
    row = np.arange(SLOTS) % EXPERTS
    row[row == expert] = 0
    return row


@pytest.mark.parametrize(
    ("group", "rows", "said"),
    [
        ("moe_layers", np.tile(np.arange(SLOTS) % EXPERTS, (3, 1)), r"\(3, 24\).*\(2, 24\)"),
        ("moe_layers", np.stack([np.arange(SLOTS) % EXPERTS, without(5)]), "layer 1 holds.* 5;"),
        ("mtp_layers", np.tile(np.arange(SLOTS), (2, 1)), r"hold expert 23; ids are 0\.\.15"),
        ("dense_layers", np.zeros((2, SLOTS), int), "moe_layers, mtp_layers"),
    ],
)
def test_plans_that_do_not_fit_are_refused(group, rows, said):
    maps = np.zeros((len(rows), 1, 1), np.int32)
    plan = Placement(phy2log=rows.astype(np.int32), log2phy=maps, logcnt=maps[:, 0])
    with pytest.raises(ValueError, match=said):
        placed("one", {group: plan})


def test_what_a_placed_model_is_not_for(tmp_path):
    params, cfg = placed("one")
    with pytest.raises(ValueError, match="unplace"):
        save_hf(tmp_path / "out", params, cfg)
    assert not (tmp_path / "out").exists()
    with pytest.raises(ValueError, match=r"call dskjax.*place"):
        model.init(cfg, jax.random.key(0))
    with pytest.raises(ValueError, match="already"):
        place(params, cfg, redundant=8)
    with pytest.raises(ValueError, match="unstacked"):
        place(unstack(jax.device_put(logical())), small(), redundant=8)
    with pytest.raises(ValueError, match="no redundant experts"):
        unplace(params, small())
    with pytest.raises(ValueError, match="must not be negative"):
        dataclasses.replace(cfg.moe, num_redundant_experts=-1)
    with pytest.raises(ValueError, match="must be at least 1"):
        place(params, small(), redundant=0)
    assert cfg.to_hf() == small().to_hf()
    with pytest.raises(ValueError, match="num_redundant_experts"):
        ModelConfig.from_hf({**cfg.to_hf(), "num_redundant_experts": 8})


def test_maps_are_no_parameters():
    params, cfg = placed("one")
    specs = model.param_specs(cfg)
    maps = {"replicas", "replica_counts"}
    named = dict(named_leaves(specs))
    assert maps < {name.rpartition(".")[2] for name in named}
    assert not maps & {n.rpartition(".")[2] for n, _ in named_leaves(model.param_specs(small()))}
    experts = sum(GROUPS.values()) * 3 * 32 * 32  # of one slot in every layer
    assert count(specs) == count(model.param_specs(small())) + REDUNDANT * experts
    zeros = initialise(
        {"a": named["moe_layers.mlp.experts.replicas"]}, jax.random.key(0), "float32"
    )
    assert (zeros["a"].dtype, int(jnp.abs(zeros["a"]).max())) == (jnp.int32, 0)
    for change in (lambda p: cast(p, specs, jnp.bfloat16), lambda p: quantise(p, "fp8")):
        changed = dict(named_leaves(jax.eval_shape(change, params)))
        for name in changed:
            if name.rpartition(".")[2] in maps:
                assert changed[name].dtype == jnp.int32
