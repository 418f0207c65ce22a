"""Planning while a placement is in use: nearly as even as a new plan, with few experts moved.

A new plan shares almost nothing with the one in use, however little the loads differ, and every
slot that changes is an expert's weights to copy. So the fresh plan only says how even is even
enough, and each layer takes the first of these that is:

    1. the placement in use, exchanged until it is (`dskjax.eplb.exchange`), if it is not far off
    2. the placement in use, given the fresh plan's numbers of replicas, exchanged until it is
    3. the same, with exchanges chosen by what they gain, whatever they move
    4. the fresh plan, its nodes and their GPUs renamed after those it shares most with

The fourth always is, and a second or third with more moves than the fourth is not taken. A replica
that stays on its GPU stays in its slot.
"""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Bool, Float64, Int, Int32

from dskjax.eplb.balance import gpu_loads
from dskjax.eplb.exchange import settle
from dskjax.eplb.layout import Layout
from dskjax.eplb.placement import Placement, replicas
from dskjax.eplb.plan import Policy, Scope, plan, scope
from dskjax.eplb.rename import renamed, stay

_FAR = 2.0
"""A fullest GPU this many times above what is even enough is not brought there by few exchanges."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Replan:
    """A placement and how to get there.

    Attributes:
        placement: the new one.
        moves: i32 [M, 4], rows (layer, slot, expert in it now, expert to come), in order of layers
            and slots.
    """

    placement: Placement
    moves: Int32[np.ndarray, "M 4"]


def replan(
    current: Placement,
    weight: Any,
    layout: Layout,
    policy: Policy = Policy.GLOBAL_REFINED,
    *,
    tolerance: float = 0.02,
    threshold: float = 1.0,
) -> Replan:
    """A placement for new loads that moves few experts between GPUs.

    A layer without any load keeps its placement, unless groups have to come together.

    Args:
        current: the placement in use.
        weight: new loads [L, E].
        layout: slots, GPUs, nodes, groups.
        policy: of the fresh plan. A hierarchical one keeps groups on nodes, here too.
        tolerance: the fullest GPU of a layer may have this part more load than in the fresh plan.
        threshold: an imbalance, fullest over mean, that is even enough whatever the fresh plan's.

    Raises:
        ValueError: see `plan`; `current` is of another size; a tolerance below 0 or a threshold
            below 1.
    """
    loads = layout.check(weight)
    if not (tolerance >= 0 and threshold >= 1):
        raise ValueError(f"{tolerance=} must be 0 or more, and {threshold=} at least 1")
    held = (*current.logcnt.shape, current.phy2log.shape[1])
    needed = (*loads.shape, layout.num_replicas)
    if held != needed:
        raise ValueError(
            f"the placement in use has (layers, experts, slots) {held}, the loads and the layout "
            f"{needed}"
        )
    fresh = plan(loads, layout, policy).phy2log.astype(np.int64)
    limit = np.maximum(
        (1 + tolerance) * gpu_loads(loads, fresh, layout.num_gpus).max(axis=1),
        threshold * loads.sum(axis=1) / layout.num_gpus,
    )
    now = current.phy2log.astype(np.int64)
    slots = _Search(now, loads, limit, layout.num_gpus, scope(policy, layout)).run(fresh)
    layer, slot = np.nonzero(slots != now)
    moves = np.stack([layer, slot, now[layer, slot], slots[layer, slot]], axis=1)
    return Replan(placement=Placement.of(slots, loads.shape[1]), moves=moves.astype(np.int32))


class _Search:
    """The layers of a placement in use, each of which is left open until it has its new slots."""

    def __init__(
        self,
        now: Int[np.ndarray, "L P"],
        loads: Float64[np.ndarray, "L E"],
        limit: Float64[np.ndarray, " L"],
        gpus: int,
        kept: Scope,
    ):
        self._now, self._loads, self._limit = now, loads, limit
        self._gpus, self._kept = gpus, kept
        self._slots = now.copy()
        self._open = np.ones(len(now), bool)

    def run(self, fresh: Int[np.ndarray, "L P"]) -> Int[np.ndarray, "L P"]:
        """The new slots, given those of the fresh plan."""
        experts, gpus, nodes = self._loads.shape[1], self._gpus, self._kept.nodes
        fullest = gpu_loads(self._loads, self._now, gpus).max(axis=1)
        whole = _keeps_groups(self._now, experts, self._kept)
        rows = np.flatnonzero(whole & (fullest <= _FAR * self._limit))
        self._exchange(rows, self._now[rows], count_moves=True)
        rows = np.flatnonzero(self._open)
        if rows.size:
            now = self._now[rows]
            fourth = stay(now, renamed(now, fresh[rows], experts, gpus, nodes), gpus)
            layers = zip(now, fourth, self._loads[rows], strict=True)
            start = np.stack([_mended(*layer, gpus, nodes) for layer in layers])
            most = (fourth != now).sum(axis=1)
            for count_moves in (True, False):
                left = self._open[rows]
                self._exchange(
                    rows[left], start[left], count_moves=count_moves, most_moves=most[left]
                )
            left = self._open[rows]
            self._slots[rows[left]] = fourth[left]
        return self._slots

    def _exchange(
        self,
        rows: Int[np.ndarray, " n"],
        start: Int[np.ndarray, "n P"],
        *,
        count_moves: bool,
        most_moves: Int[np.ndarray, " n"] | None = None,
    ) -> None:
        """Exchanges from `start`, and closes those of the layers `rows` that are even enough."""
        if not rows.size:
            return
        now, loads, limit = self._now[rows], self._loads[rows], self._limit[rows]
        found = settle(
            start,
            loads,
            self._gpus,
            limit,
            num_nodes=self._kept.nodes,
            origin=now if count_moves else None,
            rounds=now.shape[1] // 3 if count_moves else None,
        )
        found = stay(now, found, self._gpus)
        good = gpu_loads(loads, found, self._gpus).max(axis=1) <= limit
        if most_moves is not None:
            good &= (found != now).sum(axis=1) <= most_moves
        self._slots[rows[good]] = found[good]
        self._open[rows[good]] = False


def _keeps_groups(
    slots: Int[np.ndarray, "L P"], num_experts: int, kept: Scope
) -> Bool[np.ndarray, " L"]:
    """Whether each group of experts is on one node only, by layer."""
    layers, num_slots = slots.shape
    group = slots // (num_experts // kept.groups)
    node = np.arange(num_slots) // (num_slots // kept.nodes)
    there = np.zeros((layers, kept.groups, kept.nodes), bool)
    there[np.arange(layers)[:, None], group, node] = True
    return (there.sum(axis=2) == 1).all(axis=1)


def _mended(
    now: Int[np.ndarray, " P"],
    plan: Int[np.ndarray, " P"],
    loads: Float64[np.ndarray, " E"],
    gpus: int,
    nodes: int,
) -> Int[np.ndarray, " P"]:
    """One layer of the placement in use, each node with the plan's replicas.

    Surplus replicas go from the fullest GPUs. Missing ones come heaviest first, each to the
    lightest GPU with room, if possible one without its expert.
    """
    size, per_node = len(now) // gpus, gpus // nodes
    gpu = np.arange(len(now)) // size
    node = gpu // per_node
    left = replicas(plan.reshape(nodes, -1), len(loads))
    share = loads / left.sum(axis=0)
    filled = share[now].reshape(gpus, size).sum(axis=1)
    slots = np.full_like(now, -1)
    for slot in np.argsort(filled[gpu], kind="stable"):
        if left[node[slot], now[slot]]:
            left[node[slot], now[slot]] -= 1
            slots[slot] = now[slot]
    by_gpu = slots.reshape(gpus, size)
    filled = np.where(by_gpu >= 0, share[by_gpu], 0).sum(axis=1)
    at, missing = np.nonzero(left)
    times = left[at, missing]
    at, missing = np.repeat(at, times), np.repeat(missing, times)
    for k in np.argsort(-share[missing], kind="stable"):
        mine = slice(at[k] * per_node, (at[k] + 1) * per_node)
        full = (by_gpu[mine] >= 0).all(axis=1)
        beside = (by_gpu[mine] == missing[k]).any(axis=1)
        into = at[k] * per_node + np.lexsort((filled[mine], beside, full))[0]
        by_gpu[into, by_gpu[into].argmin()] = missing[k]
        filled[into] += share[missing[k]]
    return slots
