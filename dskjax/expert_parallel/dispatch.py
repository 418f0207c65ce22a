"""Dispatch and combine of an expert exchange, inside `shard_map`: DeepEP's two modes over a padded
`all_to_all`, or over puts into the memory of peers.

    throughput     rows as they arrive, ordered by rank and row, with their choices rebased to this
                   rank's experts: what grouped products want. Differentiable.
    low_latency    each expert's rows in its own slots, in the same order: what masked products
                   over few rows want.

In both a row crosses once per rank, its router weights with it. The rank that computes an expert
multiplies by the weight and sums a row's experts in fp32, so that one row comes back per (row,
rank) and weights are applied once. (DeepEP's low-latency kernels send a copy per chosen expert and
weigh them on return, which wants puts of single rows; padded to what could arrive that would be
eight times the bytes.)

Source: DeepEP, https://github.com/deepseek-ai/DeepEP; DeepSeek-V3 report, section 3.2.
"""

import dataclasses
import typing
from typing import Literal

import jax
import jax.numpy as jnp
from jax import lax
from jaxtyping import Array, Float, Int

from dskjax.expert_parallel import message
from dskjax.expert_parallel.layout import Layout, collect, layout, spread
from pallas_kernels import act_quant
from pallas_kernels.quant import QTensor, dequantise

Payload = Literal["native", "fp8"]
Transport = Literal["all_to_all", "peer"]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Received:
    """What a rank gets: M = R * C rows, those of rank r in slots [r * C, (r + 1) * C).

    Attributes:
        x: [M, D] rows; with an fp8 payload a QTensor of e4m3 values and a scale per 128. Empty
            slots are 0.
        experts: i32 [M, K], ids among this rank's experts; -1 where the choice lives elsewhere.
        weights: float32 [M, K].
        layout: of the rows this rank sent; `combine` needs it.
        counts: i32 [R], rows from each rank, where only these travel; None where all slots do.
    """

    x: jax.Array | QTensor
    experts: Int[Array, "M K"]
    weights: Float[Array, "M K"]
    layout: Layout
    counts: Int[Array, " R"] | None = None


def dispatch(
    x: Float[Array, "T D"],
    experts: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    axis: str,
    per_rank: int,
    capacity: int | None = None,
    payload: Payload = "native",
    transport: Transport = "all_to_all",
) -> Received:
    """Sends rows to the ranks that own their experts; every rank of `axis` must call.

    Args:
        x: this rank's rows, as many on every rank.
        experts: i32, chosen experts over all ranks; -1 is none, so a row of -1 goes nowhere.
        weights: float32 router weights.
        axis: mesh axis that the experts are split over.
        per_rank: experts of a rank.
        capacity: rows that fit towards each rank; None: all, so that none is ever dropped. With
            less, ask `overflows` first.
        payload: "native" sends x as it is and is differentiable; "fp8" sends e4m3 with a scale per
            128 channels (DeepSeek-V3 report, section 3.2.1).
        transport: "all_to_all" sends every slot; "peer" only those that hold rows, on GPUs by
            writing them into the memory of peers. `combine` does the same.

    Raises:
        NotImplementedError: "peer" on GPUs that cannot; the message says why.
    """
    ranks, rows = lax.axis_size(axis), x.shape[0]
    where = layout(
        experts, per_rank=per_rank, ranks=ranks, capacity=rows if capacity is None else capacity
    )
    ids = _rebased(experts, where, per_rank)
    weights_mk = _flat(spread(weights.astype(jnp.float32), where))
    q = act_quant(x) if payload == "fp8" else None
    rows = (x,) if q is None else (q.values, q.scales)
    sent = (*(_flat(spread(a, where)) for a in rows), ids, weights_mk)
    (*rows, ids, weights_mk), counts = _travel(sent, where, axis, transport)
    if q is not None:
        rows = [dataclasses.replace(q, values=rows[0], scales=rows[1])]
    if counts is not None:
        ids = jnp.where(_is_there(counts, where.capacity), ids, -1)
    return Received(x=rows[0], experts=ids, weights=weights_mk, layout=where, counts=counts)


def _travel(
    sent: tuple[jax.Array, ...], where: Layout, axis: str, transport: Transport
) -> tuple[tuple[jax.Array, ...], jax.Array | None]:
    """What arrives, empty slots 0 where they were 0 or do not travel; and `Received.counts`."""
    if transport == "all_to_all":
        return message.swap(sent, axis), None
    got, counts = message.put(sent, where.counts, axis)
    is_there = _is_there(counts, where.capacity)
    return tuple(jnp.where(is_there, a, jnp.zeros((), a.dtype)) for a in got), counts


def _is_there(counts: jax.Array, capacity: int) -> jax.Array:
    """bool [M, 1]: slots that rows arrived in."""
    return (jnp.arange(capacity) < counts[:, None]).reshape(-1, 1)


def combine(y: Float[Array, "M D"], received: Received, *, axis: str) -> Float[Array, "T D"]:
    """Brings results back: for each row of this rank the sum over the ranks it went to.

    Args:
        y: what this rank's experts made of `received.x`, weighted and summed per row. Empty slots
            may hold anything.
        received: of the dispatch.
        axis: as in `dispatch`.

    Returns:
        [T, D] in the dtype of y, summed in fp32 in the order of the row's choices.
    """
    shape = (*received.layout.source.shape, y.shape[-1])
    if received.counts is None:
        (back,) = message.swap((y,), axis)
    else:
        (back,), _ = message.put((y,), received.counts, axis)
    return collect(back.reshape(shape), received.layout)


def _flat(x: jax.Array) -> jax.Array:
    return x.reshape(-1, x.shape[-1])


def _rebased(experts: jax.Array, where: Layout, per_rank: int) -> jax.Array:
    """i32 [R * C, K]: choices of each slot's row as ids of the rank it goes to, -1 elsewhere."""
    ids = experts.at[where.source].get(mode="fill", fill_value=-1)
    local = ids - jnp.arange(where.source.shape[0])[:, None, None] * per_rank
    return _flat(jnp.where((ids >= 0) & (local >= 0) & (local < per_rank), local, -1))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class ExpertSlots:
    """Received rows by expert.

    Attributes:
        x: [E / R, M, D], the rows of each expert; past its count slots are 0.
        counts: i32 [E / R].
        slot: i32 [M, K], slot of each choice with its expert; M where there is none.
    """

    x: jax.Array
    counts: Int[Array, " E"]
    slot: Int[Array, "M K"]


def by_expert(received: Received, *, per_rank: int, dtype: typing.Any) -> ExpertSlots:
    """Sorts what arrived into slots per expert: the low-latency form."""
    x, experts = received.x, received.experts
    rows = experts.shape[0]
    names_me = (experts[:, :, None] == jnp.arange(per_rank)).any(axis=1)
    slot_me = jnp.cumsum(names_me, axis=0, dtype=jnp.int32) - 1
    slot = jnp.take_along_axis(slot_me, jnp.maximum(experts, 0), axis=1)
    slot = jnp.where(experts >= 0, slot, rows)
    row = jnp.broadcast_to(jnp.arange(rows, dtype=jnp.int32)[:, None], slot.shape)
    source = jnp.full((per_rank, rows), rows, jnp.int32).at[experts, slot].set(row, mode="drop")
    dense = dequantise(x, dtype)
    return ExpertSlots(
        x=dense.at[source].get(mode="fill", fill_value=0),
        counts=names_me.sum(axis=0, dtype=jnp.int32),
        slot=slot,
    )


def weigh(y: Float[Array, "E M D"], slots: ExpertSlots, received: Received) -> Float[Array, "M D"]:
    """Weighted fp32 sum of each received row's experts, for `combine`. Slots past an expert's count
    may hold anything.
    """
    experts = jnp.maximum(received.experts, 0)
    total = jnp.zeros((slots.slot.shape[0], y.shape[-1]), jnp.float32)
    for k in range(slots.slot.shape[1]):
        found = y.at[experts[:, k], slots.slot[:, k]].get(mode="fill", fill_value=0)
        total += found.astype(jnp.float32) * received.weights[:, k, None]
    return total.astype(y.dtype)
