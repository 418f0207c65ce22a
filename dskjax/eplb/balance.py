"""How evenly a placement spreads the load over GPUs. An expert's load is split evenly over its
replicas, in float64.
"""

import numpy as np
from jaxtyping import Float, Float64, Int, Real

from dskjax.eplb.greedy import replicate_experts
from dskjax.eplb.layout import Layout
from dskjax.eplb.placement import replicas


def gpu_loads(
    weight: Real[np.ndarray, "L E"], phy2log: Int[np.ndarray, "L P"], num_gpus: int
) -> Float64[np.ndarray, "L D"]:
    """Load of each GPU."""
    share = weight.astype(np.float64) / replicas(phy2log, weight.shape[1])
    slots = np.take_along_axis(share, phy2log, axis=1)
    return slots.reshape(len(slots), num_gpus, -1).sum(axis=2)


def plain_loads(
    weight: Real[np.ndarray, "L E"], num_gpus: int
) -> Float64[np.ndarray, "L D"] | None:
    """Load of each GPU that holds E / D experts, in order; None if D does not divide E."""
    layers, num_experts = weight.shape
    if num_experts % num_gpus:
        return None
    return weight.astype(np.float64).reshape(layers, num_gpus, -1).sum(axis=2)


def imbalance(loads: Float[np.ndarray, "L D"]) -> Float64[np.ndarray, " L"]:
    """Fullest over mean load of the GPUs of each layer; 1 where there is no load at all."""
    mean = loads.mean(axis=1, dtype=np.float64)
    return np.divide(loads.max(axis=1), mean, out=np.ones_like(mean), where=mean > 0)


def lower_bound(
    weight: Real[np.ndarray, "L E"], layout: Layout, *, hierarchical: bool = False
) -> Float64[np.ndarray, " L"]:
    """No placement in this layout has an imbalance below this; it may not be reached.

    Some GPU holds the heaviest replica, which is lightest if each further slot goes to the expert
    with the largest load per replica. A node that keeps whole groups holds, beside the heaviest
    group, at least the lightest ones.

    Args:
        weight: loads.
        layout: slots, GPUs, nodes, groups.
        hierarchical: whether each group must stay on one node; then num_nodes divides num_groups.
    """
    loads = weight.astype(np.float64)
    total = loads.sum(axis=1)
    count = replicate_experts(loads, layout.num_replicas).count
    least = np.maximum((loads / count).max(axis=1) * layout.num_gpus, total)
    if hierarchical:
        groups = np.sort(loads.reshape(len(loads), layout.num_groups, -1).sum(axis=2), axis=1)
        beside = layout.num_groups // layout.num_nodes - 1
        node = groups[:, -1] + groups[:, :beside].sum(axis=1)
        least = np.maximum(least, node * layout.num_nodes)
    return np.divide(least, total, out=np.ones_like(total), where=total > 0)
