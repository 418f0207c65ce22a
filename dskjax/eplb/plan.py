"""Planning from scratch: DeepSeek's plans, and plans that local search made more even.

DeepSeek's greedy replication makes the heaviest replica as light as possible, which is not always
what packs well: a hot expert whose replicas fill their GPUs leaves the rest of the GPUs to the rest
of the experts. So a refined plan is searched from the greedy numbers of replicas, if that is not
even enough also from numbers with which hot experts just about fill their GPUs, and if DeepSeek's
own plan of a layer is more even than both, it is taken.
"""

import enum
from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float64, Int

from dskjax.eplb import greedy
from dskjax.eplb.balance import gpu_loads
from dskjax.eplb.exchange import separate, settle
from dskjax.eplb.layout import Layout
from dskjax.eplb.placement import Placement

CLOSE = 1e-3
"""A fullest GPU this little above the mean is even enough."""
_FILL = 0.95
"""Part of its GPU's mean load that a replica of a hot expert may be, in the second start."""
_UNSEEN = 1e-6
"""Load of an expert without any, in mean loads: spare slots are spread over such experts, too."""


class Policy(enum.StrEnum):
    """How to plan.

    `global`: any expert on any GPU. `hierarchical`: all experts of a group on one node, so that a
    token that the router limits to some groups visits few nodes. Both are DeepSeek's greedy plans;
    `deepseek` is hierarchical if the groups divide over the nodes and global otherwise.
    `*_refined`: the same freedom, more even.
    """

    DEEPSEEK = "deepseek"
    GLOBAL = "global"
    HIERARCHICAL = "hierarchical"
    GLOBAL_REFINED = "global_refined"
    HIERARCHICAL_REFINED = "hierarchical_refined"


class Scope(NamedTuple):
    """What has to stay together.

    Attributes:
        groups: groups of experts, 1 if they do not matter.
        nodes: nodes that share the groups out, 1 if they do not matter.
    """

    groups: int
    nodes: int


def scope(policy: Policy, layout: Layout) -> Scope:
    """Groups and nodes as a policy sees them.

    Raises:
        ValueError: a hierarchical policy where groups do not divide over nodes.
    """
    if policy.startswith("hierarchical") and not layout.groups_divide:
        raise ValueError(
            f"policy {policy} needs num_groups={layout.num_groups} to be a multiple of "
            f"num_nodes={layout.num_nodes}; use global or global_refined"
        )
    if policy.startswith("global") or not layout.groups_divide:
        return Scope(1, 1)
    return Scope(layout.num_groups, layout.num_nodes)


def plan(weight: Any, layout: Layout, policy: Policy = Policy.GLOBAL_REFINED) -> Placement:
    """A placement for these loads, whatever is in place now.

    Args:
        weight: loads [L, E].
        layout: slots, GPUs, nodes, groups.
        policy: see `Policy`.

    Raises:
        ValueError: loads that are none or do not fit the layout, or see `scope`.
    """
    loads = layout.check(weight)
    groups, nodes = scope(policy, layout)
    if policy.endswith("_refined"):
        return Placement.of(_refined(loads, layout, groups, nodes), loads.shape[1])
    return greedy.rebalance_experts(loads, layout.num_replicas, groups, nodes, layout.num_gpus)


def _refined(
    loads: Float64[np.ndarray, "L E"], layout: Layout, groups: int, nodes: int
) -> Int[np.ndarray, "L P"]:
    slots, gpus = layout.num_replicas, layout.num_gpus
    order = greedy.experts_by_node(loads, _spread_groups(loads, groups, nodes))
    of_nodes = np.take_along_axis(loads, order, axis=1).reshape(len(loads), nodes, -1).sum(axis=2)
    limit = (1 + CLOSE) * of_nodes.max(axis=1) * nodes / gpus

    def search(rows: np.ndarray, fill: float | None = None) -> np.ndarray:
        start = _start(loads[rows], order[rows], layout, nodes, fill)
        return settle(start, loads[rows], gpus, limit[rows], num_nodes=nodes)

    def own(rows: np.ndarray) -> np.ndarray:
        return greedy.rebalance_experts(loads[rows], slots, groups, nodes, gpus).phy2log

    best = np.empty((len(loads), slots), np.int64)
    fullest = np.full(len(loads), np.inf)
    for attempt in (search, lambda rows: search(rows, _FILL), own):
        open_ = np.flatnonzero(fullest > limit)
        if not open_.size:
            break
        found = attempt(open_)
        reached = gpu_loads(loads[open_], found, gpus).max(axis=1)
        better = reached < fullest[open_]
        best[open_[better]] = found[better]
        fullest[open_[better]] = reached[better]
    return best


def _start(
    loads: Float64[np.ndarray, "n E"],
    order: Int[np.ndarray, "n E"],
    layout: Layout,
    nodes: int,
    fill: float | None,
) -> Int[np.ndarray, "n P"]:
    """Greedy numbers and packing, but no more replicas than GPUs, and on different ones."""
    mean = loads.mean(axis=1, keepdims=True)
    seen = np.where(mean > 0, loads + _UNSEEN * mean, 1.0)
    slots, gpus = layout.num_replicas, layout.num_gpus
    start, _ = greedy.fill_nodes(seen, order, slots, nodes, gpus, capped=True, fill=fill)
    return separate(start, loads, gpus, num_nodes=nodes)


def _spread_groups(
    loads: Float64[np.ndarray, "L E"], groups: int, nodes: int
) -> Int[np.ndarray, "L G"]:
    """Groups in the order of nodes, after local search on the nodes' loads."""
    weight = greedy.group_loads(loads, groups)
    start = greedy.pack_groups(loads, groups, nodes)
    return settle(start, weight, nodes, (1 + CLOSE) * weight.mean(axis=1) * groups / nodes)
