"""How draft heads learn: everything that a compiled step depends on beside shapes."""

import dataclasses
from typing import Literal

from dskjax.model import param_specs
from dskjax.params import Params
from train_mtp.heads.objective import Objective
from train_mtp.recipe import StepRecipe

Weights = Literal["independent", "shared"]
MODULES = "mtp_layers"
"""The one entry of the params that is trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsRecipe(StepRecipe):
    """How heads learn; `cfg` is the trunk with the modules to train: K of them if independent, else
    one.

    Attributes:
        depths: K, how many tokens are drafted one after another in training.
        weights: "independent" modules, each with the plain causal mask, or one "shared" module that
            is unrolled with the mask of recycling (`dskjax.recycled`).
        objective: loss of one depth.
        depth_decay: weight of depth k is depth_decay^(k-1); they are made to sum to 1.
        detach: stop gradients between depths.
        top_k: tokens of the trunk's law that are kept.
        watch: more temperatures at which alpha is reported.
    """

    depths: int
    weights: Weights
    objective: Objective = Objective()
    depth_decay: float = 0.8
    detach: bool = False
    top_k: int = 512
    watch: tuple[float, ...] = ()

    def __post_init__(self):
        modules = self.cfg.mtp.num_nextn_predict_layers
        needed = self.depths if self.weights == "independent" else 1
        if self.depths < 1 or modules != needed:
            raise ValueError(
                f"{self.depths=} {self.weights} heads need {max(needed, 1)} modules, but the "
                f"config has num_nextn_predict_layers={modules}"
            )
        if not 0 < self.depth_decay <= 1:
            raise ValueError(f"{self.depth_decay=} must lie in (0, 1]")
        if self.top_k < 1:
            raise ValueError(f"{self.top_k=} must be positive")

    @property
    def temperatures(self) -> tuple[float, ...]:
        """Of the teacher's law: the objective's, then those to watch."""
        own = self.objective.temperature
        return (own, *(t for t in self.watch if t != own))

    @property
    def devices(self) -> int:
        """Over how many devices a batch is spread."""
        return 1 if self.sharding is None else self.sharding.mesh.size

    @property
    def depth_weights(self) -> tuple[float, ...]:
        """Weight of each depth; their sum is 1."""
        raw = [self.depth_decay**k for k in range(self.depths)]
        return tuple(w / sum(raw) for w in raw)

    def specs(self) -> Params:
        """`WeightSpec`s of what is trained."""
        return {MODULES: param_specs(self.cfg)[MODULES]}
