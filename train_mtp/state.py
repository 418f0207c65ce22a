"""What training carries from step to step, and where it lies on the devices."""

import dataclasses
from collections.abc import Callable
from typing import Any, Protocol, runtime_checkable

import jax
import jax.numpy as jnp
import optax
from jax.sharding import NamedSharding, PartitionSpec

from dskjax.axes import Sharding
from dskjax.params import Params


@runtime_checkable
class Trained(Protocol):
    """What a recipe tells of the weights it trains."""

    @property
    def sharding(self) -> Sharding | None:
        """Mesh and rules; None on one device."""
        ...

    def specs(self) -> Params:
        """`WeightSpec`s of all weights in the state."""
        ...

    def split(self, tree: Params) -> tuple[Params, Params]:
        """(trained by gradients, rest) of a tree shaped like `specs`."""
        ...

    def transformation(self) -> optax.GradientTransformation:
        """The optimizer of the trainable part."""
        ...


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


def fresh_state(params: Params, recipe: Trained) -> TrainState:
    """Step 0 with these weights."""
    moments = recipe.transformation().init(recipe.split(params)[0])
    return TrainState(jnp.zeros((), jnp.int32), params, moments)


def make_state(recipe: Trained, make: Callable[..., Params], *args: Any) -> TrainState:
    """Step 0 with the weights that `make(*args)` gives under jit, in place on the devices."""
    build = jax.jit(
        lambda *args: fresh_state(make(*args), recipe), out_shardings=state_shardings(recipe)
    )
    return build(*args)


def _shapes(recipe: Trained) -> TrainState:
    def weights() -> Params:
        return jax.tree.map(
            lambda spec: jnp.zeros(spec.shape, spec.dtype or jnp.float32),
            recipe.specs(),
            is_leaf=lambda leaf: hasattr(leaf, "axes"),
        )

    return jax.eval_shape(lambda: fresh_state(weights(), recipe))


def abstract_state(recipe: Trained) -> TrainState:
    """Shapes, dtypes and shardings of the state: what a checkpoint is restored into."""
    return jax.tree.map(
        lambda leaf, where: jax.ShapeDtypeStruct(leaf.shape, leaf.dtype, sharding=where),
        _shapes(recipe),
        state_shardings(recipe),
    )


def state_shardings(recipe: Trained) -> TrainState:
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
