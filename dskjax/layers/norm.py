"""RMSNorm with fp32 statistics."""

from jaxtyping import Array, Float

from dskjax.params import Module, weight
from pallas_kernels.rms_norm import rms_norm


class RmsNorm(Module):
    """y = weight * cast(x / sqrt(mean(x^2) + eps)): normalised in fp32, cast to x's dtype, then
    scaled (Llama's order).
    """

    def __init__(self, size: int, eps: float, axis: str):
        self.eps = eps
        self.weight = weight((size,), axes=(axis,), init="ones")

    def __call__(self, x: Float[Array, "... d"]) -> Float[Array, "... d"]:
        """Normalises the last axis."""
        return rms_norm(x, self.weight[...], self.eps)
