"""One training step as a pure function of (state, batch), and the state's place on the devices.

    train_step(state, batch, recipe=recipe) -> (state, metrics)     jitted, the state is donated
    eval_step(params, batch, recipe=recipe) -> LossSums

The recipe is static (`train_mtp.recipe`).
"""

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.model import init, param_specs
from dskjax.params import Params
from train_mtp import optim
from train_mtp.data import Batch
from train_mtp.loss import LossSums, loss_sums, total_loss
from train_mtp.recipe import StepRecipe
from train_mtp.state import TrainState, make_state, state_shardings


@dataclasses.dataclass(frozen=True, kw_only=True)
class Recipe(StepRecipe):
    """What a step that trains a whole model does with a batch.

    Attributes:
        mtp_weight: lambda, weight of the mean MTP loss.
        z_loss: weight of the squared log-sum-exp.
    """

    mtp_weight: float = 0.3
    z_loss: float = 0.0

    def specs(self) -> Params:
        """`WeightSpec`s of all weights."""
        return param_specs(self.cfg)

    def loss_sums(self, params: Params, batch: Batch) -> LossSums:
        """Losses of a batch under this recipe."""
        return loss_sums(
            params,
            batch,
            cfg=self.cfg,
            dtype=jnp.dtype(self.precision),
            impl=self.impl,
            remat=self.policy,
            sharding=self.sharding,
        )


def init_state(recipe: Recipe, seed: int) -> TrainState:
    """A fresh state, made in place on the recipe's devices; the same values on any mesh."""
    return make_state(recipe, _weights, jax.random.key(seed), cfg=recipe.cfg)


def _weights(key: jax.Array, *, cfg: ModelConfig) -> Params:
    return init(cfg, key, dtype=jnp.float32)


def place_batch(batch: Batch, sharding: Sharding | None) -> Batch:
    """Copies this process's rows to the devices, split over the batch axes."""
    if sharding is None:
        return jax.device_put(batch)
    rows = batch.tokens.shape[0] * jax.process_count()
    where = sharding.of(("batch", None), (rows, batch.tokens.shape[1]))
    return jax.tree.map(lambda a: jax.make_array_from_process_local_data(where, a), batch)


COMPILER_OPTIONS = {"xla_gpu_enable_dynamic_slice_fusion": False}
"""Of a step. Otherwise XLA fuses a kernel with the copy of its result into what the layers keep for
the backward pass, and runs the kernel a second time for whoever else reads the result: all
attention and half of the experts' products (openxla/xla, pull request 45799).
"""


@functools.partial(
    jax.jit,
    static_argnames=("recipe",),
    donate_argnames=("state",),
    compiler_options=COMPILER_OPTIONS,
)
def train_step(
    state: TrainState, batch: Batch, *, recipe: Recipe
) -> tuple[TrainState, dict[str, Any]]:
    """Takes one step; the old state's arrays are gone afterwards.

    Returns:
        The new state, and metrics: scalars and, per depth or per layer, vectors.
    """
    with recipe.matmul_precision():
        train, rest = recipe.split(state.params)

        def loss_of(train: Params) -> tuple[jax.Array, LossSums]:
            sums = recipe.loss_sums(optim.combine(train, rest), batch)
            loss = total_loss(sums, mtp_weight=recipe.mtp_weight, z_loss=recipe.z_loss)
            return loss, sums

        (loss, sums), grads = jax.value_and_grad(loss_of, has_aux=True)(train)
        with jax.named_scope("optimizer"):
            updates, moments = recipe.transformation().update(grads, state.opt_state, train)
            train = jax.tree.map(jnp.add, train, updates)
        params = optim.update_router_biases(
            optim.combine(train, rest), sums.loads, recipe.bias_update_rate
        )
    new = TrainState(state.step + 1, params, moments)
    if recipe.sharding is not None:
        new = jax.lax.with_sharding_constraint(new, state_shardings(recipe))
    return new, {
        "total_loss": loss,
        "grad_norm": optax.tree.norm(grads),
        "lr": recipe.optimizer.schedule(state.step),
        **batch_metrics(sums),
    }


@functools.partial(jax.jit, static_argnames=("recipe",))
def eval_step(params: Params, batch: Batch, *, recipe: Recipe) -> LossSums:
    """Losses of a batch without training on it."""
    with recipe.matmul_precision():
        return recipe.loss_sums(params, batch)


def batch_metrics(sums: LossSums) -> dict[str, Any]:
    """Means of one batch. Depth 1 is the first MTP module; `agree` is with the trunk's argmax."""
    tokens = jnp.maximum(sums.tokens, 1)
    metrics = {
        "loss": sums.means[0],
        "mtp_loss": sums.means[1:],
        "top1": sums.top1[0] / tokens[0],
        "mtp_top1": sums.top1[1:] / tokens[1:],
        "mtp_agree": sums.agree[1:] / tokens[1:],
        "tokens": sums.tokens[0],
    }
    if sums.loads:
        violations = jnp.concatenate([optim.max_violation(x) for x in sums.loads.values()])
        metrics |= {"max_vio": violations.max(), "mean_max_vio": violations.mean()}
    return metrics
