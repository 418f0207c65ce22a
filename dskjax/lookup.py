"""Rows of a table by id, and the gradient of it: sums whose order is fixed on every device.

XLA adds to a row from many threads at once on a GPU, in whatever order they come, and fp32 sums
depend on their order: two runs of the same training step give different embeddings. Here ids are
sorted and equal neighbours are added as a tree (a segmented scan), so the same step gives the same
bits, whatever the vocabulary's size and however often an id occurs.
"""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int


@functools.partial(jax.custom_vjp, nondiff_argnums=(2,))
def lookup(
    table: Float[Array, "X D"], ids: Int[Array, "*T"], spread: bool = False
) -> Float[Array, "*T D"]:
    """Rows `ids` of `table`.

    Args:
        table: of any floating type.
        ids: ids outside the table give NaN rows, so that a wrong tokenizer cannot pass unnoticed.
        spread: arrays lie on several devices. The gradient is then left to XLA, which adds on each
            device what is there, in no fixed order on a GPU, and exchanges the sums alone.
    """
    inside = jnp.where(ids < 0, table.shape[0], ids)  # -1 would mean the last row
    return jnp.take(table, inside, axis=0, mode="fill", fill_value=jnp.nan)


def _forward(
    table: jax.Array, ids: jax.Array, spread: bool
) -> tuple[jax.Array, tuple[jax.Array, jax.Array]]:
    return lookup(table, ids, spread), (table, ids)


def _backward(
    spread: bool, saved: tuple[jax.Array, jax.Array], grad: jax.Array
) -> tuple[jax.Array, None]:
    table, ids = saved
    rows, width = table.shape
    flat = grad.reshape(-1, width)
    if spread:
        total = _added(flat, ids.reshape(-1), rows)
    else:
        # On a CPU XLA adds one after the other anyway.
        total = jax.lax.platform_dependent(
            flat,
            ids.reshape(-1),
            cpu=functools.partial(_added, rows=rows),
            default=functools.partial(added_in_order, rows=rows),
        )
    return total.astype(table.dtype), None


def _added(grad_td: jax.Array, ids_t: jax.Array, rows: int) -> jax.Array:
    # fp32: a bf16 sum over the thousands of places of a frequent token would stop growing.
    total = jnp.zeros((rows, grad_td.shape[1]), jnp.float32)
    return total.at[ids_t].add(grad_td.astype(jnp.float32))


def added_in_order(
    grad_td: Float[Array, "T D"], ids_t: Int[Array, " T"], rows: int
) -> Float[Array, "X D"]:
    """fp32 sums of the rows with one id, for ids 0 to `rows` - 1, always added in the same order.

    Rows of other ids are left out. Work grows with T log T comparisons of ids and about 2 T
    additions of rows.
    """
    order = jnp.argsort(ids_t)
    sorted_t = ids_t[order]
    first_t = jnp.pad(sorted_t[1:] != sorted_t[:-1], (1, 0), constant_values=True)
    _, sums_td = jax.lax.associative_scan(
        _join, (first_t[:, None], grad_td[order].astype(jnp.float32))
    )
    total = jnp.zeros((rows, grad_td.shape[1]), jnp.float32)
    return total.at[places(sorted_t, rows)].set(sums_td, mode="drop", unique_indices=True)


def places(sorted_t: Int[Array, " T"], rows: int) -> Int[Array, " T"]:
    """Where what is summed up to each of the sorted ids is written, no two at the same place: with
    the last of each id to its row, all else beyond the table's `rows`.
    """
    last_t = jnp.pad(sorted_t[1:] != sorted_t[:-1], (0, 1), constant_values=True)
    used_t = last_t & (sorted_t >= 0) & (sorted_t < rows)
    return jnp.where(used_t, sorted_t, rows + jnp.arange(sorted_t.size))


def _join(
    before: tuple[jax.Array, jax.Array], after: tuple[jax.Array, jax.Array]
) -> tuple[jax.Array, jax.Array]:
    """Two runs of sorted rows: whether an id begins in them, and the sum of the last one."""
    (begins, total), (begins_after, total_after) = before, after
    return begins | begins_after, jnp.where(begins_after, total_after, total + total_after)


lookup.defvjp(_forward, _backward)
