"""SwiGLU's gate: silu(gate) * up."""

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float


def swiglu(gate_up: Float[Array, "*T 2 F"]) -> Float[Array, "*T F"]:
    """silu(gate) * up in fp32, returned in the input's dtype."""
    gate, up = (gate_up[..., half, :].astype(jnp.float32) for half in (0, 1))
    return (jax.nn.silu(gate) * up).astype(gate_up.dtype)
