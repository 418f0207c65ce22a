"""Copies of rows for the experts they chose, quantized, and the weighted sum of what comes back."""

from pallas_kernels.moe_permute.api import combine, permute
from pallas_kernels.moe_permute.places import places_by_expert

__all__ = ["combine", "permute", "places_by_expert"]
