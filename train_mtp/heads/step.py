"""One training step of draft heads over a frozen trunk, and the state it carries on.

    teach(trunk, batch, recipe=recipe) -> Taught                 states and law, no gradient
    head_step(state, trunk, batch, taught, recipe=...)           one update of one set of heads
    accumulated_step(state, trunk, batches, recipe=...)          teach and update, batch by batch

Several sets of heads may learn from the same `Taught`: the trunk's pass is the expensive part. The
trunk is an argument, not part of the state, and may hold quantized weights; only the modules have
masters, gradients and moments.
"""

import functools
from typing import Any

import jax
import jax.numpy as jnp
import optax

from dskjax.model import param_specs, trunk
from dskjax.params import Params, cast
from train_mtp import optim
from train_mtp.heads.recipe import MODULES, HeadsRecipe
from train_mtp.heads.sums import HeadSums, Taught, head_metrics, head_sums, objective_of, trunk_head
from train_mtp.heads.teacher import teach as teach_law
from train_mtp.loss import labels_at
from train_mtp.state import TrainState, state_shardings


@functools.partial(jax.jit, static_argnames=("recipe",))
def teach(frozen: Params, batch: Any, *, recipe: HeadsRecipe) -> Taught:
    """Runs the frozen trunk over a batch.

    Args:
        frozen: params of the trunk (its modules, if it has any, are not looked at).
        batch: packed rows.
        recipe: precision, temperatures and `top_k` are used.
    """
    with recipe.matmul_precision():
        out = trunk(
            _compute(frozen, recipe),
            batch.tokens,
            cfg=recipe.cfg,
            segment_ids=batch.segment_ids,
            positions=batch.positions,
            impl=recipe.impl,
            sharding=recipe.sharding,
        )
        hidden = jax.lax.stop_gradient(out.hidden)
        law = teach_law(
            hidden,
            trunk_head(frozen, recipe.cfg),
            top_k=recipe.top_k,
            temperatures=recipe.temperatures,
            devices=recipe.devices,
        )
    return Taught(hidden, law)


def _compute(frozen: Params, recipe: HeadsRecipe) -> Params:
    """The trunk's weights in the compute dtype; quantized ones stay as they are."""
    specs = param_specs(recipe.cfg)
    kept = {name: group for name, group in frozen.items() if name != MODULES}
    wanted = {name: group for name, group in specs.items() if name != MODULES}
    return cast(kept, wanted, jnp.dtype(recipe.precision))


@functools.partial(jax.jit, static_argnames=("recipe",), donate_argnames=("state",))
def head_step(
    state: TrainState, frozen: Params, batch: Any, taught: Taught, *, recipe: HeadsRecipe
) -> tuple[TrainState, dict[str, Any]]:
    """One update of the heads; the old state's arrays are gone afterwards.

    Returns:
        The new state, and metrics by depth.
    """
    with recipe.matmul_precision():
        sums, grads = _gradients(state.params, frozen, batch, taught, recipe, None)
        return update(state, sums, grads, recipe)


@functools.partial(jax.jit, static_argnames=("recipe",), donate_argnames=("state",))
def accumulated_step(
    state: TrainState, frozen: Params, batches: Any, *, recipe: HeadsRecipe
) -> tuple[TrainState, dict[str, Any]]:
    """One update from several batches, of which one at a time is on the way through the model.

    The same as one step on all their rows together: each depth is divided by its number of valid
    anchors in all batches.

    Args:
        state: of the heads; its arrays are gone afterwards.
        frozen: params of the trunk.
        batches: a `Batch` whose arrays have one more axis in front, [N, B, S].
        recipe: how.
    """
    tokens = jnp.stack(
        [
            jax.vmap(lambda *b, k=k: labels_at(k, *b).valid.sum())(
                batches.tokens, batches.segment_ids, batches.scored
            ).sum()
            for k in range(1, recipe.depths + 1)
        ]
    )

    def part(batch: Any) -> tuple[HeadSums, Params]:
        taught = teach(frozen, batch, recipe=recipe)
        return _gradients(state.params, frozen, batch, taught, recipe, tokens)

    def add(total: Any, batch: Any) -> tuple[Any, None]:
        return jax.tree.map(jnp.add, total, part(batch)), None

    with recipe.matmul_precision():
        shapes = jax.eval_shape(part, jax.tree.map(lambda a: a[0], batches))
        nothing = jax.tree.map(lambda a: jnp.zeros(a.shape, a.dtype), shapes)
        (sums, grads), _ = jax.lax.scan(add, nothing, batches)
        return update(state, sums, grads, recipe)


def _gradients(
    params: Params,
    frozen: Params,
    batch: Any,
    taught: Taught,
    recipe: HeadsRecipe,
    tokens: jax.Array | None,
) -> tuple[HeadSums, Params]:
    train, rest = recipe.split(params)

    def loss_of(train: Params) -> tuple[jax.Array, HeadSums]:
        heads = optim.combine(train, rest)
        sums = head_sums(heads, frozen, batch, taught, recipe=recipe)
        return objective_of(sums, recipe, tokens), sums

    grads, sums = jax.grad(loss_of, has_aux=True)(train)
    return sums, grads


def update(
    state: TrainState, sums: HeadSums, grads: Params, recipe: HeadsRecipe
) -> tuple[TrainState, dict[str, Any]]:
    """The state after gradients are applied, and the step's metrics."""
    train, rest = recipe.split(state.params)
    with jax.named_scope("optimizer"):
        updates, moments = recipe.transformation().update(grads, state.opt_state, train)
        train = jax.tree.map(jnp.add, train, updates)
    params = optim.update_router_biases(
        optim.combine(train, rest), {MODULES: sums.loads}, recipe.bias_update_rate
    )
    new = TrainState(state.step + 1, params, moments)
    if recipe.sharding is not None:
        new = jax.lax.with_sharding_constraint(new, state_shardings(recipe))
    return new, {
        "total_loss": objective_of(sums, recipe),
        "grad_norm": optax.tree.norm(grads),
        "lr": recipe.optimizer.schedule(state.step),
        **head_metrics(sums, recipe),
    }
