"""Products of consecutive groups of rows with a weight each: the experts of an MoE layer."""

from pallas_kernels.grouped_matmul.api import grouped_matmul
from pallas_kernels.grouped_matmul.packed_int4 import PackedInt4, pack, unpack

__all__ = ["PackedInt4", "grouped_matmul", "pack", "unpack"]
