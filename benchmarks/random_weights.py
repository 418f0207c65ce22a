"""Random arrays of the shapes and formats of a published model, made where they are to lie.

What a device draws is only its own part, a matrix or a layer of it at a time, so that drawing takes
little memory beside the result.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal

import jax
import jax.numpy as jnp
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dskjax.config import ModelConfig
from dskjax.hopper import packed_shapes
from dskjax.model import param_specs
from dskjax.params import Params, abstract, unstack
from dskjax.quantise import quantise

Precision = Literal["bf16", "fp8", "w4afp8"]
SCALE = 2.0**-7
"""What scales, and biases of gates, are."""


def param_shapes(
    cfg: ModelConfig, precision: Precision, *, unrolled: bool = False, dtype: Any = jnp.bfloat16
) -> Any:
    """Shapes of the weights; experts in int4 are packed for Hopper.

    Args:
        cfg: the model.
        precision: of the weights.
        unrolled: give every layer arrays of its own.
        dtype: of weights that are not quantised.
    """

    def formed(params: Params) -> Any:
        if precision != "bf16":
            params = quantise(params, precision)
        return unstack(params) if unrolled else params

    shapes = jax.eval_shape(formed, abstract(param_specs(cfg), dtype))
    return packed_shapes(shapes) if precision == "w4afp8" else shapes


def random_like(shapes: Any, shardings: Any = None, seed: int = 1) -> Any:
    """Random arrays: of variance 1 / inputs, so that hidden states keep their size; norms are 1.

    Args:
        shapes: pytree of shapes and types.
        shardings: a NamedSharding for each; None is the default device.
        seed: of the generator. Devices that hold the same part of an array draw the same.
    """
    leaves, tree = jax.tree_util.tree_flatten_with_path(shapes)
    keys = jax.random.split(jax.random.key(seed), len(leaves))
    where = [None] * len(leaves) if shardings is None else tree.flatten_up_to(shardings)
    made = [
        _maker(_kind(jax.tree_util.keystr(path)), x.shape, x.dtype, at)(key)
        for (path, x), at, key in zip(leaves, where, keys, strict=True)
    ]
    return jax.tree.unflatten(tree, made)


def _kind(path: str) -> float | None:
    """What all numbers of an array are, by its name; None for random ones."""
    if path.endswith(".scales") or path.endswith(".scale") or "e_score_correction_bias" in path:
        return SCALE
    return 1.0 if "norm" in path else None


@functools.cache  # layers are alike, and compiling takes longer than drawing
def _maker(
    constant: float | None, shape: tuple[int, ...], dtype: Any, where: NamedSharding | None
) -> Callable[[jax.Array], jax.Array]:
    if constant is not None:
        return lambda _: jnp.full(shape, constant, dtype, device=where)
    if where is None:
        return jax.jit(functools.partial(_draw, shape=shape, dtype=dtype))
    axes = [axis for part in where.spec for axis in (part if isinstance(part, tuple) else (part,))]

    def mine(key: jax.Array) -> jax.Array:
        for axis in axes:
            key = key if axis is None else jax.random.fold_in(key, lax.axis_index(axis))
        return _draw(key, where.shard_shape(shape), dtype)

    return jax.jit(
        jax.shard_map(
            mine,
            mesh=where.mesh,
            in_specs=PartitionSpec(),
            out_specs=where.spec,
            check_vma=False,
        )
    )


def _draw(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    lead = shape[: max(min(len(shape) - 2, 2), 0)]
    if not lead or not math.prod(shape):
        return _matrix(key, shape, dtype)
    make = functools.partial(_matrix, shape=shape[len(lead) :], dtype=dtype)
    return lax.map(make, jax.random.split(key, math.prod(lead))).reshape(shape)


def _matrix(key: jax.Array, shape: tuple[int, ...], dtype: Any) -> jax.Array:
    if dtype == jnp.int32:
        return lax.bitcast_convert_type(jax.random.bits(key, shape), jnp.int32)
    if dtype == jnp.float8_e4m3fn:
        bits = jax.random.bits(key, shape, jnp.uint8) & 0xBF  # no NaN
        return lax.bitcast_convert_type(bits, dtype)
    return (jax.random.normal(key, shape) * shape[-1] ** -0.5).astype(dtype)
