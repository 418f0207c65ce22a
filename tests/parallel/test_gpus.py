"""Two or more GPUs give what one gives: exchange, decoding, training, loading."""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import mesh, model
from dskjax.checkpoint import load_hf, save_hf
from dskjax.decode.generate import generate
from dskjax.expert_parallel import Exchange, by_expert, combine, dispatch, weigh
from dskjax.presets import preset
from pallas_kernels.quant import dequantise
from pallas_kernels.select import no_hopper
from tests.parallel.common import AXIS, choices, on_ranks
from tests.train_mtp import toy
from train_mtp.step import init_state, place_batch, train_step

pytestmark = pytest.mark.gpu(2)
ROWS, TOP_K, PER_RANK, WIDTH = 48, 4, 4, 512
PROMPTS = [[5, 6, 7, 8, 9], [11], [4] * 9]


def gpus() -> int:
    return 4 if jax.device_count() >= 4 else 2


def scaled(x, experts):
    """Stands for experts: a power of two each, exact in any dtype."""
    return x * jnp.exp2(experts.astype(jnp.float32) % 3).astype(x.dtype)


def travel(mode, options, x, experts, weights):
    got = dispatch(x, experts, weights, axis=AXIS, per_rank=PER_RANK, **options)
    first = jax.lax.axis_index(AXIS) * PER_RANK
    if mode == "low_latency":
        slots = by_expert(got, per_rank=PER_RANK, dtype=x.dtype)
        y = scaled(slots.x, (first + jnp.arange(PER_RANK))[:, None, None])
        return combine(weigh(y, slots, got), got, axis=AXIS)
    rows = dequantise(got.x, x.dtype)
    named = (got.experts >= 0)[:, :, None]
    each = scaled(rows[:, None], (first + got.experts)[:, :, None])
    y = jnp.where(named, each * got.weights[:, :, None], 0).sum(axis=1)
    return combine(y, got, axis=AXIS)


@pytest.mark.parametrize("transport", ["all_to_all", "peer"])
@pytest.mark.parametrize("payload", ["native", "fp8"])
@pytest.mark.parametrize("mode", ["throughput", "low_latency"])
def test_an_exchange_is_its_definition(mode, payload, transport):
    if transport == "peer" and (reason := no_hopper()):
        pytest.skip(reason)
    rng = np.random.default_rng(0)
    experts = choices(rng, (gpus() * ROWS, TOP_K), gpus() * PER_RANK, idle=0.2)
    x = rng.integers(-8, 9, (len(experts), WIDTH)).astype(np.float32)
    x[:, ::128] = 448 / 2  # scales of an fp8 payload are 1/2: integers up to 8 are exact
    weights = np.exp2(-rng.integers(0, 3, experts.shape)).astype(np.float32)
    options = {"payload": payload, "transport": transport}
    found = on_ranks(functools.partial(travel, mode, options), gpus())(x, experts, weights)
    each = np.where(experts >= 0, np.exp2(experts % 3) * weights, 0).sum(axis=1)
    np.testing.assert_array_equal(np.asarray(found), x * each[:, None])


@pytest.mark.parametrize("axes", [{"ep": 2}, {"ep": 4}, {"dp": 2, "ep": 2}])
def test_puts_change_nothing_of_a_layer(axes):
    """Nor of its gradients, where some branches have little room and ranks unlike loads."""
    if reason := no_hopper():
        pytest.skip(reason)
    if np.prod(list(axes.values())) != gpus():
        pytest.skip(f"{axes} is for another number of GPUs than {gpus()}")
    rng, where = np.random.default_rng(0), mesh.make_mesh(**axes)
    experts = choices(rng, (gpus() * 96, 2), 8, idle=0.1)
    experts[: gpus() * 48] = experts[0]
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    args = (normal(len(experts), 256), jnp.asarray(rng.random(experts.shape), jnp.float32))
    weights = (normal(8, 2, 64, 256) / 16, normal(8, 256, 64) / 8)
    found = []
    for transport in ("all_to_all", "peer"):
        exchange = Exchange(
            mode="throughput",
            axis="ep",
            rows=("dp", "ep"),
            mesh=where,
            slack=1.2,
            transport=transport,
        )

        def loss(x, w, exchange=exchange):
            out = exchange.experts(x, w, jnp.asarray(experts), *weights, impl="xla")
            return (out**2).sum(), out

        found.append(jax.jit(jax.value_and_grad(loss, argnums=(0, 1), has_aux=True))(*args))
    close = functools.partial(np.testing.assert_allclose, rtol=1e-4, atol=1e-4)  # tuned products
    jax.tree.map(close, *found)


def some_weights(cfg, sharding=None):
    place = None if sharding is None else sharding.params(model.param_specs(cfg))
    make = lambda: model.init(cfg, jax.random.key(0), std=0.2)  # noqa: E731
    return jax.jit(make, out_shardings=place)()


@pytest.mark.parametrize("axes", [{"ep": 2}, {"dp": 2}, {"ep": 4}, {"dp": 2, "ep": 2}])
def test_ranks_decode_the_tokens_of_one_gpu(axes):
    if np.prod(list(axes.values())) != gpus():
        pytest.skip(f"{axes} is for another number of GPUs than {gpus()}")
    cfg, where = preset("tiny-v3"), mesh.preset("decode", mesh.make_mesh(**axes))
    run = functools.partial(
        generate,
        cfg=cfg,
        prompts=PROMPTS,
        max_tokens=12,
        drafts=cfg.mtp.num_nextn_predict_layers,
        accept="strict",
        ignore_eos=True,
        page_size=4,
    )
    with jax.default_matmul_precision("highest"):
        one = run(params=some_weights(cfg))
        many = run(params=some_weights(cfg, where), sharding=where)
    assert many.tokens == one.tokens and many.stats.steps == one.stats.steps


@pytest.mark.parametrize("axes", [{"ep": 2}, {"tp": 2}, {"ep": 2, "tp": 2}])
def test_training_has_the_losses_of_one_gpu(axes):
    if np.prod(list(axes.values())) != gpus():
        pytest.skip(f"{axes} is for another number of GPUs than {gpus()}")
    losses = {}
    for name in ("one", "many"):
        where = mesh.preset("train", mesh.make_mesh(**axes)) if name == "many" else None
        recipe = toy.recipe(sharding=where)
        state, found = init_state(recipe, 0), []
        for _ in range(3):
            placed = place_batch(toy.batch(), where)
            state, metrics = train_step(state, placed, recipe=recipe)
            found.append(float(metrics["total_loss"]))
        losses[name] = found
    np.testing.assert_allclose(losses["many"], losses["one"], rtol=1e-5)


def test_loading_straight_onto_gpus_gives_the_bits_of_one(tmp_path):
    cfg = preset("tiny-v3")
    save_hf(tmp_path, some_weights(cfg), cfg)
    plain, _ = load_hf(tmp_path)
    where = mesh.preset("train", mesh.make_mesh(ep=2, tp=gpus() // 2))
    split, _ = load_hf(tmp_path, sharding=where)
    jax.tree.map(np.testing.assert_array_equal, split, plain)
    assert any(not leaf.sharding.is_fully_replicated for leaf in jax.tree.leaves(split))
