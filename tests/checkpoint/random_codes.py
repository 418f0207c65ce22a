"""Params with QTensors of any bits: nothing is quantized, so nothing is compiled."""

from collections.abc import Callable
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dskjax import model
from dskjax.config import ModelConfig
from dskjax.params import Params, named_leaves, tree_of
from pallas_kernels.quant import QTensor
from tests.checkpoint.build import random_params, tiny_config

FP8: Any = ("e4m3", (128, 128))
INT4: Any = ("int4", (1, 128))
Kinds = Callable[[str], Any]


def small(**changes: Any) -> ModelConfig:
    """A V3 whose inputs groups of 128 divide."""
    sizes = {"hidden_size": 128, "q_lora_rank": 128, "intermediate_size": 128}
    sizes |= {"kv_lora_rank": 128, "moe_intermediate_size": 128, "v_head_dim": 32}
    sizes |= {"num_hidden_layers": 2, "num_nextn_predict_layers": 1}
    return ModelConfig.from_hf(tiny_config(**sizes | changes))


def linear(name: str) -> bool:
    return name.endswith(("_proj", "_with_mqa")) and "eh_proj" not in name


def fp8(name: str) -> Any:
    """DeepSeek's FP8."""
    return FP8 if linear(name) else None


def w4afp8(name: str) -> Any:
    """W4AFP8."""
    return INT4 if ".experts." in name else fp8(name)


def int4(name: str) -> Any:
    """Every linear weight int4, groups of 64."""
    return ("int4", (1, 64)) if linear(name) else None


def int4_experts(name: str) -> Any:
    """Routed experts int4, groups of 32, the rest plain: as Kimi-K2-Thinking."""
    return ("int4", (1, 32)) if ".experts." in name else None


def draw(shape: tuple[int, ...], kind: Any, rng: np.random.Generator, scales: Any) -> QTensor:
    """A QTensor of NumPy arrays: any codes but NaN, any positive scales of a dtype."""
    code, (rows, columns) = kind
    *lead, n, k = shape
    values = rng.integers(0, 256, (*lead, n, k // 2 if code == "int4" else k)).astype(np.uint8)
    if code == "e4m3":
        values[values & 127 == 127] = 126
        values = values.view(ml_dtypes.float8_e4m3fn)
    drawn = rng.uniform(1e-3, 1, (*lead, -(-n // rows), -(-k // columns)))
    return QTensor(values, drawn.astype(scales).astype(np.float32), (rows, columns), code)


def params(
    cfg: ModelConfig, kinds: Kinds, scales: Any = np.float32, dtype: Any = ml_dtypes.bfloat16
) -> Params:
    """Params with a QTensor for each leaf that `kinds` gives a format and block."""
    rng = np.random.default_rng(0)
    plain = dict(named_leaves(random_params(cfg, dtype)))
    for leaf, spec in named_leaves(model.param_specs(cfg)):
        if kind := kinds(leaf):
            plain[leaf] = draw(spec.shape, kind, rng, scales)
    return tree_of(plain)


def same(found: Any, expected: Any) -> None:
    """Fails, naming the leaf, unless both have the same structure, dtypes, shapes and bits."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for (path, a), b in zip(
        jax.tree_util.tree_leaves_with_path(found), jax.tree.leaves(expected), strict=True
    ):
        assert (a.dtype, a.shape) == (b.dtype, b.shape), path
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes(), path
