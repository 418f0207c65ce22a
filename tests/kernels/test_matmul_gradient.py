"""The gradients of `matmul` in plain JAX: as defined, by products of the inputs' type."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import matmul
from pallas_kernels.matmul import xla
from pallas_kernels.testing import assert_close
from tests.tolerances import GRADIENT, OP


def inputs(dtype, lead=(), rows=(6,)):
    rng = np.random.default_rng(0)
    shapes = (*rows, 48), (*lead, 20, 48), (*rows, *lead, 20)
    return [jnp.asarray(rng.standard_normal(shape), dtype) for shape in shapes]


@pytest.mark.parametrize("lead", [(), (2,)])
@pytest.mark.parametrize("rows", [(), (6,), (2, 3)])
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_gradients_are_those_of_the_definition(dtype, rows, lead):
    x, w, grad = inputs(dtype, lead, rows)
    _, pull = jax.vjp(lambda x, w: matmul(x, w, impl="xla"), x, w)
    flat = [np.float64(a).reshape(-1, n) for a, n in ((x, 48), (w, 48), (grad, w.size // 48))]
    tolerance = (GRADIENT if dtype == "float32" else OP)[dtype]
    for got, want, like in zip(
        pull(grad), (flat[2] @ flat[1], flat[2].T @ flat[0]), (x, w), strict=True
    ):
        assert got.dtype == like.dtype
        assert_close(got, want.reshape(like.shape), tolerance, "gradient")


def test_no_product_is_of_fp32_where_the_inputs_have_16_bits():
    x, w, grad = inputs("bfloat16")
    pull = jax.make_jaxpr(lambda x, w, g: jax.vjp(xla.matmul, x, w)[1](g))(x, w, grad)
    products = [e for e in pull.eqns if e.primitive.name == "dot_general"]
    types = {str(v.aval.dtype) for e in products for v in e.invars}
    assert len(products) >= 2 and types == {"bfloat16"}
