"""How draft heads learn: everything that a compiled step depends on beside shapes."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.model import Remat, param_specs
from dskjax.params import Params
from train_mtp import optim
from train_mtp.heads.objective import Objective
from train_mtp.step import Precision, RematName

Weights = Literal["independent", "shared"]
MODULES = "mtp_layers"
"""The one entry of the params that is trained."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsRecipe:
    """How heads learn. Static: each value compiles its own step.

    Attributes:
        cfg: the trunk, with the modules to train: K of them if independent, else one.
        depths: K, how many tokens are drafted one after another in training.
        weights: "independent" modules, each with the plain causal mask, or one "shared" module that
            is unrolled with the mask of recycling (`dskjax.recycled`).
        objective: loss of one depth.
        depth_decay: weight of depth k is depth_decay^(k-1); they are made to sum to 1.
        detach: stop gradients between depths.
        optimizer: how gradients become updates.
        top_k: tokens of the trunk's law that are kept.
        watch: more temperatures at which alpha is reported.
        bias_update_rate: u of the router bias rule in the modules; 0 leaves the biases.
        precision: compute dtype; master weights are fp32.
        remat: checkpoint policy of each module.
        impl: implementation of every op.
        sharding: mesh and rules, None on one device.
    """

    cfg: ModelConfig
    depths: int
    weights: Weights
    optimizer: optim.AdamW
    objective: Objective = Objective()
    depth_decay: float = 0.8
    detach: bool = False
    top_k: int = 512
    watch: tuple[float, ...] = ()
    bias_update_rate: float = 0.001
    precision: Precision = "bfloat16"
    remat: RematName = "none"
    impl: str = "auto"
    sharding: Sharding | None = None

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
    def policy(self) -> Remat:
        """The checkpoint policy by name."""
        return None if self.remat == "none" else getattr(jax.checkpoint_policies, self.remat)

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

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer of the trainable weights."""
        return self.optimizer.transformation(self.split(self.specs())[0])

    def split(self, tree: Params) -> tuple[Params, Params]:
        """(trained by gradients, rest) of a tree shaped like `specs`."""
        return optim.partition(optim.trainable(self.specs()), tree)

    def matmul_precision(self) -> Any:
        """Context in which the step is traced."""
        return jax.default_matmul_precision("highest" if self.precision == "float32" else None)
