"""Expanded MLA attention for long queries: prefill, training."""

from pallas_kernels.mla_prefill.api import BlockList, MlaPrefillPlan, mla_prefill

__all__ = ["BlockList", "MlaPrefillPlan", "mla_prefill"]
