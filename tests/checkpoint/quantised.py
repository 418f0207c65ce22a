"""Quantized checkpoints made by hand: random codes, random scales, and what they mean.

Nothing is quantized here and nothing of ours is used: codes and scales are drawn, packed as the
public formats say, and multiplied out in float64 by `tests.oracles.formats`.
"""

import dataclasses
import re
from collections.abc import Callable
from typing import Any

import ml_dtypes
import numpy as np

from tests.checkpoint.build import Tensors, draw, tiny_config
from tests.oracles import formats

E4M3, E8M0 = ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e8m0fnu
BLOCK, GROUP = (16, 24), 32
"""Rows of a block hold a head's 8 rotary rows whole; columns leave a ragged last block."""

_EXPERT = re.compile(r"\.mlp\.experts\.\d+\.")
_LINEAR = re.compile(r"_proj(_with_mqa)?\.weight$")


def config(quantization: dict[str, Any] | None = None, **changes: Any) -> dict[str, Any]:
    """A small V3 whose inputs groups of 32 divide."""
    sizes = {"hidden_size": 64, "q_lora_rank": 64, "intermediate_size": 96}
    made = tiny_config(**sizes, moe_intermediate_size=64, v_head_dim=16, **changes)
    return made if quantization is None else made | {"quantization_config": quantization}


FP8 = {
    "quant_method": "fp8",
    "fmt": "e4m3",
    "activation_scheme": "dynamic",
    "weight_block_size": list(BLOCK),
    "scale_fmt": "ue8m0",
}
W4AFP8 = {
    "quant_method": "w4afp8",
    "linear_activation_scheme": "dynamic",
    "moe_activation_scheme": "static",
    "weight_block_size": list(BLOCK),
    "group_size": GROUP,
}
PACKED = {
    "quant_method": "compressed-tensors",
    "format": "pack-quantized",
    "config_groups": {
        "group_0": {
            "targets": ["Linear"],
            "weights": {
                "num_bits": 4,
                "type": "int",
                "symmetric": True,
                "strategy": "group",
                "group_size": GROUP,
                "dynamic": False,
                "actorder": None,
            },
            "input_activations": None,
        }
    },
    "ignore": ["lm_head", "re:.*self_attn.*", "re:.*shared_experts.*"],
    "kv_cache_scheme": None,
}
AWQ = {"quant_method": "modelopt", "quant_algo": "W4A8_AWQ", "group_size": GROUP}
MIXED = {"quantization": {"quant_algo": "MIXED_PRECISION", "group_size": GROUP}}


@dataclasses.dataclass(frozen=True)
class Made:
    """A checkpoint and its meaning.

    Attributes:
        tensors: as stored.
        real: float32 under the names of a plain checkpoint; exact but for one rounding a factor.
    """

    tensors: Tensors
    real: Tensors


def all_of(form: str) -> Callable[[str], str]:
    """Every linear weight in one form; `eh_proj` is none, though its name ends like theirs."""
    linear = lambda name: _LINEAR.search(name) and not name.endswith("eh_proj.weight")  # noqa: E731
    return lambda name: form if linear(name) else "plain"


def experts_of(experts: str, rest: str) -> Callable[[str], str]:
    """Routed experts in one form, other linear weights in another."""
    return lambda name: experts if _EXPERT.search(name) else all_of(rest)(name)


def make(
    config: dict[str, Any],
    form_of: Callable[[str], str],
    *,
    scale_dtype: Any = np.float32,
    dtype: Any = ml_dtypes.bfloat16,
    factors: bool = False,
    seed: int = 0,
) -> Made:
    """Draws a checkpoint.

    Args:
        config: of the model.
        form_of: form of each tensor by its hub name: plain, fp8, int8, words or row_pairs.
        scale_dtype: of the stored scales.
        dtype: of plain tensors.
        factors: row pairs get a factor for each input.
        seed: another one gives other values.
    """
    rng = np.random.default_rng(seed)
    stored: Tensors = {}
    real: Tensors = {}
    for name, value in draw(config, dtype, seed).items():
        form = form_of(name)
        if form == "plain":
            stored[name], real[name] = value, value
            continue
        own, real[name] = _STORE[form](name, value.shape, rng, scale_dtype)
        if form == "row_pairs" and factors:
            factor = rng.uniform(0.5, 2, value.shape[1]).astype(ml_dtypes.bfloat16)
            own[name.removesuffix(".weight") + ".pre_quant_scale"] = factor
            real[name] = real[name] * factor.astype(np.float32)
        stored |= own
    return Made(stored, real)


def draw_scales(shape: tuple[int, ...], rng: np.random.Generator, dtype: Any) -> np.ndarray:
    if dtype is E8M0:
        return rng.integers(117, 127, shape).astype(np.uint8).view(E8M0)
    return rng.uniform(1e-3, 1e-1, shape).astype(dtype)


def _fp8(
    name: str, shape: tuple[int, int], rng: np.random.Generator, dtype: Any
) -> tuple[Tensors, np.ndarray]:
    codes = rng.integers(0, 256, shape).astype(np.uint8)
    codes[codes & 127 == 127] = 126  # NaN
    scales = draw_scales(tuple(-(-n // b) for n, b in zip(shape, BLOCK, strict=True)), rng, dtype)
    real = formats.dequantise(codes, scales.astype(np.float32), BLOCK, "e4m3")
    return {name: codes.view(E4M3), f"{name}_scale_inv": scales}, np.float32(real)


def _int4(
    shape: tuple[int, int], rng: np.random.Generator, dtype: Any
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    q = rng.integers(-8, 8, shape)
    scales = draw_scales((shape[0], shape[1] // GROUP), rng, dtype)
    real = formats.dequantise(formats.int4_pack(q), scales.astype(np.float32), (1, GROUP), "int4")
    return q, scales, np.float32(real)


def _int8(
    name: str, shape: tuple[int, int], rng: np.random.Generator, dtype: Any
) -> tuple[Tensors, np.ndarray]:
    q, scales, real = _int4(shape, rng, dtype)
    parent, own = name.removesuffix(".weight").rsplit(".", 1)
    which = {"gate_proj": "w1", "down_proj": "w2", "up_proj": "w3"}[own]
    activations = {f"{parent}.{which}.input_scale": np.full(1, 0.25, np.float32)}
    codes = formats.int4_pack(q).view(np.int8)
    return {name: codes, f"{name}_scale_inv": scales, **activations}, real


def _words(
    name: str, shape: tuple[int, int], rng: np.random.Generator, dtype: Any
) -> tuple[Tensors, np.ndarray]:
    q, scales, real = _int4(shape, rng, dtype)
    shifted = np.pad(q + 8, [(0, 0), (0, -shape[1] % 8)]).reshape(shape[0], -1, 8)
    words = (shifted.astype(np.uint32) << (4 * np.arange(8, dtype=np.uint32))).sum(-1)
    base = name.removesuffix(".weight")
    return {
        f"{base}.weight_packed": words.astype(np.uint32).view(np.int32),
        f"{base}.weight_scale": scales,
        f"{base}.weight_shape": np.array(shape, np.int64),
    }, real


def _row_pairs(
    name: str, shape: tuple[int, int], rng: np.random.Generator, dtype: Any
) -> tuple[Tensors, np.ndarray]:
    q, scales, real = _int4(shape, rng, dtype)
    pairs = (q[0::2] % 16 + 16 * (q[1::2] % 16)).astype(np.uint8)
    base = name.removesuffix(".weight")
    return {
        name: pairs,
        f"{base}.weight_scale": scales,
        f"{base}.weight_scale_2": np.array(0.5, np.float32),
        f"{base}.input_scale": np.array(0.25, np.float32),
    }, real


_STORE = {"fp8": _fp8, "int8": _int8, "words": _words, "row_pairs": _row_pairs}
