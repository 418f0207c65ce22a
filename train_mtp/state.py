"""What training carries from step to step, and where it lies on the devices."""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dskjax.params import Params, abstract
from train_mtp.recipe import StepRecipe


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True)
class TrainState:
    """Everything that training carries on from step to step.

    Attributes:
        step: i32 [], steps taken; also the number of the next batch.
        params: fp32 master weights.
        opt_state: moments of the trainable weights.
    """

    step: Any
    params: Params
    opt_state: Any


def fresh_state(params: Params, recipe: StepRecipe) -> TrainState:
    """Step 0 with these weights."""
    moments = recipe.transformation().init(recipe.split(params)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, moments)


def make_state(
    recipe: StepRecipe, make: Callable[..., Params], /, *args: Any, **static: Any
) -> TrainState:
    """Step 0 with the weights that `make(*args, **static)` gives under jit, in place on the
    devices.

    Args:
        recipe: of the run.
        make: a function of a module; calls with the same one, recipe and `static` share a program.
        args: arrays, keys among them.
        static: what can be hashed.
    """
    return _maker(recipe, make, **static)(*args)


@functools.lru_cache(maxsize=32)
def _maker(
    recipe: StepRecipe, make: Callable[..., Params], /, **static: Any
) -> Callable[..., TrainState]:
    return jax.jit(
        lambda *args: fresh_state(make(*args, **static), recipe),
        out_shardings=state_shardings(recipe),
    )


def _shapes(recipe: StepRecipe) -> TrainState:
    weights = abstract(recipe.specs(), jnp.float32)
    return jax.eval_shape(lambda params: fresh_state(params, recipe), weights)


def abstract_state(recipe: StepRecipe) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        _shapes(recipe),
        state_shardings(recipe),
    )


def state_shardings(recipe: StepRecipe) -> TrainState:
    """Sharding of each array of the state; moments lie where their weights do."""
    shapes = _shapes(recipe)
    if recipe.sharding is None:
        one = jax.sharding.SingleDeviceSharding(jax.devices()[0])
        return jax.tree.map(lambda _: one, shapes)
    whole = NamedSharding(recipe.sharding.mesh, PartitionSpec())
    params = recipe.sharding.params(recipe.specs())
    moments = optax.tree_map_params(
        recipe.transformation(),
        lambda _, where: where,
        shapes.opt_state,
        recipe.split(params)[0],
        transform_non_params=lambda _: whole,
    )
    return TrainState(whole, params, moments)
