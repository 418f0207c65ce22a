"""Expanded MLA attention for long queries: prefill, training."""

from pallas_kernels.mla_prefill.api import MlaPrefillPlan, mla_prefill

__all__ = ["MlaPrefillPlan", "mla_prefill"]
