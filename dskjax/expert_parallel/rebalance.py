"""Moving experts between slots while a model serves, one layer at a time.

    rebalancer = Rebalancer(params, cfg, sharding)
    later = replan(rebalancer.placement("moe_layers"), loads, layout).placement
    for layer, row in enumerate(later.phy2log):
        pending = rebalancer.fetch(params, "moe_layers", layer, row)      # steps go on meanwhile
        if pending is not None:
            params = rebalancer.commit(params, pending)                   # between two steps

A layer's weights and its maps change in one program, so no step sees the one without the other, and
maps are inputs of the step, so nothing is compiled again. The same is how vLLM's asynchronous EPLB
works, with its one-layer expert buffer.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jaxtyping import Array, Bool, Int, Int32

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.eplb import Placement
from dskjax.expert_parallel.fetch import Owners, fetch, store
from dskjax.expert_parallel.place import (
    WEIGHTS,
    experts_of,
    placed_experts,
    with_experts,
)
from dskjax.expert_parallel.replicas import check_plan, plan_of, tables
from dskjax.params import Params


def moves(
    old: Int[np.ndarray, " P"], new: Int[np.ndarray, " P"], *, ranks: int = 1
) -> Int32[np.ndarray, "M 2"]:
    """Which slots of a layer change and where each finds its expert: rows (slot, source slot).

    A source on the same rank is preferred, then those of an expert's sources that have been taken
    least: a hot expert that gets replicas everywhere does not leave through one rank alone.

    Args:
        old: the expert in each slot now.
        new: the expert to come; every expert of it is somewhere in `old`.
        ranks: R; slot p is on rank p // (P / R).
    """
    per_rank = len(old) // ranks
    taken = np.zeros(len(old), np.int32)
    out = []
    for slot in np.flatnonzero(old != new):
        sources = np.flatnonzero(old == new[slot])
        near = sources[sources // per_rank == slot // per_rank]
        choice = near[0] if near.size else sources[taken[sources].argmin()]
        taken[choice] += not near.size
        out.append((slot, choice))
    return np.array(out, np.int32).reshape(-1, 2)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Pending:
    """A layer that is fetched and not yet committed.

    Attributes:
        group: "moe_layers" or "mtp_layers".
        layer: in the group.
        before: i32 [P], the expert in each slot when it was fetched.
        after: i32 [P], the experts in the buffer.
        buffer: the layer's new weights.
    """

    group: str
    layer: int
    before: Int32[np.ndarray, " P"]
    after: Int32[np.ndarray, " P"]
    buffer: Params


class Rebalancer:
    """Moves experts of one model's params, and knows without asking the devices which expert each
    slot holds.

    Args:
        params: stacked params as `dskjax.expert_parallel.place` makes them.
        cfg: their config.
        sharding: mesh and rules that they were placed by.

    Raises:
        ValueError: no redundant experts, or maps that do not fit.
    """

    def __init__(self, params: Params, cfg: ModelConfig, sharding: Sharding | None = None):
        self._cfg, self._moe, self._owners = cfg, placed_experts(cfg), Owners(sharding)
        self._plans = plans_of(params, cfg)

    def placement(self, group: str) -> Placement:
        """The placement in use."""
        return Placement.of(self._plans[group], self._moe.n_routed_experts)

    def fetch(
        self, params: Params, group: str, layer: int, phy2log: Int[np.ndarray, " P"]
    ) -> Pending | None:
        """Starts copying a layer's experts to where they will be; None if all are there already.

        Steps may use `params` before and after; the copies are whole when a commit uses them.

        Args:
            params: the params in use.
            group: "moe_layers" or "mtp_layers".
            layer: in the group.
            phy2log: the expert to come in each slot.

        Raises:
            ValueError: no plan for this layer, such as one that leaves out an expert.
        """
        name = f"{group} layer {layer}"
        after = check_plan(np.asarray(phy2log)[None], 1, self._moe, name)[0]
        before = self._plans[group][layer].copy()
        changed = moves(before, after, ranks=self._owners.count)
        if not len(changed):
            return None
        source = np.arange(len(after))
        source[changed[:, 0]] = changed[:, 1]
        buffer = _fetch(params, self._cfg, group, layer, source, self._owners)
        return Pending(group=group, layer=layer, before=before, after=after, buffer=buffer)

    def commit(self, params: Params, pending: Pending) -> Params:
        """The params with a fetched layer in place, its weights and its maps.

        The expert weights of the layer's group and their maps are donated: use what is returned,
        which is written in place. All other leaves are the same arrays.

        Raises:
            ValueError: the layer has changed since it was fetched.
        """
        group, layer = pending.group, pending.layer
        if (self._plans[group][layer] != pending.before).any():
            raise ValueError(
                f"{group} layer {layer} was committed after this fetch of it began: fetch it again"
            )
        maps = {name: row[0] for name, row in tables(pending.after[None], self._moe).items()}
        experts = store(
            experts_of(params, group),
            layer,
            pending.buffer | maps,
            owners=self._owners,
            cfg=self._cfg,
        )
        self._plans[group][layer] = pending.after
        return with_experts(params, group, experts)


def plans_of(params: Params, cfg: ModelConfig) -> dict[str, Int32[np.ndarray, "L P"]]:
    """The expert in each slot, by group of layers, as the maps in the params say.

    Raises:
        ValueError: no redundant experts, or maps that do not name every slot once.
    """
    moe = placed_experts(cfg)
    return {
        group: plan_of(experts_of(params, group), moe, group)
        for group in ("moe_layers", "mtp_layers")
        if group in params
    }


def check(params: Params, cfg: ModelConfig, sharding: Sharding | None = None) -> None:
    """Compares every replica, weights and scales, with the first of its expert, bit by bit, on the
    devices. One layer's buffer is needed beside the params.

    Raises:
        ValueError: two of them differ, or maps do not name every slot once; the message has the
            layer, the expert and the slots.
    """
    moe, owners = placed_experts(cfg), Owners(sharding)
    for group, plan in plans_of(params, cfg).items():
        first = Placement.of(plan, moe.n_routed_experts).log2phy[:, :, 0]
        for layer, row in enumerate(plan):
            source = first[layer, row]
            buffer = _fetch(params, cfg, group, layer, source, owners)
            same = np.asarray(_same(_weights(params, group), layer, buffer))
            for slot in np.flatnonzero(~same)[:1]:
                raise ValueError(
                    f"{group} layer {layer}: slots {source[slot]} and {slot} both hold expert "
                    f"{row[slot]}, but their weights or scales differ"
                )


def _weights(params: Params, group: str) -> Params:
    experts = experts_of(params, group)
    return {name: experts[name] for name in WEIGHTS}


def _fetch(
    params: Params,
    cfg: ModelConfig,
    group: str,
    layer: int,
    source: Int[np.ndarray, " P"],
    owners: Owners,
) -> Params:
    slots = len(source)
    routes = owners.routes(source, slots)
    return fetch(_weights(params, group), layer, routes, slots=slots, owners=owners, cfg=cfg)


@jax.jit
def _same(stack: Params, layer: jax.Array | int, buffer: Params) -> Bool[Array, " P"]:
    """Whether each slot of a layer has the bits of the buffer."""

    def one(x: jax.Array, y: jax.Array) -> jax.Array:
        unequal = _bits(lax.dynamic_index_in_dim(x, layer, keepdims=False)) != _bits(y)
        return ~unequal.any(axis=range(1, y.ndim))

    leaves = jax.tree.leaves(jax.tree.map(one, stack, buffer))
    return functools.reduce(jnp.logical_and, leaves)


def _bits(x: jax.Array) -> jax.Array:
    return lax.bitcast_convert_type(x, f"uint{8 * x.dtype.itemsize}")
