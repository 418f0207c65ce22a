"""Contract of `expert_mlp`: out[t] = sum_k weights[t, k] * MLP of expert experts[t, k] (x[t])."""

import functools

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from pallas_kernels.expert_mlp import by_group, xla
from pallas_kernels.quant import QTensor
from pallas_kernels.select import Implementation, choose, on_gpu_only

IMPLEMENTATIONS = (
    Implementation("xla", xla.expert_mlp, auto=on_gpu_only),
    Implementation("reference", functools.partial(by_group.expert_mlp, impl="reference")),
)


def expert_mlp(
    x: Float[Array, "T D"],
    weights: Float[Array, "T K"],
    experts: Int[Array, "T K"],
    gate_up: Float[Array, "E 2 F D"] | QTensor,
    down: Float[Array, "E D F"] | QTensor,
    *,
    pairs: int | None = None,
    impl: str = "auto",
) -> Float[Array, "T D"]:
    """Weighted sum of each row's experts, an expert being down(silu(gate x) * up x).

    Args:
        x: rows [T, D].
        weights: float32 [T, K].
        experts: i32 [T, K], ids in [0, E), -1 for none; a row may name an expert once.
        gate_up: gate and up of every expert, array or QTensor [E, 2, F, D].
        down: [E, D, F].
        pairs: the most (row, expert) pairs there can be, when more than that many of the T * K
            choices are known to be none. With more pairs the result means nothing.
        impl: "auto", "reference" or "xla".

    Returns:
        [T, D] in the dtype of x; the sum over experts is fp32.
    """
    if not x.shape[0]:
        return x
    weights = jnp.where(experts < 0, 0, weights)
    args = (x, weights, experts, gate_up, down, pairs)
    run = choose("expert_mlp", impl, IMPLEMENTATIONS, *args)
    with jax.named_scope("expert_mlp"):
        return run(*args)
