"""What ops keep for their backward pass: their arguments, not arrays of fp32 made of them.

A scan over layers stores what each layer keeps, so it costs memory and the time to write and read.
"""

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels.expert_mlp.by_group import expert_mlp
from pallas_kernels.grouped_matmul import mosaic_sm90_bf16
from pallas_kernels.rms_norm import rms_norm
from pallas_kernels.swiglu import swiglu

KEY = jax.random.key(0)


def kept(function, *args):
    """Shapes and types of what is kept beside the arguments themselves."""
    given = [(a.shape, a.dtype) for a in jax.tree.leaves(args)]
    _, pull = jax.eval_shape(functools.partial(jax.vjp, function), *args)
    found = [(a.shape, a.dtype) for a in jax.tree.leaves(pull)]
    return [(shape, str(dtype)) for shape, dtype in found if (shape, dtype) not in given]


def shape(*sizes, dtype=jnp.bfloat16):
    return jax.ShapeDtypeStruct(sizes, dtype)


def test_swiglu_and_norms_keep_their_arguments():
    assert kept(swiglu, shape(8, 2, 16)) == []
    assert kept(functools.partial(rms_norm, eps=1e-6), shape(8, 16), shape(16)) == []


def test_what_is_kept_is_seen():
    assert kept(lambda x: jnp.sin(x.astype(jnp.float32)), shape(8)) == [((8,), "float32")]


def test_experts_keep_nothing_large_in_fp32():
    args = shape(32, 16), shape(32, 2, dtype=jnp.float32), shape(4, 2, 24, 16), shape(4, 16, 24)
    choice = jnp.arange(64, dtype=jnp.int32).reshape(32, 2) % 4

    def run(x, weights, gate_up, down):
        return expert_mlp(x, weights, choice, gate_up, down, impl="xla")

    large = [(s, t) for s, t in kept(run, *args) if t == "float32" and np.prod(s) > 64]
    assert large == []


def test_weights_are_kept_in_their_own_shape():
    x, w, sizes = shape(128, 64), shape(2, 2, 128, 64), jnp.full(2, 64, jnp.int32)

    def product(x, w):
        return mosaic_sm90_bf16.grouped_matmul(x, w, sizes, sms=2)

    assert ((2, 256, 64), "bfloat16") not in kept(product, x, w)


@pytest.mark.parametrize("dtype", [jnp.float32, jnp.bfloat16])
def test_gradient_of_swiglu(dtype):
    gate_up = (3 * jax.random.normal(KEY, (5, 2, 7))).astype(dtype)
    grad = jax.random.normal(jax.random.key(1), (5, 7)).astype(dtype)

    def plain(x):
        return jax.nn.silu(x[..., 0, :]) * x[..., 1, :]

    _, pull = jax.vjp(plain, gate_up.astype(jnp.float32))
    (want,) = pull(grad.astype(jnp.float32))
    (got,) = jax.vjp(swiglu, gate_up)[1](grad)
    assert got.dtype == dtype
    np.testing.assert_allclose(
        got.astype(jnp.float32), want, rtol=1e-5 if dtype == jnp.float32 else 1e-2, atol=1e-5
    )
