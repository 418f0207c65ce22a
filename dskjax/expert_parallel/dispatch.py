"""Dispatch and combine of an expert exchange, inside `shard_map`: DeepEP's two modes over a padded
`all_to_all`.

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
    """

    x: jax.Array | QTensor
    experts: Int[Array, "M K"]
    weights: Float[Array, "M K"]
    layout: Layout


def dispatch(
    x: Float[Array, "T D"],
    experts: Int[Array, "T K"],
    weights: Float[Array, "T K"],
    *,
    axis: str,
    per_rank: int,
    capacity: int | None = None,
    payload: Payload = "native",
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
    """
    ranks, rows = lax.axis_size(axis), x.shape[0]
    where = layout(
        experts, per_rank=per_rank, ranks=ranks, capacity=rows if capacity is None else capacity
    )
    ids = _rebased(experts, where, per_rank)
    weights_mk = _flat(spread(weights.astype(jnp.float32), where))
    if payload == "fp8":
        q = act_quant(x)
        sent = (_flat(spread(q.values, where)), _flat(spread(q.scales, where)), ids, weights_mk)
        values, scales, ids, weights_mk = message.swap(sent, axis)
        rows_md: jax.Array | QTensor = dataclasses.replace(q, values=values, scales=scales)
    else:
        rows_md, ids, weights_mk = message.swap((_flat(spread(x, where)), ids, weights_mk), axis)
    return Received(x=rows_md, experts=ids, weights=weights_mk, layout=where)


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
    (back,) = message.swap((y,), axis)
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
