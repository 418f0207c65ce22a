"""What every kind of training step is told: what it trains, how, and where."""

import dataclasses
from typing import Any, Literal

import jax
import optax

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.model import Remat
from dskjax.params import Params
from train_mtp import optim

RematName = Literal["none", "nothing_saveable", "dots_saveable", "dots_with_no_batch_dims_saveable"]
Precision = Literal["bfloat16", "float32"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class StepRecipe:
    """Static: frozen, hashable, and with its subclass's fields all that a compiled step depends on
    beside shapes.

    Attributes:
        cfg: the model.
        optimizer: how gradients become updates.
        bias_update_rate: u of the router bias rule; 0 leaves the biases.
        precision: compute dtype; master weights and moments are fp32. "float32" also asks for full
            matmul precision.
        remat: `jax.checkpoint` policy of each layer; "none" keeps all activations.
        impl: implementation of every op.
        sharding: mesh and rules, None on one device.
    """

    cfg: ModelConfig
    optimizer: optim.AdamW
    bias_update_rate: float = 0.001
    precision: Precision = "bfloat16"
    remat: RematName = "none"
    impl: str = "auto"
    sharding: Sharding | None = None

    def specs(self) -> Params:
        """`WeightSpec`s of the weights in the state."""
        raise NotImplementedError(type(self).__name__)

    @property
    def policy(self) -> Remat:
        """The checkpoint policy by name."""
        return None if self.remat == "none" else getattr(jax.checkpoint_policies, self.remat)

    def matmul_precision(self) -> Any:
        """Context in which the step is traced."""
        return jax.default_matmul_precision("highest" if self.precision == "float32" else None)

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer of the trainable weights."""
        return self.optimizer.transformation(self.split(self.specs())[0])

    def split(self, tree: Params) -> tuple[Params, Params]:
        """(trained by gradients, rest) of a tree shaped like `specs`."""
        return optim.partition(optim.trainable(self.specs()), tree)
