"""Quantization of activations to e4m3."""

from pallas_kernels.act_quant.api import act_quant

__all__ = ["act_quant"]
