"""What changes the weights: AdamW under a schedule, and the rule for the router biases.

The params tree is cut in two: the trainable part, which alone has gradients and moments, and the
rest. In pre-training the rest is the router bias, which no gradient reaches and which follows its
own rule (DeepSeek-V3 report, 2.1.2, auxiliary-loss-free balancing).
"""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
import jax.numpy as jnp
import optax
from jaxtyping import Array, Float, Int

from dskjax.params import Params, WeightSpec, is_spec

ROUTER_BIAS = "e_score_correction_bias"
_GATES = {"moe_layers": ("mlp", "gate"), "mtp_layers": ("block", "mlp", "gate")}


@dataclasses.dataclass(frozen=True, kw_only=True)
class AdamW:
    """AdamW with clipping by global norm, linear warm-up and cosine decay.

    Attributes:
        lr: peak learning rate, reached after `warmup` steps; step 0 already learns.
        steps: the last of them runs at `lr * min_lr_ratio`.
        weight_decay: decoupled (times the learning rate), on matrices only; see `is_decayed`.
        clip: largest global norm of the gradient.
    """

    lr: float
    warmup: int
    steps: int
    min_lr_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-8
    weight_decay: float = 0.1
    clip: float = 1.0

    def schedule(self, step: Any) -> Any:
        """Learning rate of a step, counted from 0."""
        step = jnp.asarray(step, jnp.float32)
        rising = (step + 1) / max(self.warmup, 1)
        done = (step - self.warmup) / max(self.steps - 1 - self.warmup, 1)
        cosine = 0.5 * (1 + jnp.cos(jnp.pi * jnp.clip(done, 0, 1)))
        falling = self.min_lr_ratio + (1 - self.min_lr_ratio) * cosine
        return self.lr * jnp.where(step < self.warmup, rising, falling)

    def transformation(self, specs: Params) -> optax.GradientTransformation:
        """The optax chain for trainable weights with these specs."""
        decayed = jax.tree.map(is_decayed, specs, is_leaf=is_spec)
        return optax.chain(
            optax.clip_by_global_norm(self.clip),
            optax.scale_by_adam(b1=self.beta1, b2=self.beta2, eps=self.eps),
            optax.add_decayed_weights(self.weight_decay, mask=decayed),
            optax.scale_by_learning_rate(self.schedule),
        )


def is_decayed(spec: WeightSpec) -> bool:
    """Whether weight decay applies: to matrices of linear maps, the gate's and the head's included.

    Norms and biases set a scale, and an embedding row whose token is rare would shrink between its
    gradients, so these are left alone.
    """
    return spec.init == "normal"


def trainable(specs: Params) -> Params:
    """True for each weight that gradients train: all but the router biases."""
    return jax.tree_util.tree_map_with_path(
        lambda path, _: path[-1].key != ROUTER_BIAS, specs, is_leaf=is_spec
    )


def partition(mask: Params, tree: Params) -> tuple[Params, Params]:
    """Cuts a params-shaped tree into (where the mask is True, where it is not), None elsewhere."""
    pick = lambda wanted: jax.tree.map(  # noqa: E731
        lambda m, leaf: leaf if m == wanted else None, mask, tree
    )
    return pick(True), pick(False)


def combine(first: Params, second: Params) -> Params:
    """Undoes `partition`."""
    return jax.tree.map(
        lambda a, b: b if a is None else a, first, second, is_leaf=lambda leaf: leaf is None
    )


def update_router_biases(
    params: Params, loads: Mapping[str, Int[Array, "L E"]], rate: float
) -> Params:
    """Raises the bias of experts with less than the mean load by `rate`, lowers the others'.

    Layers whose gate has no bias (V2 family) are left as they are, and so is an expert at the mean.
    """
    if not rate:
        return params
    params = dict(params)
    for stack, load_le in loads.items():
        params[stack] = _map_bias(params[stack], _GATES[stack], load_le, rate)
    return params


def _map_bias(tree: Params, path: tuple[str, ...], load_le: Array, rate: float) -> Params:
    if path:
        return {**tree, path[0]: _map_bias(tree[path[0]], path[1:], load_le, rate)}
    if ROUTER_BIAS not in tree:
        return tree
    return {**tree, ROUTER_BIAS: tree[ROUTER_BIAS] + rate * load_direction(load_le)}


def load_direction(load_le: Int[Array, "L E"]) -> Float[Array, "L E"]:
    """sign(mean load - load) of each layer; integers throughout, so that a tie is a tie."""
    experts = load_le.shape[-1]
    total = load_le.sum(axis=-1, keepdims=True)
    return jnp.sign(total - experts * load_le).astype(jnp.float32)


def max_violation(load_le: Int[Array, "L E"]) -> Float[Array, " L"]:
    """MaxVio of each layer: its largest load over the mean load, minus 1 (arXiv:2408.15664)."""
    load = load_le.astype(jnp.float32)
    return load.max(axis=-1) / jnp.maximum(load.mean(axis=-1), 1e-9) - 1
