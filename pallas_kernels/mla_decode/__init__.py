"""Paged, absorbed MLA attention for short queries: decode and MTP verification."""

from pallas_kernels.mla_decode.api import (
    MlaDecodePlan,
    mla_decode,
    plan_mla_decode,
    schedule_mla_decode,
)

__all__ = ["MlaDecodePlan", "mla_decode", "plan_mla_decode", "schedule_mla_decode"]
