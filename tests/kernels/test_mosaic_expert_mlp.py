"""`expert_mlp` for Hopper: rows in e4m3 against an oracle that rounds as it does, gradients, bugs
the suite sees, lowering for CUDA, and runs on a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QTensor, expert_mlp
from pallas_kernels.expert_mlp import api, by_group, cases, formats, mosaic_sm90, swiglu_quant
from pallas_kernels.quant import FP8_TILE, FP8_TOKEN, dequantise
from pallas_kernels.select import H100_SMS, choose, no_hopper
from pallas_kernels.testing import assert_close, assert_equal, call, jit, tagged
from pallas_kernels.testing.lower import lower_for_h100
from tests.kernels.expert_mlp_suite import (
    CASES,
    check_e4m3,
    interpreted,
    kernels,
    plain,
    run,
    same_e4m3,
)
from tests.tolerances import OP, SAME_E4M3

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")
SMALL = CASES["hopper"]


@pytest.mark.parametrize("case", tagged(cases.HOPPER, "ci"), ids=str)
def test_plain_steps_match_oracles(case):
    check_e4m3(plain, case)


@on_cpu
@pytest.mark.parametrize("name", ["hopper", pytest.param("packed", marks=pytest.mark.full)])
def test_kernels_match_oracles(name):
    check_e4m3(interpreted, CASES[name])


def test_room_for_fewer_pairs_changes_nothing():
    args = CASES["hopper pairs"].make(0)
    assert_close(plain(**args), plain(**args | {"pairs": None}), SAME_E4M3)


@pytest.mark.parametrize("recipe", [FP8_TILE, FP8_TOKEN], ids=["tile", "token"])
def test_swiglu_is_quantised(recipe):
    rng = np.random.default_rng(0)
    rows = rng.standard_normal((37, 2, 384)) * 10.0 ** rng.integers(-3, 3, (37, 1, 1))
    rows[5, 0] = -200  # its exp overflows
    rows[9] = 0
    gate_up = jnp.asarray(rows, jnp.bfloat16)
    q = _swiglu_quant(gate_up, recipe)
    gate, up = np.asarray(gate_up, np.float64).swapaxes(0, 1)
    want = gate / (1 + np.exp(-gate)) * up
    width = recipe.block[1] or 384
    amax = np.maximum(np.abs(want.reshape(37, -1, width)).max(axis=2), 1e-4)
    np.testing.assert_allclose(q.scales, amax / 448, rtol=1e-5)
    # Half a unit in the last place: 2^-4 of a normal value, 2^-10 scales of a subnormal one.
    limit = 1.001 * np.maximum(
        np.abs(want) * 2.0**-4, np.asarray(q.scales).repeat(width, axis=1) * 2.0**-10
    )
    assert (np.abs(np.asarray(dequantise(q)) - want) <= limit).all()


def _swiglu_quant(gate_up, recipe):
    if jax.default_backend() == "cpu":
        args = {"gate_up": gate_up, "recipe": recipe, "interpret": True}
        return call(swiglu_quant.swiglu_quant, args)
    return call(swiglu_quant.swiglu_quant, {"gate_up": gate_up, "recipe": recipe})


# ------------------------------------------------------------------ gradients


def _gradients(op, args):
    """Of a sum whose slopes do not depend on what rows in e4m3 lose."""
    slopes = np.random.default_rng(1).standard_normal(args["x"].shape, np.float32)

    def loss(x, weights):
        return jnp.sum(slopes * op(**args | {"x": x, "weights": weights}).astype(jnp.float32))

    return jit(jax.grad(loss, argnums=(0, 1)))(args["x"], args["weights"])


def _plain(**args):
    return mosaic_sm90.expert_mlp(**args, steps=mosaic_sm90.PLAIN)


def test_gradients_of_rows_and_router_are_those_of_plain_jax():
    args = SMALL.make(0)
    args["weights"] = jnp.where(args["experts"] < 0, 0, args["weights"])  # as `api` does
    got = _gradients(_plain, args)
    want = _gradients(functools.partial(by_group.expert_mlp, impl="xla"), args)
    for mine, theirs in zip(got, want, strict=True):
        assert_equal(mine, theirs)


def test_weights_have_no_gradient():
    args = SMALL.make(0)

    def loss(scales):
        q = args["down"]
        down = QTensor(q.values, scales, q.block, q.format)
        return jnp.sum(_plain(**args | {"down": down}).astype(jnp.float32))

    with pytest.raises(NotImplementedError, match="quantized weights have no gradient"):
        jax.grad(loss)(args["down"].scales)


def test_layers_are_scanned_and_recomputed():
    args = SMALL.make(0)
    weights = {name: args.pop(name) for name in ("gate_up", "down")}
    two = jax.tree.map(lambda leaf: jnp.stack([leaf, leaf]), weights)

    def loss(x):
        @jax.checkpoint
        def layer(x, weights):
            return x + _plain(**args | weights | {"x": x}), None

        return jax.lax.scan(layer, x, two)[0].astype(jnp.float32).sum()

    grad = jit(jax.grad(loss))(args["x"])
    assert np.isfinite(np.asarray(grad, np.float32)).all()


# ------------------------------------------------------------------ planted bugs


def with_step(name, change):
    step = getattr(mosaic_sm90.PLAIN, name)
    steps = dataclasses.replace(mosaic_sm90.PLAIN, **{name: change(step)})
    return functools.partial(call, functools.partial(mosaic_sm90.expert_mlp, steps=steps))


def _half_rounded(multiply):
    """A product that forgets the scales of later blocks of inputs."""

    def changed(x, w, sizes):
        scales = jnp.broadcast_to(x.scales[:, :1], x.scales.shape)
        return multiply(QTensor(x.values, scales, x.block, x.format), w, sizes)

    return changed


BUGS = {
    "gate and up swapped": ("swiglu_quant", lambda f: lambda x, recipe: f(x[:, ::-1], recipe)),
    "scales of the first block": ("multiply", _half_rounded),
    "experts off by one": (
        "multiply",
        lambda f: lambda x, w, sizes: f(x, w, jnp.roll(sizes, 1)),
    ),
    "weights of another choice": (
        "combine",
        lambda f: lambda y, places, weights: f(y, places, weights[:, ::-1]),
    ),
    "an absent choice counts": (
        "combine",
        lambda f: lambda y, places, weights: f(y, jnp.abs(places), weights),
    ),
}


@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug):
    broken = with_step(*BUGS[bug])
    with pytest.raises(AssertionError):
        check_e4m3(lambda **args: broken(args), SMALL)


def test_suite_sees_only_bugs():
    same = with_step("multiply", lambda step: lambda *args: step(*args))
    check_e4m3(lambda **args: same(args), SMALL)


# ------------------------------------------------------------------ arguments and choices


@pytest.mark.parametrize(
    ("changes", "reason"),
    [
        ({"weight": "array", "dtype": "float32"}, "needs bfloat16 x and w .* not float32"),
        ({"weight": "array", "width": 100}, "multiples of 8 outputs and inputs, not 256 and 100"),
        ({"dtype": "float32"}, "needs bfloat16 rows, not float32"),
        ({"weight": "int4"}, "gate_up: needs .*; int4 w must be packed"),
        ({"width": 192}, "gate_up: needs multiples of 128 outputs and inputs, not 192 and 256"),
        ({"hidden": 200}, "multiples of 128 outputs and inputs, not 128 and 200"),
        ({"pairs": 0}, "gate_up: needs rows and experts, not 0 and 4"),
        (
            {"weight": "int4", "packed": True, "width": 2**15},
            "at most 16384 hidden channels for a scale per row, not 32768",
        ),
        ({"rows": 2**20, "width": 1024}, "needs arrays of fewer than 2147483648 elements"),
    ],
)
def test_refusals_name_what_is_needed(changes, reason):
    refused(dataclasses.replace(SMALL, **changes), reason)


def refused(case, reason, **changes):
    refusals = []

    def ask(**args):
        refusals.append(formats.hopper_refusal(**args, pairs=case.pairs))

    jax.eval_shape(ask, **case.abstract() | changes)
    with pytest.raises(ValueError, match=reason):
        raise ValueError(refusals[0])


def test_refuses_weights_of_two_kinds():
    packed = CASES["packed"].abstract()["down"]
    refused(SMALL, "both weights e4m3 or both packed, not e4m3 and packed int4", down=packed)


@on_cpu
@pytest.mark.parametrize("name", ["hopper", "packed"])
def test_a_cpu_never_runs_it(name):
    args = CASES[name].make(0)
    with pytest.raises(NotImplementedError, match="expert_mlp.*mosaic_sm90.*needs an H100 or H200"):
        expert_mlp(**args, impl="mosaic_sm90")
    assert chosen(args) == "reference"


@pytest.mark.parametrize("name", ["hopper", "packed"])
def test_a_hopper_takes_it_by_name_only(name, monkeypatch):
    monkeypatch.setattr(api, "no_hopper", lambda: None)
    args = CASES[name].make(0)
    assert chosen(args) != "mosaic_sm90"
    assert chosen(args, "mosaic_sm90") == "mosaic_sm90"


def chosen(args, impl="auto"):
    run = choose("expert_mlp", impl, api.IMPLEMENTATIONS, *args.values())
    return next(i.name for i in api.IMPLEMENTATIONS if i.run is run)


# ------------------------------------------------------------------ lowering for CUDA


@pytest.mark.parametrize("case", [CASES["hopper"], CASES["packed"]], ids=str)
def test_lowers_for_cuda(case):
    steps = kernels(interpreted=False, sms=H100_SMS)
    op = functools.partial(mosaic_sm90.expert_mlp, steps=steps)
    text = lower_for_h100(lambda **args: op(**args), **case.abstract())
    assert text.count("mosaic_gpu_v2") == 2
    assert text.count("xla.gpu.triton") == 3


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", cases.HOPPER, ids=str)
def test_matches_oracles_on_a_gpu(case):
    if reason := no_hopper():
        pytest.skip(reason)
    check_e4m3(run("mosaic_sm90"), case)


@pytest.mark.gpu
@pytest.mark.parametrize("name", ["hopper pairs", "packed pairs"])
def test_is_its_meaning_on_a_gpu(name):
    """Kernels and plain JAX differ where a sum is rounded to the other side."""
    if reason := no_hopper():
        pytest.skip(reason)
    args = CASES[name].make(3)
    assert_close(run("mosaic_sm90")(**args), plain(**args), same_e4m3())


@pytest.mark.gpu
def test_gradients_on_a_gpu():
    if reason := no_hopper():
        pytest.skip(reason)
    args = SMALL.make(0)
    got, want = (
        _gradients(functools.partial(expert_mlp, impl=impl), args)
        for impl in ("mosaic_sm90", "xla")
    )
    for mine, theirs in zip(got, want, strict=True):
        assert_close(mine, theirs, OP["bfloat16"])
