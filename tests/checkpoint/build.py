"""Checkpoints made without our reader and writer: by the safetensors package, or byte by byte."""

import json
import struct
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np
import safetensors
from safetensors.numpy import save_file

from dskjax import model, presets
from dskjax.config import ModelConfig
from dskjax.params import Params, named_leaves, tree_of
from tests.goldens.weights import tensor_shapes

Tensors = dict[str, np.ndarray]

CODES = {"BF16": ml_dtypes.bfloat16, "F16": np.float16, "F32": np.float32, "F64": np.float64}
CODES |= {"F8_E4M3": ml_dtypes.float8_e4m3fn, "F8_E8M0": ml_dtypes.float8_e8m0fnu}
CODES |= {"I8": np.int8, "U8": np.uint8, "I32": np.int32, "I64": np.int64}


def write_file(path: Path, tensors: Tensors) -> None:
    """One file, by the safetensors package."""
    save_file({name: np.array(w, order="C") for name, w in tensors.items()}, path, {"format": "pt"})


def read_file(path: Path) -> Tensors:
    """All tensors of one file, by the safetensors package."""
    found = safetensors.deserialize(path.read_bytes())
    return {
        name: np.frombuffer(bytes(entry["data"]), CODES[entry["dtype"]]).reshape(entry["shape"])
        for name, entry in found
    }


def read_folder(folder: Path) -> Tensors:
    out: Tensors = {}
    for path in sorted(folder.glob("*.safetensors")):
        out |= read_file(path)
    return out


def write_folder(folder: Path, config: dict[str, Any], tensors: Tensors, files: int = 1) -> None:
    """A checkpoint folder; with several files a layer's tensors are dealt over all of them."""
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "config.json").write_text(json.dumps(config))
    if files == 1:
        write_file(folder / "model.safetensors", tensors)
        return
    parts = [f"model-{i + 1:05d}-of-{files:05d}.safetensors" for i in range(files)]
    weight_map = {name: parts[i % files] for i, name in enumerate(tensors)}
    for part in parts:
        write_file(folder / part, {n: w for n, w in tensors.items() if weight_map[n] == part})
    index = {"metadata": {"total_size": 0}, "weight_map": weight_map}  # total_size is never trusted
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))


def raw_file(header: Any, data: bytes = b"", length: int | None = None) -> bytes:
    """A file with any header at all: JSON of an object, or the bytes themselves."""
    text = header if isinstance(header, bytes) else json.dumps(header).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + data


def draw(config: dict[str, Any], dtype: Any = np.float32, seed: int = 0) -> Tensors:
    """Random tensors under hub names; the gate's bias is fp32, MTP copies are copies."""
    rng = np.random.default_rng(seed)
    out: Tensors = {}
    for name, shape in tensor_shapes(config):
        fixed = name.endswith("e_score_correction_bias")
        out[name] = rng.standard_normal(shape).astype(np.float32 if fixed else dtype)
    for name in out:
        if name.startswith("model.layers.") and name.endswith("embed_tokens.weight"):
            out[name] = out["model.embed_tokens.weight"]
        if name.endswith("shared_head.head.weight"):
            out[name] = out["lm_head.weight"]
    return out


def tiny_config(**changes: Any) -> dict[str, Any]:
    """`config.json` of a V3 with a dense layer, two MoE layers and two MTP modules."""
    config = presets.tiny_v3().to_hf() | {"num_hidden_layers": 3, "num_nextn_predict_layers": 2}
    config |= {"hidden_size": 24, "n_routed_experts": 4, "n_group": 2, "topk_group": 1}
    config |= {"num_experts_per_tok": 2, "q_lora_rank": 20, "intermediate_size": 40}
    return config | {"vocab_size": 48, "moe_intermediate_size": 16} | changes


def random_params(cfg: ModelConfig, dtype: Any, seed: int = 0) -> Params:
    """NumPy params, any bit pattern but NaN in every weight."""
    rng = np.random.default_rng(seed)
    return tree_of(
        {
            leaf: rng.standard_normal(spec.shape).astype(spec.dtype or dtype)
            for leaf, spec in named_leaves(model.param_specs(cfg))
        }
    )


def same_bits(a: Params, b: Params) -> None:
    """Fails, naming the leaf, unless both hold the same names, dtypes, shapes and bits."""
    left, right = dict(named_leaves(a)), dict(named_leaves(b))
    assert list(left) == list(right)
    for leaf in left:
        x, y = np.asarray(left[leaf]), np.asarray(right[leaf])
        assert (x.dtype, x.shape) == (y.dtype, y.shape), leaf
        assert x.tobytes() == y.tobytes(), leaf
