"""Where replicas of experts can stand, and what a planner may be given."""

import dataclasses
from typing import Any

import numpy as np
from jaxtyping import Float64


@dataclasses.dataclass(frozen=True, kw_only=True)
class Layout:
    """Slots on GPUs on nodes, and the router's groups; the names are those of deepseek-ai/EPLB.

    Slot p is on GPU p // (num_replicas / num_gpus), GPU g on node g // (num_gpus / num_nodes).

    Attributes:
        num_replicas: slots in all, P; each holds one replica of an expert.
        num_groups: groups of experts that the router chooses from (`n_group`), G.
        num_nodes: N.
        num_gpus: of all nodes together, D.

    Raises:
        ValueError: a number below 1, or P % D or D % N is not 0.
    """

    num_replicas: int
    num_groups: int = 1
    num_nodes: int = 1
    num_gpus: int

    def __post_init__(self):
        for field in dataclasses.fields(self):
            if getattr(self, field.name) < 1:
                raise ValueError(f"{field.name}={getattr(self, field.name)} must be at least 1")
        if self.num_replicas % self.num_gpus:
            raise ValueError(f"{self.num_replicas=} must be a multiple of {self.num_gpus=}")
        if self.num_gpus % self.num_nodes:
            raise ValueError(f"{self.num_gpus=} must be a multiple of {self.num_nodes=}")

    @property
    def groups_divide(self) -> bool:
        """Whether each node can hold whole groups, equally many."""
        return self.num_groups % self.num_nodes == 0

    def check(self, weight: Any) -> Float64[np.ndarray, "L E"]:
        """Loads as float64 [L, E], if experts with these loads can be placed here.

        Args:
            weight: tokens, or anything in proportion to them, of each layer's experts.

        Raises:
            ValueError: not a matrix of real numbers; a load that is negative or not finite in
                float32; fewer slots than experts; or groups that divide over the nodes but are of
                unequal size.
        """
        loads = check_loads(weight)
        num_experts = loads.shape[1]
        if self.num_replicas < num_experts:
            raise ValueError(
                f"num_replicas={self.num_replicas} is less than {num_experts} experts: it counts "
                "all slots, so give at least one slot an expert"
            )
        if self.groups_divide and num_experts % self.num_groups:
            raise ValueError(f"{num_experts} experts must be a multiple of {self.num_groups=}")
        return loads


def check_loads(weight: Any) -> Float64[np.ndarray, "L E"]:
    """Loads as float64 [L, E].

    Raises:
        ValueError: not a matrix of real numbers, or a load is negative or not finite in float32.
    """
    values = np.asarray(weight)
    if values.ndim != 2 or not values.size or values.dtype.kind not in "iuf":
        raise ValueError(
            f"loads are {values.dtype} {values.shape}; expected real numbers [layers, experts]"
        )
    loads = values.astype(np.float64)
    # Sums too, as planners add loads up in float32. NaN is not below the limit either.
    bad = ~(loads.sum(axis=1) < np.finfo(np.float32).max) | (loads < 0).any(axis=1)
    if bad.any():
        layer = int(bad.argmax())
        wrong = ~np.isfinite(loads[layer]) | (loads[layer] < 0)
        expert = int(wrong.argmax() if wrong.any() else loads[layer].argmax())
        raise ValueError(
            f"load of layer {layer}, expert {expert} is {loads[layer, expert]:g}; expected 0 or "
            "more, and sums within float32"
        )
    return loads
