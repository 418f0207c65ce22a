"""DeepSeek's FP8 checkpoints in torch: e4m3 weights with a multiplier per 128x128 block.

    W[i, j] = X.weight[i, j] * X.weight_scale_inv[i // 128, j // 128]

Only `scripts/make_goldens.py` imports this, in its own environment: dskjax's has no torch. Written
from the format (DeepSeek-V3's README_WEIGHTS.md) block by block, without a reshape, so that the cut
blocks of ragged matrices are plain to see.
"""

from __future__ import annotations

from collections.abc import Iterator

import torch

Tensors = dict[str, torch.Tensor]

BLOCK, E4M3_MAX, SUFFIX = 128, 448.0, "_scale_inv"
_KEPT = ("embed_tokens.", "lm_head.", "shared_head.", ".gate.", "eh_proj.")


def quantisation_config(ue8m0: bool) -> dict[str, object]:
    """`quantization_config` as DeepSeek publishes it (V3; with `scale_fmt` from V3.1 on)."""
    config: dict[str, object] = {
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "quant_method": "fp8",
        "weight_block_size": [BLOCK, BLOCK],
    }
    return config | ({"scale_fmt": "ue8m0"} if ue8m0 else {})


def blocks(weight: torch.Tensor) -> Iterator[tuple[tuple[int, int], tuple[slice, slice]]]:
    """Index of each block's scale, and the block; the last ones may be cut off."""
    for i, row in enumerate(range(0, weight.shape[0], BLOCK)):
        for j, column in enumerate(range(0, weight.shape[1], BLOCK)):
            yield (i, j), (slice(row, row + BLOCK), slice(column, column + BLOCK))


def quantise(weights: Tensors, ue8m0: str | None) -> Tensors:
    """Every linear weight as `X.weight` and `X.weight_scale_inv`; other tensors as they are.

    Args:
        weights: float tensors under hub names.
        ue8m0: weights whose name holds this get scales that are powers of two, rounded up.
    """
    out: Tensors = {}
    for name, weight in weights.items():
        if weight.ndim < 2 or any(part in name for part in _KEPT):
            out[name] = weight
            continue
        rows, columns = (-(-size // BLOCK) for size in weight.shape)
        scales = torch.empty(rows, columns, dtype=torch.float32)
        values = torch.empty(weight.shape, dtype=torch.float8_e4m3fn)
        for at, part in blocks(weight):
            scale = weight[part].float().abs().max() / E4M3_MAX
            if ue8m0 is not None and ue8m0 in name:
                scale = torch.exp2(torch.ceil(torch.log2(scale)))
            scales[at] = scale
            scaled = (weight[part].float() / scale).clamp(-E4M3_MAX, E4M3_MAX)
            values[part] = scaled.to(torch.float8_e4m3fn)
        out[name], out[name + SUFFIX] = values, scales
    return out


def dequantise(stored: Tensors) -> Tensors:
    """All weights as float32, each block times its multiplier."""
    out: Tensors = {}
    for name, value in stored.items():
        if name.endswith(SUFFIX):
            continue
        real = value.float()
        if name + SUFFIX in stored:
            for at, part in blocks(real):
                real[part] = real[part] * stored[name + SUFFIX][at]
        out[name] = real
    return out
