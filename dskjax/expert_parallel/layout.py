"""Which rows go to which rank: the bookkeeping of an expert exchange (DeepEP's dispatch layout).

Experts are split over R ranks in equal runs: rank r owns [r * E / R, (r + 1) * E / R). A row is
sent to a rank once, however many of its experts live there. Towards each rank a rank has `capacity`
slots, filled in row order; with capacity = rows nothing can overflow.
"""

import dataclasses
import typing

import jax
import jax.numpy as jnp
from jaxtyping import Array, Int


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Layout:
    """Where the T rows of this rank go.

    Attributes:
        source: i32 [R, C], row that fills each slot towards each rank; T is an empty slot.
        place: i32 [T, K], flat slot (rank * C + slot) that carries the row for its k-th choice;
            R * C where the choice needs none: it is no expert, or an earlier choice of the row goes
            to the same rank.
        counts: i32 [R], rows that want to go to each rank; more than C of them do not fit.
    """

    source: Int[Array, "R C"]
    place: Int[Array, "T K"]
    counts: Int[Array, " R"]

    @property
    def capacity(self) -> int:
        """C."""
        return self.source.shape[1]


def layout(experts: Int[Array, "T K"], *, per_rank: int, ranks: int, capacity: int) -> Layout:
    """Lays out one exchange.

    Args:
        experts: i32, ids over all ranks; -1 is no expert. A row may name an expert once.
        per_rank: experts of a rank, E / R.
        ranks: R.
        capacity: C, slots towards each rank; rows past it are left out (`counts` tells).
    """
    rows = experts.shape[0]
    rank_tk = jnp.where(experts >= 0, experts // per_rank, ranks)
    goes_tr = (rank_tk[:, :, None] == jnp.arange(ranks)).any(axis=1)
    slot_tr = jnp.cumsum(goes_tr, axis=0, dtype=jnp.int32) - 1
    slot_tk = jnp.take_along_axis(slot_tr, jnp.minimum(rank_tk, ranks - 1), axis=1)
    earlier = jnp.tril(jnp.ones((experts.shape[1],) * 2, bool), -1)
    again_tk = ((rank_tk[:, :, None] == rank_tk[:, None, :]) & earlier).any(axis=2)
    sent_tk = (rank_tk < ranks) & ~again_tk & (slot_tk < capacity)
    place = jnp.where(sent_tk, rank_tk * capacity + slot_tk, ranks * capacity)
    row_tk = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], place.shape)
    source = jnp.full(ranks * capacity, rows, jnp.int32).at[place].set(row_tk, mode="drop")
    counts = goes_tr.sum(axis=0, dtype=jnp.int32)
    return Layout(source=source.reshape(ranks, capacity), place=place, counts=counts)


def spread(x: jax.Array, where: Layout) -> jax.Array:
    """Rows [T, ...] to slots [R, C, ...]; an empty slot is 0. The transpose of `collect`."""
    return _spread(x, where)


def collect(y: jax.Array, where: Layout) -> jax.Array:
    """Sums the slots [R, C, ...] of each row to [T, ...]: fp32, in the order of the row's choices,
    then the dtype of y. Empty slots may hold anything.
    """
    return _collect(y, where)


@jax.custom_vjp
def _spread(x: jax.Array, where: Layout) -> jax.Array:
    return x.at[where.source].get(mode="fill", fill_value=0)


@jax.custom_vjp
def _collect(y: jax.Array, where: Layout) -> jax.Array:
    flat = y.reshape(-1, *y.shape[2:])
    total = jnp.zeros((where.place.shape[0], *flat.shape[1:]), jnp.float32)
    for k in range(where.place.shape[1]):
        total += flat.at[where.place[:, k]].get(mode="fill", fill_value=0).astype(jnp.float32)
    return total.astype(y.dtype)


# Both ways by gathers: no scatter, so that a GPU repeats its bits.
_spread.defvjp(
    lambda x, where: (_spread(x, where), where), lambda where, grad: (_collect(grad, where), None)
)
_collect.defvjp(
    lambda y, where: (_collect(y, where), where), lambda where, grad: (_spread(grad, where), None)
)
