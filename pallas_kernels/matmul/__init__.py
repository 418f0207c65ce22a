"""Dense product with a weight that may be quantized."""

from pallas_kernels.matmul.api import matmul

__all__ = ["matmul"]
