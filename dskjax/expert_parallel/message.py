"""What travels between the ranks of a mesh axis: arrays [R * C, ...], C rows for each rank."""

import functools
import itertools

import jax
import jax.numpy as jnp
from jax import lax

from pallas_kernels import peer_exchange


def swap(arrays: tuple[jax.Array, ...], axis: str) -> tuple[jax.Array, ...]:
    """Sends run r of every array to rank r of `axis`; what arrives is in rank order.

    One padded `all_to_all` carries them all, as bytes. Every rank must call, inside `shard_map`.
    Differentiable: what came from a rank sends its gradient back there.
    """
    return _swap(arrays, axis)


def put(
    arrays: tuple[jax.Array, ...], counts: jax.Array, axis: str
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    """Like `swap`, but only the first counts[r] rows of run r travel.

    On GPUs every rank writes into its peers' memory, see `pallas_kernels.peer_exchange`. Gradients
    travel like those of `swap`, whole.

    Args:
        arrays: as in `swap`.
        counts: i32 [R]; more than C means C.
        axis: as in `swap`.

    Returns:
        What arrived, and i32 counts [R] of rows from each rank. Rows past them hold anything.

    Raises:
        NotImplementedError: these GPUs cannot; the message says why.
    """
    return _put(arrays, counts, axis)


@functools.partial(jax.custom_vjp, nondiff_argnums=(1,))
def _swap(arrays: tuple[jax.Array, ...], axis: str) -> tuple[jax.Array, ...]:
    return _unpack(lax.all_to_all(_pack(arrays), axis, 0, 0, tiled=True), arrays)


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def _put(
    arrays: tuple[jax.Array, ...], counts: jax.Array, axis: str
) -> tuple[tuple[jax.Array, ...], jax.Array]:
    rows = _pack(arrays)
    # By name: who asks for puts on a GPU should hear why there are none.
    impl = "mosaic_sm90" if jax.default_backend() == "gpu" else "auto"
    runs = rows.reshape(lax.axis_size(axis), -1, rows.shape[1])
    got, arrived = peer_exchange(runs, counts, axis, impl=impl)
    return _unpack(got.reshape(rows.shape), arrays), arrived


def _backward(
    axis: str, is_float: tuple[bool, ...], grads: tuple[jax.Array, ...]
) -> tuple[tuple[jax.Array | None, ...]]:
    floats = tuple(grad for grad, kept in zip(grads, is_float, strict=True) if kept)
    back = iter(_swap(floats, axis))
    return (tuple(next(back) if kept else None for kept in is_float),)


_swap.defvjp(lambda arrays, axis: (_swap(arrays, axis), _are_floats(arrays)), _backward)
_put.defvjp(
    lambda arrays, counts, axis: (_put(arrays, counts, axis), _are_floats(arrays)),
    lambda axis, is_float, grads: (*_backward(axis, is_float, grads[0]), None),
)


def _are_floats(arrays: tuple[jax.Array, ...]) -> tuple[bool, ...]:
    return tuple(jnp.issubdtype(x.dtype, jnp.floating) for x in arrays)


def _pack(arrays: tuple[jax.Array, ...]) -> jax.Array:
    """[R * C, W]: bytes of all arrays side by side; one matrix stays what it is."""
    if len(arrays) == 1 and arrays[0].ndim == 2:
        return arrays[0]
    return jnp.concatenate([_to_bytes(x) for x in arrays], axis=1)


def _unpack(rows: jax.Array, like: tuple[jax.Array, ...]) -> tuple[jax.Array, ...]:
    if len(like) == 1 and like[0].ndim == 2:
        return (rows,)
    widths = [x[0].size * x.dtype.itemsize for x in like]
    stops = list(itertools.accumulate(widths))
    return tuple(
        _from_bytes(rows[:, stop - width : stop], x)
        for x, width, stop in zip(like, widths, stops, strict=True)
    )


def _to_bytes(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, jnp.uint8).reshape(x.shape[0], -1)


def _from_bytes(rows: jax.Array, like: jax.Array) -> jax.Array:
    wide = like.dtype.itemsize
    shape = like.shape if wide == 1 else (*like.shape, wide)
    return lax.bitcast_convert_type(rows.reshape(shape), like.dtype)
