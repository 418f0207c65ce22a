"""SwiGLU's gate: silu(gate) * up."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


@jax.custom_vjp
def swiglu(gate_up: Float[Array, "*T 2 F"]) -> Float[Array, "*T F"]:
    """silu(gate) * up in fp32, returned in the input's dtype."""
    gate, up = _halves(gate_up)
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)


def _halves(gate_up: jax.Array) -> tuple[jax.Array, jax.Array]:
    gate, up = (gate_up[..., half, :].astype(jnp.float32) for half in (0, 1))
    return gate, up


def _backward(gate_up: jax.Array, grad: jax.Array) -> tuple[jax.Array]:
    # From the input alone: what JAX would keep are five arrays of fp32.
    gate, up = (x[..., None, :] for x in _halves(gate_up))
    grad, share = grad.astype(jnp.float32)[..., None, :], jax.nn.sigmoid(gate)
    # A choice, not two arrays put side by side, which the compiler would write first.
    is_gate = jax.lax.broadcasted_iota(jnp.int32, gate_up.shape, gate_up.ndim - 2) == 0
    slope = jnp.where(is_gate, up * share * (1 + gate * (1 - share)), gate * share)
    return ((grad * slope).astype(gate_up.dtype),)


swiglu.defvjp(lambda gate_up: (swiglu(gate_up), gate_up), _backward)
