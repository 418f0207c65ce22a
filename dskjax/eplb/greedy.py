"""DeepSeek's expert placement, github.com/deepseek-ai/EPLB, in NumPy, all layers at once.

Groups of experts are packed onto nodes, the experts that are heaviest per replica get the free
slots of their node, and the slots are packed onto its GPUs. Everything is float32, ties go to the
smaller index and sorting is stable, so plans do not depend on the machine. They are those of the
original with a stable sort; torch's default sort is not, and replicas of one expert always tie.
"""

from typing import Any, NamedTuple

import numpy as np
from jaxtyping import Float, Int

from dskjax.eplb.layout import Layout
from dskjax.eplb.placement import Placement


def rebalance_experts(
    weight: Any, num_replicas: int, num_groups: int, num_nodes: int, num_gpus: int
) -> Placement:
    """DeepSeek's plan: hierarchical if the groups divide over the nodes, else global.

    Args:
        weight: loads [L, E].
        num_replicas: slots in all, P.
        num_groups: groups of experts, G.
        num_nodes: N.
        num_gpus: of all nodes together, D.

    Raises:
        ValueError: sizes that do not divide, see `Layout`, or loads that are none.
    """
    layout = Layout(
        num_replicas=num_replicas, num_groups=num_groups, num_nodes=num_nodes, num_gpus=num_gpus
    )
    loads = layout.check(weight).astype(np.float32)
    if not layout.groups_divide:
        num_groups = num_nodes = 1
    order = experts_by_node(loads, pack_groups(loads, num_groups, num_nodes))
    phy2log, rank = fill_nodes(loads, order, num_replicas, num_nodes, num_gpus)
    return Placement.of(phy2log, loads.shape[1], rank)


class Packing(NamedTuple):
    """Where items of equal size went: [X, n] each.

    Attributes:
        pack: of each item.
        rank: place of each item in its pack.
    """

    pack: Int[np.ndarray, "X n"]
    rank: Int[np.ndarray, "X n"]


def balanced_packing(weight: Float[np.ndarray, "X n"], num_packs: int) -> Packing:
    """Packs n items into packs of n / m: the heaviest first, each into the lightest pack with room.

    Args:
        weight: of the items.
        num_packs: m, divides n. One item a pack stays where it is, whatever it weighs.
    """
    num_rows, num_items = weight.shape
    size = num_items // num_packs
    pack = np.broadcast_to(np.arange(num_items), weight.shape).copy()
    rank = np.zeros_like(pack)
    if size == 1:
        return Packing(pack, rank)
    rows = np.arange(num_rows)
    loads = np.zeros((num_rows, num_packs), weight.dtype)
    items = np.zeros((num_rows, num_packs), np.int64)
    for item in np.argsort(-weight, axis=1, kind="stable").T:
        into = np.where(items < size, loads, np.inf).argmin(axis=1)
        pack[rows, item], rank[rows, item] = into, items[rows, into]
        loads[rows, into] += weight[rows, item]
        items[rows, into] += 1
    return Packing(pack, rank)


class Replication(NamedTuple):
    """Slots before they are packed.

    Attributes:
        expert: [X, P], in each slot; slot e < E holds expert e.
        rank: [X, P], which replica of its expert a slot is.
        count: [X, E], replicas.
    """

    expert: Int[np.ndarray, "X P"]
    rank: Int[np.ndarray, "X P"]
    count: Int[np.ndarray, "X E"]


def replicate_experts(
    weight: Float[np.ndarray, "X E"],
    num_slots: int,
    *,
    most: int | None = None,
    enough: Float[np.ndarray, " X"] | None = None,
) -> Replication:
    """One slot an expert, and each further one to the expert with the largest load per replica.

    That makes the heaviest replica as light as possible.

    Args:
        weight: loads of the experts.
        num_slots: P, at least E.
        most: replicas that an expert may have; most * E is at least P. None = any number.
        enough: once no replica is heavier, further slots go to the lightest experts, where they
            change the least. None = never.
    """
    num_rows, num_experts = weight.shape
    rows = np.arange(num_rows)
    expert = np.zeros((num_rows, num_slots), np.int64)
    rank = np.zeros((num_rows, num_slots), np.int64)
    expert[:, :num_experts] = np.arange(num_experts)
    count = np.ones((num_rows, num_experts), np.int64)
    for slot in range(num_experts, num_slots):
        open_ = count < (num_slots if most is None else most)
        share = np.where(open_, weight / count.astype(weight.dtype), -1)
        chosen = share.argmax(axis=1)
        if enough is not None:
            light = np.where(open_, weight * count.astype(weight.dtype), np.inf).argmin(axis=1)
            chosen = np.where(share[rows, chosen] > enough, chosen, light)
        expert[:, slot], rank[:, slot] = chosen, count[rows, chosen]
        count[rows, chosen] += 1
    return Replication(expert, rank, count)


def pack_groups(
    weight: Float[np.ndarray, "L E"], num_groups: int, num_nodes: int
) -> Int[np.ndarray, "L G"]:
    """Groups in the order of nodes: those of node 0 first, G / N a node."""
    packing = balanced_packing(group_loads(weight, num_groups), num_nodes)
    return inverse(packing.pack * (num_groups // num_nodes) + packing.rank)


def group_loads(weight: Float[np.ndarray, "L E"], num_groups: int) -> Float[np.ndarray, "L G"]:
    """Sums over the experts of each group."""
    return weight.reshape(len(weight), num_groups, -1).sum(axis=2)


def experts_by_node(
    weight: Float[np.ndarray, "L E"], groups: Int[np.ndarray, "L G"]
) -> Int[np.ndarray, "L E"]:
    """Experts in the order of their groups."""
    size = weight.shape[1] // groups.shape[1]
    return (groups[:, :, None] * size + np.arange(size)).reshape(weight.shape)


def fill_nodes(
    weight: Float[np.ndarray, "L E"],
    order: Int[np.ndarray, "L E"],
    num_replicas: int,
    num_nodes: int,
    num_gpus: int,
    *,
    capped: bool = False,
    fill: float | None = None,
) -> tuple[Int[np.ndarray, "L P"], Int[np.ndarray, "L P"]]:
    """Replicates and packs the experts of each node by themselves.

    Args:
        weight: loads of the experts, the precision of everything.
        order: experts, those of node 0 first, E / N a node.
        num_replicas: P.
        num_nodes: N.
        num_gpus: D.
        capped: an expert has at most as many replicas as its node has GPUs, or as few more as are
            needed to fill the slots.
        fill: a replica is light enough at this part of its GPU's mean load; None = never.

    Returns:
        Expert of each slot, and which replica of it the slot is; [L, P] each.
    """
    layers, num_experts = weight.shape
    gpus, slots, experts = (n // num_nodes for n in (num_gpus, num_replicas, num_experts))
    local = np.take_along_axis(weight, order, axis=1).reshape(-1, experts)
    made = replicate_experts(
        local,
        slots,
        most=gpus * -(-slots // (gpus * experts)) if capped else None,
        enough=None if fill is None else fill * local.sum(axis=1) / gpus,
    )
    share = np.take_along_axis(local / made.count.astype(local.dtype), made.expert, axis=1)
    packing = balanced_packing(share, gpus)
    slot = inverse(packing.pack * (slots // gpus) + packing.rank)
    expert = np.take_along_axis(made.expert, slot, axis=1).reshape(layers, num_nodes, slots)
    expert += np.arange(num_nodes)[:, None] * experts
    phy2log = np.take_along_axis(order, expert.reshape(layers, -1), axis=1)
    return phy2log, np.take_along_axis(made.rank, slot, axis=1).reshape(layers, -1)


def inverse(permutations: Int[np.ndarray, "X n"]) -> Int[np.ndarray, "X n"]:
    """The inverse of each row."""
    out = np.empty_like(permutations)
    np.put_along_axis(out, permutations, np.arange(permutations.shape[1])[None], axis=1)
    return out
