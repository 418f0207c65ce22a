"""A MoE layer over a mesh equals the layer on one device, whatever the mode and the load."""

import functools
import re
import sys

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.axes import Rules, Sharding
from dskjax.expert_parallel import Exchange
from dskjax.mesh import make_mesh, preset
from pallas_kernels import expert_mlp, peer_exchange, quantise
from pallas_kernels.quant import FP8_BLOCK, FP8_TILE, INT4_GROUP, dequantise
from pallas_kernels.select import whole_arrays_only
from pallas_kernels.testing import Tolerance, assert_close
from pallas_kernels.testing.lower import lower_for_h100s
from tests.parallel.common import choices, needs_8

EXPERTS, TOP_K, WIDTH, INNER = 8, 2, 16, 8
SPLIT_SUM = Tolerance(
    abs=1e-5, rel=1e-5, cosine=1e-11, reason="fp32 sums of a row's experts in another order"
)
ROW_FP8 = Tolerance(
    abs=0.15, rel=0.06, cosine=2e-3, reason="rows travel in e4m3: 3 bits of mantissa"
)


alone = jax.jit(expert_mlp)
"""The layer on one device."""


@functools.cache
def mesh(dp: int, ep: int):
    return make_mesh(dp=dp, ep=ep, devices=jax.devices()[: dp * ep])


def make(rows: int, *, hot: bool = False, idle: float = 0.1, width: int = WIDTH, seed: int = 0):
    """Arguments of `expert_mlp`."""
    rng = np.random.default_rng(seed)
    normal = lambda *shape: jnp.asarray(rng.standard_normal(shape), jnp.float32)  # noqa: E731
    return (
        normal(rows, width),
        jnp.asarray(rng.random((rows, TOP_K)), jnp.float32),
        jnp.asarray(choices(rng, (rows, TOP_K), EXPERTS, hot=hot, idle=idle)),
        normal(EXPERTS, 2, INNER, width) / width**0.5,
        normal(EXPERTS, width, INNER) / INNER**0.5,
    )


@functools.cache
def run_of(exchange: Exchange):
    return jax.jit(functools.partial(exchange.experts, impl="xla"))


def over(dp: int, ep: int, mode: str, **options) -> Exchange:
    names = () if mode == "sum" else ("dp", "ep")
    axis = "" if mode == "local" else "ep"
    return Exchange(mode=mode, axis=axis, rows=names, mesh=mesh(dp, ep), **options)


@needs_8
@pytest.mark.parametrize("rows", [1, 13, 64])
@pytest.mark.parametrize(
    ("dp", "ep", "mode"),
    [
        (1, 8, "throughput"),
        (2, 4, "throughput"),
        (2, 4, "low_latency"),
        (1, 8, "sum"),
        (4, 2, "local"),
    ],
)
def test_equals_one_device(dp, ep, mode, rows):
    args = make(rows)
    assert_close(run_of(over(dp, ep, mode))(*args), alone(*args), SPLIT_SUM)


@needs_8
@pytest.mark.parametrize(
    ("dp", "ep", "mode"), [(1, 8, "sum"), (1, 8, "throughput"), (8, 1, "local")]
)
def test_every_axis_is_named_so_that_kernels_may_run(dp, ep, mode, monkeypatch):
    refusals = []

    def products(x, *_, **__):
        refusals.append(whole_arrays_only())
        return x

    monkeypatch.setattr(sys.modules[Exchange.__module__], "expert_mlp", products)
    jax.eval_shape(functools.partial(over(dp, ep, mode).experts, impl="auto"), *make(16))
    assert refusals and not any(refusals)


@needs_8
@pytest.mark.parametrize("hot", [False, True])
@pytest.mark.parametrize("slack", [1.0, 2.0])
def test_what_exceeds_the_room_is_noticed_and_not_dropped(hot, slack):
    """96 rows a rank: with room for little more than the mean, and all rows choosing alike."""
    args = make(384, hot=hot, idle=0.0)
    exchange = over(1, 4, "throughput", slack=slack)
    assert_close(run_of(exchange)(*args), alone(*args), SPLIT_SUM)


@needs_8
def test_a_room_that_is_believed_drops_rows(monkeypatch):
    """The flag is what keeps rows: without it a hot expert loses some."""
    monkeypatch.setattr(Exchange, "_overflows", lambda *_: jnp.array(False))
    args = make(384, hot=True, idle=0.0)
    got = jax.jit(functools.partial(over(1, 4, "throughput", slack=1.0).experts, impl="xla"))(*args)
    with pytest.raises(AssertionError):
        assert_close(got, alone(*args), SPLIT_SUM)


@functools.cache
def gradients_of(exchange: Exchange | None):
    """Compiled gradients of x, weights and experts' weights; None is one device."""
    run = expert_mlp if exchange is None else exchange.experts

    def loss(x, weights, gate_up, down, experts, pull):
        return (run(x, weights, experts, gate_up, down, impl="xla") * pull).sum()

    return jax.jit(jax.grad(loss, argnums=(0, 1, 2, 3)))


@needs_8
@pytest.mark.parametrize("mode", ["throughput", "sum", "local"])
@pytest.mark.parametrize("hot", [False, True])
def test_gradients_equal_those_of_one_device(mode, hot):
    x, weights, experts, gate_up, down = make(384, hot=hot)
    pull = np.random.default_rng(1).standard_normal(x.shape)
    slack = 1.5 if mode == "throughput" else None
    args = (x, weights, gate_up, down, experts, pull)
    found = gradients_of(over(2, 4, mode, slack=slack))(*args)
    for got, want in zip(found, gradients_of(None)(*args), strict=True):
        assert_close(got, want, Tolerance(abs=1e-4, rel=1e-4, cosine=1e-9, reason="fp32 sums"))


@needs_8
@pytest.mark.parametrize("recipe", [FP8_BLOCK, INT4_GROUP], ids=["fp8", "int4"])
def test_quantized_experts_travel_with_their_scales(recipe):
    x, weights, experts, gate_up, down = make(24, width=128)
    # The inner width is below a block, so the down projection is one ragged block.
    gate_up = quantise(gate_up, recipe)
    args = (x, weights, experts, gate_up, down)
    assert_close(run_of(over(2, 4, "throughput"))(*args), alone(*args), SPLIT_SUM)


@needs_8
@pytest.mark.parametrize("mode", ["throughput", "low_latency"])
def test_an_fp8_payload_equals_quantized_rows(mode):
    x, weights, experts, gate_up, down = make(24, width=128)
    got = run_of(over(1, 8, mode, payload="fp8"))(x, weights, experts, gate_up, down)
    rounded = dequantise(quantise(x, FP8_TILE))
    assert_close(got, alone(rounded, weights, experts, gate_up, down), SPLIT_SUM)
    assert_close(got, alone(x, weights, experts, gate_up, down), ROW_FP8)


@needs_8
@pytest.mark.parametrize("mode", ["throughput", "low_latency"])
def test_puts_equal_one_device(mode):
    args = make(13)
    assert_close(run_of(over(2, 4, mode, transport="peer"))(*args), alone(*args), SPLIT_SUM)


@needs_8
def test_puts_on_a_mesh_take_one_branch_on_all_its_ranks():
    """Only one group of ranks has too little room, and all take the branch with more."""
    x, weights, experts, gate_up, down = make(512)
    experts = experts.at[:256].set(experts[0])
    exchange = over(2, 4, "throughput", transport="peer", slack=1.0)

    def overflows(experts):
        return exchange._overflows(experts, EXPERTS // 4, 60, 1000)[None]

    rows = jax.P(("dp", "ep"))
    ask = jax.shard_map(overflows, mesh=exchange.mesh, in_specs=rows, out_specs=rows)
    assert np.asarray(jax.jit(ask)(experts)).all()
    got = run_of(exchange)(x, weights, experts, gate_up, down)
    assert_close(got, alone(x, weights, experts, gate_up, down), SPLIT_SUM)


@needs_8
def test_puts_need_rows_over_the_whole_mesh():
    both = make_mesh(dp=2, tp=2, ep=2, devices=jax.devices()[:8])
    options = {"axis": "ep", "rows": ("dp", "ep"), "mesh": both, "transport": "peer"}
    with pytest.raises(ValueError, match=re.escape("not over ('dp', 'ep') beside {'tp': 2}")):
        Exchange(mode="throughput", **options)
    with pytest.raises(ValueError, match="needs rows that travel, not self.mode='sum'"):
        Exchange(mode="sum", **options)


def test_puts_are_kernels_on_gpus(monkeypatch):
    """Each way in each branch; nothing else exchanges rows."""
    named = functools.partial(peer_exchange, impl="mosaic_sm90")
    module = sys.modules["dskjax.expert_parallel.message"]
    monkeypatch.setattr(module, "peer_exchange", lambda *args, impl: named(*args))
    monkeypatch.setattr(sys.modules["pallas_kernels.peer_exchange.api"], "no_hopper", lambda: None)
    exchange = Exchange(mode="throughput", axis="ep", rows=("ep",), transport="peer", slack=2.0)
    run = functools.partial(exchange.experts, impl="xla")
    text = lower_for_h100s(run, *make(512), ranks=4, axis="ep")
    assert text.count("mosaic_gpu_v2") == 4
    assert text.count('"stablehlo.all_to_all"') == 0


@needs_8
def test_experts_must_divide():
    args = make(8)
    three = (*args[:3], args[3][:6], args[4][:6])
    with pytest.raises(
        ValueError, match=re.escape("6 experts do not split over ep=4; choose one of 1, 2, 3, 6")
    ):
        over(1, 4, "throughput").experts(*three, impl="xla")
    with pytest.raises(ValueError, match="6 experts"):
        Exchange.within(preset("decode", mesh(1, 4)), 6)


@needs_8
def test_rules_choose_the_mode():
    def mode(rules, dp=1, ep=1):
        found = Exchange.of(Sharding(mesh(dp, ep), Rules.make(rules)))
        return found and (found.mode, found.rows)

    both = {"batch": ("dp", "ep"), "experts": "ep"}
    assert Exchange.of(None) is None
    assert mode(both) is None
    assert mode(both, dp=2) == ("local", ("dp",))
    assert mode(both, ep=4) == ("throughput", ("ep",))
    assert mode(both, dp=2, ep=4) == ("throughput", ("dp", "ep"))
    assert mode({"batch": ("dp", "ep")}, dp=2, ep=4) == ("local", ("dp", "ep"))
    assert mode({"batch": "dp", "experts": "ep"}, dp=2, ep=4) == ("sum", ("dp",))
    assert mode({"experts": "ep"}, ep=4) == ("sum", ())
    with pytest.raises(ValueError, match="over one axis"):
        mode({"experts": ("dp", "ep")}, dp=2, ep=4)
