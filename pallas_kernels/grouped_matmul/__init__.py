"""Products of consecutive groups of rows with a weight each: the experts of an MoE layer."""

from pallas_kernels.grouped_matmul.api import grouped_matmul

__all__ = ["grouped_matmul"]
