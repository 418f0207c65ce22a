"""The training step: what it learns, what it leaves alone, and that the mesh does not matter."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.axes import Sharding
from dskjax.mesh import make_mesh, preset
from dskjax.model import param_specs
from dskjax.params import named_leaves
from serve.programs import CompileCounter
from tests.train_mtp import toy
from train_mtp import optim
from train_mtp.state import TrainState, abstract_state, state_shardings
from train_mtp.step import (
    eval_step,
    init_state,
    place_batch,
    train_step,
)

pytestmark = pytest.mark.usefixtures("quick_compiler")

RECIPE = toy.recipe()
SPECS = param_specs(RECIPE.cfg)
BIAS = optim.ROUTER_BIAS
BATCH = toy.batch()


@pytest.fixture(scope="module")
def quick_compiler():
    with toy.quick_compiler():
        yield


def start(recipe=RECIPE, seed=0) -> TrainState:
    """A state with NumPy's random weights: compiling `init_state` takes longer than a step."""
    rng = np.random.default_rng(seed)

    def fill(path, leaf):
        shape, name = leaf.shape, jax.tree_util.keystr(path)
        if leaf.dtype == jnp.int32 or "opt_state" in name or BIAS in name:
            value = np.zeros(shape, leaf.dtype)
        elif "norm" in name:
            value = np.ones(shape, np.float32)
        else:
            value = rng.normal(size=shape).astype(np.float32) * 0.1
        return jax.device_put(value, leaf.sharding)

    return jax.tree_util.tree_map_with_path(fill, abstract_state(recipe))


def copy(tree):
    return jax.tree.map(lambda leaf: np.array(leaf), tree)


def biases(params):
    return np.concatenate(
        [
            params["moe_layers"]["mlp"]["gate"][BIAS],
            params["mtp_layers"]["block"]["mlp"]["gate"][BIAS],
        ]
    )


@pytest.fixture(scope="module")
def first(quick_compiler):
    """State before and after the first step, and its metrics, on the host."""
    state = start()
    before = copy(state)
    state, metrics = train_step(state, place_batch(BATCH, RECIPE.sharding), recipe=RECIPE)
    return before, copy(state), copy(metrics)


def test_step_counts_and_reports(first):
    before, after, metrics = first
    assert (before.step, after.step) == (0, 1)
    assert metrics["mtp_loss"].shape == metrics["mtp_top1"].shape == (1,)
    np.testing.assert_allclose(
        metrics["total_loss"], metrics["loss"] + 0.3 * metrics["mtp_loss"][0], rtol=1e-6
    )
    assert metrics["lr"] == RECIPE.optimizer.schedule(0) > 0
    assert metrics["max_vio"] >= metrics["mean_max_vio"] > 0


def test_every_weight_gets_a_gradient_in_every_layer_but_the_router_bias(first):
    _, after, _ = first
    moments = after.opt_state[1].mu  # (1 - beta1) times the gradient after one step
    names = {name for name, _ in named_leaves(SPECS)}
    got = {name: leaf for name, leaf in named_leaves(moments) if leaf is not None}
    assert names - set(got) == {name for name in names if name.endswith(BIAS)} != set()
    assert any(name.startswith("mtp_layers.") for name in got)
    for name, leaf in got.items():
        assert np.isfinite(leaf).all(), name
        if "layers." in name:
            assert all(np.abs(layer).max() > 0 for layer in leaf), name
        else:
            assert np.abs(leaf).max() > 0, name


def test_router_bias_follows_the_load_and_nothing_else(first):
    before, after, _ = first
    sums = eval_step(start().params, place_batch(BATCH, RECIPE.sharding), recipe=RECIPE)
    loads = np.concatenate([sums.loads["moe_layers"], sums.loads["mtp_layers"]])
    rate = np.float32(RECIPE.bias_update_rate)
    expected = np.sign(loads.mean(axis=1, keepdims=True) - loads) * rate
    assert np.abs(expected).max() > 0
    np.testing.assert_array_equal(biases(after.params), biases(before.params) + expected)


def test_bias_rule_by_hand():
    loads = {
        "moe_layers": jnp.array([[4, 0, 2, 2], [1, 1, 1, 1]]),
        "mtp_layers": jnp.array([[0, 0, 0, 7]]),
    }
    gate = lambda rows: {BIAS: jnp.full((rows, 4), 0.5), "weight": jnp.zeros(())}  # noqa: E731
    params = {
        "moe_layers": {"mlp": {"gate": gate(2), "x": 1}, "norm": 2},
        "mtp_layers": {"block": {"mlp": {"gate": gate(1)}}},
    }
    out = optim.update_router_biases(params, loads, 0.25)
    trunk = out["moe_layers"]["mlp"]["gate"][BIAS].tolist()
    assert trunk == [[0.25, 0.75, 0.5, 0.5], [0.5] * 4]  # at the mean: stays
    assert out["mtp_layers"]["block"]["mlp"]["gate"][BIAS].tolist() == [[0.75, 0.75, 0.75, 0.25]]
    assert (out["moe_layers"]["norm"], out["moe_layers"]["mlp"]["x"]) == (2, 1)
    assert optim.update_router_biases(params, loads, 0.0) is params
    no_bias = {"moe_layers": {"mlp": {"gate": {"weight": jnp.zeros(())}}}}
    assert optim.update_router_biases(no_bias, {"moe_layers": loads["moe_layers"]}, 0.25) == no_bias
    np.testing.assert_allclose(optim.max_violation(loads["moe_layers"]), [1.0, 0.0])


def test_weight_decay_takes_matrices_only():
    decayed = {name for name, spec in named_leaves(SPECS) if optim.is_decayed(spec)}
    assert "lm_head.weight" in decayed and "moe_layers.mlp.gate.weight" in decayed
    assert {"moe_layers.mlp.experts.down_proj", "mtp_layers.eh_proj"} <= decayed
    spared = {name for name, _ in named_leaves(SPECS)} - decayed
    assert all("norm" in n or n == "embed_tokens.weight" or n.endswith(BIAS) for n in spared), (
        spared
    )
    # The chain does what the mask says: with zero gradients only decayed weights move.
    ones = jax.tree.map(
        lambda s: jnp.ones(()), RECIPE.split(SPECS)[0], is_leaf=lambda s: hasattr(s, "axes")
    )
    tx = RECIPE.transformation()
    updates, _ = tx.update(jax.tree.map(jnp.zeros_like, ones), tx.init(ones), ones)
    moved = {name for name, u in named_leaves(updates) if u is not None and float(u) != 0}
    assert moved == decayed


def test_schedule_warms_up_and_ends_at_the_floor():
    adam = optim.AdamW(lr=1.0, warmup=4, steps=13, min_lr_ratio=0.2)
    rates = [float(adam.schedule(step)) for step in range(15)]
    np.testing.assert_allclose(rates[:5], [0.25, 0.5, 0.75, 1, 1])
    np.testing.assert_allclose(rates[8], 0.6, rtol=1e-6)  # half way down
    np.testing.assert_allclose(rates[12:], 0.2, rtol=1e-6)
    assert float(optim.AdamW(lr=1.0, warmup=0, steps=1).schedule(0)) == 1


def test_toy_is_learned():
    state = start()
    batch = place_batch(BATCH, RECIPE.sharding)
    for _ in range(30):
        state, metrics = train_step(state, batch, recipe=RECIPE)
    assert metrics["loss"] < 0.5 and metrics["mtp_loss"][0] < 1.0, metrics
    assert metrics["top1"] > 0.8


def test_bfloat16_step_is_near_the_fp32_one(first):
    _, _, expected = first
    recipe = toy.recipe(precision="bfloat16", remat="dots_saveable")
    state, metrics = train_step(start(recipe), place_batch(BATCH, recipe.sharding), recipe=recipe)
    # bf16 has 8 bits, and a token now and then goes to another expert.
    np.testing.assert_allclose(metrics["loss"], expected["loss"], rtol=1e-2)
    np.testing.assert_allclose(metrics["mtp_loss"], expected["mtp_loss"], rtol=1e-2)
    np.testing.assert_allclose(metrics["grad_norm"], expected["grad_norm"], rtol=0.1)
    assert all(leaf.dtype in (jnp.float32, jnp.int32) for leaf in jax.tree.leaves(state))


LAYOUTS = [  # rules and mesh; the first two in every run
    ("data", {"dp": 8}),
    ("train", {"dp": 2, "ep": 2, "tp": 2}),
    ("train", {"ep": 8}),
    ("train", {"dp": 2, "ep": 4}),
    ("train", {"ep": 4, "tp": 2}),
    ("train", {"dp": 4, "tp": 2}),
    ("fsdp", {"dp": 4, "ep": 2}),
    ("tensor", {"tp": 2}),
]


def sharded(name: str, sizes: dict[str, int]) -> Sharding:
    devices = jax.devices()[: int(np.prod(list(sizes.values())))]
    return preset(name, make_mesh(**sizes, devices=devices))


def id_of(layout) -> str:
    name, sizes = layout
    return "-".join([name, *(f"{axis}{size}" for axis, size in sizes.items())])


@pytest.mark.parametrize(
    "layout",
    [*LAYOUTS[:2], *(pytest.param(one, marks=pytest.mark.full) for one in LAYOUTS[2:])],
    ids=id_of,
)
def test_sharded_step_equals_the_unsharded_one(first, layout):
    _, expected, expected_metrics = first
    recipe = dataclasses.replace(RECIPE, sharding=sharded(*layout))
    state = start(recipe)
    split = [leaf for leaf in jax.tree.leaves(state) if not leaf.sharding.is_fully_replicated]
    assert bool(split) == (layout[0] != "data")
    state, metrics = train_step(state, place_batch(BATCH, recipe.sharding), recipe=recipe)
    for leaf, where in zip(
        jax.tree.leaves(state), jax.tree.leaves(state_shardings(recipe)), strict=True
    ):
        assert leaf.sharding.is_equivalent_to(where, leaf.ndim)
    close = lambda a, b: np.testing.assert_allclose(a, b, rtol=1e-5, atol=1e-5)  # noqa: E731
    jax.tree.map(close, copy(metrics), expected_metrics)
    jax.tree.map(close, copy(state.opt_state[1]), expected.opt_state[1])
    np.testing.assert_array_equal(biases(copy(state.params)), biases(expected.params))
    # Adam's first step is the sign of the gradient: where that is rounding noise, weights differ.
    clear = jax.tree.map(lambda mu: np.abs(mu) > 1e-6, expected.opt_state[1].mu)
    train, reference = (RECIPE.split(tree)[0] for tree in (copy(state.params), expected.params))
    jax.tree.map(lambda where, a, b: close(a[where], b[where]), clear, train, reference)


def test_seeds_share_the_program_of_the_first_weights_and_no_weight():
    first, compiled = init_state(RECIPE, 2), CompileCounter()
    second = jax.block_until_ready(init_state(RECIPE, 7))
    assert compiled.count == 0
    ours, others = (dict(named_leaves(state.params)) for state in (first, second))
    for name, spec in named_leaves(SPECS):
        drawn = spec.init not in ("zeros", "ones")
        assert drawn == bool(np.any(ours[name] != others[name])), name


@pytest.mark.full
def test_initial_state_is_the_same_on_any_mesh():
    one = init_state(RECIPE, 3)
    assert one.step == 0 and not any(map(np.any, jax.tree.leaves(copy(one.opt_state))))
    many = init_state(dataclasses.replace(RECIPE, sharding=sharded(*LAYOUTS[1])), 3)
    jax.tree.map(np.testing.assert_array_equal, copy(one), copy(many))
    for name, spec in named_leaves(SPECS):
        if spec.init == "normal":
            leaf = dict(named_leaves(one.params))[name]
            assert 0.3 < np.std(leaf) * spec.shape[-1] ** 0.5 < 0.7, name
