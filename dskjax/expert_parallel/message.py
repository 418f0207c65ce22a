"""What travels between the ranks of a mesh axis: arrays [R * C, ...], C rows for each rank."""

import functools

import jax
import jax.numpy as jnp
from jax import lax


def swap(arrays: tuple[jax.Array, ...], axis: str) -> tuple[jax.Array, ...]:
    """Sends run r of every array to rank r of `axis`; what arrives is in rank order.

    One padded `all_to_all` carries them all, as bytes. Every rank must call, inside `shard_map`.
    Differentiable: what came from a rank sends its gradient back there.
    """
    return _swap(arrays, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _swap(arrays: tuple[jax.Array, ...], axis: str) -> tuple[jax.Array, ...]:
    rows = [_to_bytes(x) for x in arrays]
    got = lax.all_to_all(jnp.concatenate(rows, axis=1), axis, 0, 0, tiled=True)
    out, start = [], 0
    for x, row in zip(arrays, rows, strict=True):
        out.append(_from_bytes(got[:, start : start + row.shape[1]], x))
        start += row.shape[1]
    return tuple(out)


def _backward(
    axis: str, is_float: tuple[bool, ...], grads: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array | None, ...]]:
    floats = tuple(grad for grad, kept in zip(grads, is_float, strict=True) if kept)
    back = iter(_swap(floats, axis))
    return (tuple(next(back) if kept else None for kept in is_float),)


_swap.defvjp(
    lambda arrays, axis: (
        _swap(arrays, axis),
        tuple(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays),
    ),
    _backward,
)


def _to_bytes(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(x.shape[0], -1)


def _from_bytes(rows: jax.Array, like: jax.Array) -> jax.Array:
    wide = like.dtype.itemsize
    shape = like.shape if wide == 1 else (*like.shape, wide)
    return lax.bitcast_convert_type(rows.reshape(shape), like.dtype)
