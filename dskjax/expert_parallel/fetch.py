"""Experts on their way from slot to slot, one layer at a time: `fetch` copies them into a buffer of
a layer's size while steps still use the weights, `store` writes the buffer into its layer's place.

Slots are split over the ranks of one mesh axis. Whatever a plan asks for, the program is the same:
for every distance between ranks a loop sends one expert at a time, as many times as the routes say,
so that what does not move is not sent and no rank ever holds more than its part of the buffer.
"""

import dataclasses
import functools
import typing

import jax
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec
from jaxtyping import Int

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.expert_parallel.exchange import Exchange
from dskjax.layers.moe import Experts
from dskjax.params import Params, specs_of


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
@typing.no_type_check  # a pytree is also rebuilt from specs, shapes and None: no check at birth
class Routes:
    """Where the slots of a layer get their experts, for R ranks with S slots each to fill.

    Attributes:
        local: i32 [R * S], slot of the same rank to copy; anything where it comes from elsewhere.
        rounds: i32 [R], how often the ranks send over each distance (receiver - sender) mod R.
        send: i32 [R, R, S], slot of the sender, by distance, sender and round.
        into: i32 [R, R, S], slot of the receiver, by distance, receiver and round; S is none.
    """

    local: jax.Array | np.ndarray
    rounds: jax.Array | np.ndarray
    send: jax.Array | np.ndarray
    into: jax.Array | np.ndarray


@dataclasses.dataclass(frozen=True)
class Owners:
    """Who holds the slots.

    Attributes:
        sharding: mesh and rules; None is one device, or weights whose split is left to XLA.
    """

    sharding: Sharding | None

    @functools.cached_property
    def axis(self) -> str | None:
        """Mesh axis that slots are split over."""
        found = Exchange.of(self.sharding)
        return None if found is None else found.axis or None

    @property
    def count(self) -> int:
        """R."""
        if self.sharding is None or self.axis is None:
            return 1
        return self.sharding.mesh.shape[self.axis]

    def routes(self, source: Int[np.ndarray, " P"], slots: int) -> Routes:
        """Routes that fill slots from slots.

        Args:
            source: for each slot to fill, the slot it copies.
            slots: how many there are to copy from.
        """
        ranks = self.count
        if len(source) % ranks:
            source = np.tile(source, ranks)
        fits = len(source) // ranks
        to, into = np.divmod(np.arange(len(source)), fits)
        if slots % ranks:
            rank, slot = to, source
        else:
            rank, slot = np.divmod(source, slots // ranks)
        send = np.zeros((ranks, ranks, fits), np.int32)
        where = np.full_like(send, fits)
        sent = np.zeros((ranks, ranks), np.int32)
        for p in np.flatnonzero(rank != to):
            far = (to[p] - rank[p]) % ranks
            nth = sent[far, to[p]]
            send[far, rank[p], nth], where[far, to[p], nth] = slot[p], into[p]
            sent[far, to[p]] += 1
        local = np.where(rank == to, slot, 0).astype(np.int32)
        return Routes(local=local, rounds=sent.max(axis=1), send=send, into=where)

    def specs(self, experts: Params, cfg: ModelConfig, *, stacked: bool) -> Params:
        """PartitionSpecs of weights and maps of `Experts`, of all layers or of one."""
        assert self.sharding is not None and cfg.moe is not None
        declared = specs_of(Experts, cfg.hidden_size, cfg.moe)
        out = {}
        for name, value in experts.items():
            axes = (("layers",) if stacked else ()) + declared[name].axes
            where = self.sharding.of_weight(axes, value, f"experts.{name}")
            out[name] = jax.tree.map(lambda x: x.spec, where)
        return out

    def shardings(self, experts: Params, cfg: ModelConfig) -> Params:
        """NamedShardings of weights and maps of all layers."""
        assert self.sharding is not None
        mesh = self.sharding.mesh
        specs = self.specs(experts, cfg, stacked=True)
        return jax.tree.map(lambda spec: NamedSharding(mesh, spec), specs)


@functools.partial(jax.jit, static_argnames=("slots", "owners", "cfg"))
def fetch(
    stack: Params,
    layer: jax.Array | int,
    routes: Routes,
    *,
    slots: int,
    owners: Owners,
    cfg: ModelConfig,
) -> Params:
    """The buffer of a layer: the weights of each slot from the slot that the routes name.

    Args:
        stack: `gate_up_proj` and `down_proj` of all layers, [L, slots, ...]; arrays, QTensors
            or packed.
        layer: which layer.
        routes: of `Owners.routes`.
        slots: how many are filled.
        owners: who holds them.
        cfg: the model.

    Returns:
        The same leaves, [slots to fill, ...].
    """
    run = functools.partial(_fetch_on_rank, axis=owners.axis)
    if owners.sharding is None:
        return run(stack, layer, routes)
    filled = jax.tree.map(lambda x: jax.ShapeDtypeStruct((slots, *x.shape[2:]), x.dtype), stack)
    return jax.shard_map(
        run,
        mesh=owners.sharding.mesh,
        in_specs=(owners.specs(stack, cfg, stacked=True), PartitionSpec(), PartitionSpec()),
        out_specs=owners.specs(filled, cfg, stacked=False),
        check_vma=False,
    )(stack, layer, routes)


def _fetch_on_rank(
    stack: Params, layer: jax.Array | int, routes: Routes, *, axis: str | None
) -> Params:
    if axis is None:
        return jax.tree.map(lambda x: x[layer, routes.local], stack)
    ranks, me = lax.axis_size(axis), lax.axis_index(axis)
    mine = routes.local.reshape(ranks, -1)[me]
    buffer = jax.tree.map(lambda x: x[layer, mine], stack)
    for far in range(1, ranks):
        pairs = [(rank, (rank + far) % ranks) for rank in range(ranks)]

        def send(nth: jax.Array, buffer: Params, far: int = far, pairs: list = pairs) -> Params:
            slot, into = routes.send[far, me, nth], routes.into[far, me, nth]

            def one(x: jax.Array, y: jax.Array) -> jax.Array:
                return y.at[into].set(lax.ppermute(x[layer, slot], axis, pairs), mode="drop")

            return jax.tree.map(one, stack, buffer)

        buffer = lax.fori_loop(0, routes.rounds[far], send, buffer)
    return buffer


@functools.partial(jax.jit, static_argnames=("owners", "cfg"), donate_argnums=0)
def store(
    stack: Params,
    layer: jax.Array | int,
    buffer: Params,
    *,
    owners: Owners,
    cfg: ModelConfig,
) -> Params:
    """The stack with a layer replaced, in place: the stack is donated.

    Args:
        stack: weights, and maps if there are any, of all layers.
        layer: which layer.
        buffer: the same leaves of that layer.
        owners: who holds the slots.
        cfg: the model.
    """

    def run(stack: Params, layer: jax.Array | int, buffer: Params) -> Params:
        return jax.tree.map(
            lambda x, y: lax.dynamic_update_index_in_dim(x, y, layer, 0), stack, buffer
        )

    if owners.sharding is None:
        return run(stack, layer, buffer)
    whole = owners.specs(stack, cfg, stacked=True)
    return jax.shard_map(
        run,
        mesh=owners.sharding.mesh,
        in_specs=(whole, PartitionSpec(), owners.specs(buffer, cfg, stacked=False)),
        out_specs=whole,
        check_vma=False,
    )(stack, layer, buffer)
