"""`route` as one kernel in Triton: a warp a token, all of its scores in registers.

A float is compared by an integer in the same order, so that NaN has a place and a warp can reduce
in one instruction; the lowest index among equals is a second reduction. Groups that are no power of
two are padded: position p = group * width + column stands for expert group * size + column, in the
same order, and what is padded is below every score.
"""

import dataclasses
import functools
from collections.abc import Callable, Iterator
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plt
from jaxtyping import Array, Float

from pallas_kernels.router import reference
from pallas_kernels.triton_ops import (
    LAST,
    MINUS_INFINITY,
    compiler_params,
    divide,
    order,
    sigmoid,
    value,
)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gate:
    """The static arguments of `api.route`, and sizes."""

    experts: int
    top_k: int
    scoring_func: str
    n_group: int
    topk_group: int
    norm_topk_prob: bool
    routed_scaling_factor: float

    @property
    def size(self) -> int:
        """Experts of a group."""
        return self.experts // self.n_group

    @property
    def padded(self) -> tuple[int, int]:
        """Groups and experts of a group, as powers of two."""
        return pl.next_power_of_2(self.n_group), pl.next_power_of_2(self.size)

    def group(self, position: jax.Array) -> jax.Array:
        """Group of a padded position."""
        return position >> (self.padded[1].bit_length() - 1)

    def column(self, position: jax.Array) -> jax.Array:
        """Place of a padded position in its group."""
        return position & (self.padded[1] - 1)

    def expert(self, position: jax.Array) -> jax.Array:
        """Index of the expert at a padded position."""
        return self.group(position) * self.size + self.column(position)


def route(
    logits: Float[Array, "T E"],
    bias: Float[Array, " E"] | None,
    *,
    top_k: int,
    scoring_func: str,
    n_group: int,
    topk_group: int,
    norm_topk_prob: bool,
    routed_scaling_factor: float,
    num_warps: int = 1,
    interpret: bool = False,
) -> tuple[jax.Array, jax.Array]:
    """See `api.route`. Derivatives are the reference's.

    Args:
        num_warps: warps that share a token.
        interpret: run on a CPU.
    """
    gate = Gate(
        experts=logits.shape[1],
        top_k=top_k,
        scoring_func=scoring_func,
        n_group=n_group,
        topk_group=topk_group,
        norm_topk_prob=norm_topk_prob,
        routed_scaling_factor=routed_scaling_factor,
    )
    return _route(logits.astype(jnp.float32), bias, gate, num_warps, interpret)


@functools.partial(jax.custom_jvp, nondiff_argnums=(2, 3, 4))
def _route(
    logits: jax.Array, bias: jax.Array | None, gate: Gate, num_warps: int, interpret: bool
) -> tuple[jax.Array, jax.Array]:
    shape = (logits.shape[0], gate.top_k)
    args = (logits,) if bias is None else (logits, bias.astype(jnp.float32))
    return tuple(
        pl.pallas_call(
            functools.partial(_kernel, gate=gate, interpret=interpret),
            out_shape=[
                jax.ShapeDtypeStruct(shape, jnp.float32),
                jax.ShapeDtypeStruct(shape, jnp.int32),
            ],
            grid=(logits.shape[0],),
            compiler_params=compiler_params(num_warps),
            interpret=interpret,
            name="router",
        )(*args)
    )


@_route.defjvp
def _route_jvp(gate: Gate, num_warps: int, interpret: bool, primals: Any, tangents: Any) -> Any:
    static = dataclasses.asdict(gate)
    del static["experts"]
    _, slopes = jax.jvp(functools.partial(reference.route, **static), primals, tangents)
    return _route(*primals, gate, num_warps, interpret), slopes


def _kernel(logits_ref: Any, *refs: Any, gate: Gate, interpret: bool) -> None:
    bias_ref, weights_ref, experts_ref = refs if len(refs) == 3 else (None, *refs)
    token, (groups, width) = pl.program_id(0), gate.padded
    position = jnp.arange(groups * width)
    expert = gate.expert(position)
    is_real = (gate.column(position) < gate.size) & (gate.group(position) < gate.n_group)
    logits = plt.load(logits_ref.at[token, expert], mask=is_real, other=-jnp.inf)
    bias = None
    if bias_ref is not None:
        bias = plt.load(bias_ref.at[expert], mask=is_real, other=0.0)
    score = _scores(logits, gate, interpret)
    choice = score(logits) if bias is None else score(logits) + bias
    keys = jnp.where(is_real, order(choice), LAST)
    if gate.n_group > 1:
        is_kept = _is_kept(keys, position, gate, best=1 if bias is None else 2)
        outside = 0 if bias is None else MINUS_INFINITY
        keys = jnp.where(is_kept | ~is_real, keys, outside)

    rank = jnp.arange(pl.next_power_of_2(gate.top_k))
    is_chosen = rank < gate.top_k
    chosen, chosen_keys = jnp.zeros_like(rank), jnp.zeros_like(rank)
    for k, (where, key) in enumerate(_largest(keys, gate.top_k)):
        chosen = jnp.where(rank == k, where, chosen)
        chosen_keys = jnp.where(rank == k, key, chosen_keys)
    experts = gate.expert(chosen)
    if bias is None:
        weights = value(chosen_keys)  # by which they won: 0 in a dropped group
    else:
        weights = score(plt.load(logits_ref.at[token, experts]))
    weights = jnp.where(is_chosen, weights, 0.0)
    if gate.norm_topk_prob:
        weights = divide(weights, weights.sum() + 1e-20, interpret)
    weights *= gate.routed_scaling_factor
    plt.store(weights_ref.at[token, rank], weights, mask=is_chosen)
    plt.store(experts_ref.at[token, rank], experts, mask=is_chosen)


def _scores(logits: jax.Array, gate: Gate, interpret: bool) -> Callable[[jax.Array], jax.Array]:
    """The function from a token's logits, or some of them, to scores."""
    if gate.scoring_func == "sigmoid":
        return lambda x: sigmoid(x, interpret)
    most = logits.max()
    total = jnp.exp(logits - most).sum()
    return lambda x: divide(jnp.exp(x - most), total, interpret)


def _is_kept(keys: jax.Array, position: jax.Array, gate: Gate, best: int) -> jax.Array:
    """Whether a position is in one of the groups whose `best` largest scores have the largest
    sums.
    """
    table = keys.reshape(gate.padded)
    group, column = jnp.arange(gate.padded[0]), jnp.arange(gate.padded[1])[None]
    largest = table.max(axis=1)
    if best == 2:
        first = jnp.where(table == largest[:, None], column, gate.padded[1]).min(axis=1)
        second = jnp.where(column == first[:, None], LAST, table).max(axis=1)
        largest = order(value(largest) + value(second))
    kept = jnp.int32(0)
    for where, _ in _largest(jnp.where(group < gate.n_group, largest, LAST), gate.topk_group):
        kept |= 1 << where
    return (kept >> gate.group(position)) & 1 == 1


def _largest(keys: jax.Array, count: int) -> Iterator[tuple[jax.Array, jax.Array]]:
    """(position, key) of the `count` largest, which are above `LAST`; lowest position first."""
    position = jnp.arange(keys.shape[0])
    for _ in range(count):
        key = keys.max()
        where = jnp.where(keys == key, position, keys.shape[0]).min()
        yield where, key
        keys = jnp.where(position == where, LAST, keys)
