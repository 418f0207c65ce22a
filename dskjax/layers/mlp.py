"""SwiGLU: down(silu(gate x) * up x). Dense layers and shared experts."""

from jaxtyping import Array, Float

from dskjax.params import Module, weight
from pallas_kernels import matmul, swiglu


class SwiGlu(Module):
    """A gated MLP; gate and up are one weight [2, F, D], so that they are one product and split
    over F cleanly.
    """

    def __init__(self, hidden_size: int, intermediate_size: int):
        self.gate_up_proj = weight((2, intermediate_size, hidden_size), axes=(None, "mlp", "embed"))
        self.down_proj = weight((hidden_size, intermediate_size), axes=("embed", "mlp"))

    def __call__(self, x: Float[Array, "T D"], *, impl: str) -> Float[Array, "T D"]:
        """Applies the MLP to rows."""
        hidden = swiglu(matmul(x, self.gate_up_proj[...], impl=impl))
        return matmul(hidden, self.down_proj[...], impl=impl)
