"""`matmul`: plain and quantized weights against a float64 product with their real values."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QTensor, matmul
from pallas_kernels.matmul import api, cases
from pallas_kernels.testing import assert_close, call, distinct, jit
from tests.oracles import formats
from tests.tolerances import GRADIENT, OP

IMPLS = [name for name in distinct(api.IMPLEMENTATIONS) if name != "mosaic_sm90"]
CASES = {case.name: case for case in cases.CASES}


def run(impl):
    return lambda **args: call(matmul, args | {"impl": impl})


@functools.cache
def expected(case):
    args = case.make(0)
    w = args["w"]
    if isinstance(w, QTensor):
        w = formats.dequantise(np.asarray(w.values), np.asarray(w.scales), w.block, w.format)
    return args, np.tensordot(np.float64(args["x"]), np.float64(w), axes=(-1, -1))


def check(op, case):
    args, want = expected(case)
    out = op(**args)
    assert out.dtype == args["x"].dtype
    assert_close(out, want, OP[case.dtype])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_matches_oracle(impl, case):
    check(run(impl), case)


@pytest.mark.parametrize("name", ["e4m3 ragged", "int4 ragged"])
def test_scales_have_ceil_shapes(name):
    """Block counts are rounded up, so that ragged last blocks have a scale too."""
    w = CASES[name].make(0)["w"]
    blocks = [-(-size // block) for size, block in zip(w.shape[-2:], w.block, strict=True)]
    assert w.scales.shape == (2, *blocks)


def test_contracted_sizes_must_agree():
    w = CASES["int4"].make(0)["w"]  # of a plain array the type hook would complain first
    with pytest.raises(ValueError, match="K=255 but w has K=256"):
        matmul(jnp.ones((2, 255)), w)


@pytest.mark.parametrize("impl", IMPLS)
def test_gradients(impl):
    args = CASES["two axes"].make(0)
    dy = CASES["two axes"].rng(1).standard_normal((2, 3, 2, 20))
    loss = lambda x, w: (matmul(x, w, impl=impl) * dy).sum()  # noqa: E731
    dx, dw = jit(jax.grad(loss, argnums=(0, 1)))(args["x"], args["w"])
    x, w = np.float64(args["x"]), np.float64(args["w"])
    assert_close(dx, np.einsum("abgn,gnk->abk", dy, w), GRADIENT["float32"])
    assert_close(dw, np.einsum("abgn,abk->gnk", dy, x), GRADIENT["float32"])


# ------------------------------------------------------------------ planted bugs


def _weight(change):
    return lambda **a: run("reference")(x=a["x"], w=change(a["w"]))


def _nibbles_swapped(w):
    return dataclasses.replace(w, values=(w.values >> 4) | (w.values << 4))


def _offset_binary(w):
    """Reads nibbles as value + 8 instead of two's complement."""
    return dataclasses.replace(w, values=w.values ^ 0x88)


BUGS = {
    "scales divide": ("e4m3 ragged", lambda w: dataclasses.replace(w, scales=1 / w.scales)),
    "scales in another order": (
        "e4m3 ragged",
        lambda w: dataclasses.replace(w, scales=w.scales[:, :, ::-1]),
    ),
    "ragged row block forgotten": (
        "e4m3 ragged",
        lambda w: dataclasses.replace(w, scales=w.scales.at[:, -1].set(w.scales[:, 0])),
    ),
    "ragged column block forgotten": (
        "int4 ragged",
        lambda w: dataclasses.replace(w, scales=w.scales.at[..., -1].set(w.scales[..., 0])),
    ),
    "nibbles swapped": ("int4 ragged", _nibbles_swapped),
    "nibbles with an offset": ("int4 ragged", _offset_binary),
    "gate and up swapped": ("int4 ragged", lambda w: w[::-1]),
}


@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug):
    name, change = BUGS[bug]
    check(run("reference"), CASES[name])
    with pytest.raises(AssertionError):
        check(_weight(change), CASES[name])
