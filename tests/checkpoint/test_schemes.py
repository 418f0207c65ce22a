"""What public checkpoints say of their quantization, and the plans of whole models at full size."""

import json
import os
import struct
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from dskjax import presets
from dskjax.checkpoint import inventory, load_config, schemes
from dskjax.checkpoint.schemes import Scheme
from dskjax.checkpoint.shards import Shards
from tests.checkpoint.quantised import AWQ, MIXED, W4AFP8, all_of, experts_of
from tests.goldens.weights import tensor_shapes

DEEPSEEK_V3 = {
    "activation_scheme": "dynamic",
    "fmt": "e4m3",
    "quant_method": "fp8",
    "weight_block_size": [128, 128],
}
KIMI_K2_THINKING = {
    "config_groups": {
        "group_0": {
            "input_activations": None,
            "output_activations": None,
            "targets": ["Linear"],
            "weights": {
                "actorder": None,
                "block_structure": None,
                "dynamic": False,
                "group_size": 32,
                "num_bits": 4,
                "observer": "minmax",
                "observer_kwargs": {},
                "strategy": "group",
                "symmetric": True,
                "type": "int",
            },
        }
    },
    "format": "pack-quantized",
    "ignore": [
        "lm_head",
        "re:.*self_attn.*",
        "re:.*shared_experts.*",
        "re:.*mlp\\.(gate|up|gate_up|down)_proj.*",
    ],
    "kv_cache_scheme": None,
    "quant_method": "compressed-tensors",
    "quantization_status": "compressed",
}
W4A8_GROUPS = {
    "group_0": KIMI_K2_THINKING["config_groups"]["group_0"]
    | {
        "format": "pack-quantized",
        "input_activations": {"num_bits": 8, "type": "float", "strategy": "token"},
    }
}


def read(folder: Path, told: Any, beside: Any = None) -> Scheme | None:
    (folder / "config.json").write_text(json.dumps({"quantization_config": told}))
    if beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(beside))
    return schemes.of_folder(folder)


@pytest.mark.parametrize(
    ("told", "beside", "expected"),
    [
        (DEEPSEEK_V3, None, ("fp8", ("fp8",), (128, 128), 128)),
        (DEEPSEEK_V3 | {"scale_fmt": "ue8m0"}, None, ("fp8", ("fp8",), (128, 128), 128)),
        (W4AFP8, None, ("w4afp8", ("fp8", "int8"), (16, 24), 32)),
        ({"quant_method": "w4afp8"}, None, ("w4afp8", ("fp8", "int8"), (128, 128), 128)),
        (KIMI_K2_THINKING, None, ("compressed-tensors", ("words",), (128, 128), 32)),
        (
            KIMI_K2_THINKING | {"format": "mixed-precision", "config_groups": W4A8_GROUPS},
            None,
            ("compressed-tensors", ("words",), (128, 128), 32),
        ),
        (AWQ, None, ("W4A8_AWQ", ("row_pairs",), (128, 128), 32)),
        (
            None,
            {"producer": {}, "quantization": {"quant_algo": "W4A8_AWQ", "group_size": 64}},
            ("W4A8_AWQ", ("row_pairs",), (128, 128), 64),
        ),
        (
            {"quant_method": "modelopt"},
            MIXED,
            ("MIXED_PRECISION", ("fp8", "int8", "row_pairs"), (128, 128), 32),
        ),
        (
            DEEPSEEK_V3 | {"weight_block_size": [64, 32]},
            MIXED,
            ("MIXED_PRECISION", ("fp8", "int8", "row_pairs"), (64, 32), 32),
        ),
        (None, None, None),
    ],
)
def test_descriptions_are_read(told, beside, expected, tmp_path):
    found = read(tmp_path, told, beside)
    if expected is None:
        assert found is None
        return
    assert found is not None
    assert (found.method, found.forms, found.block, found.group) == expected
    file = "config.json: quantization_config" if beside is None else "config.json"
    assert found.source.startswith(str(tmp_path)) and (file in found.source)


def hollow(folder: Path, config: dict[str, Any], form_of: Any) -> int:
    """Writes the header of a checkpoint and no data: the rest of the file is a hole."""
    header: dict[str, Any] = {}
    end = 0

    def add(name: str, code: str, shape: tuple[int, ...]) -> None:
        nonlocal end
        size = {"F8_E4M3": 1, "I8": 1, "BF16": 2, "F32": 4, "I32": 4, "I64": 8}[code]
        begin, end = end, end + size * int(np.prod(shape, dtype=np.int64))
        header[name] = {"dtype": code, "shape": shape, "data_offsets": [begin, end]}

    for name, shape in tensor_shapes(config):
        form, base = form_of(name), name.removesuffix(".weight")
        if form == "fp8":
            add(name, "F8_E4M3", shape)
            add(f"{name}_scale_inv", "F32", tuple(-(-n // 128) for n in shape))
        elif form == "words":
            add(f"{base}.weight_packed", "I32", (shape[0], -(-shape[1] // 8)))
            add(f"{base}.weight_scale", "BF16", (shape[0], shape[1] // 32))
            add(f"{base}.weight_shape", "I64", (2,))
        else:
            add(name, "F32" if name.endswith("bias") else "BF16", shape)
    text = json.dumps(header).encode()
    file = folder / "model.safetensors"
    file.write_bytes(struct.pack("<Q", len(text)) + text)
    os.truncate(file, 8 + len(text) + end)
    (folder / "config.json").write_text(json.dumps(config))
    return end


def plan(folder: Path) -> tuple[dict[str, list], Any]:
    cfg, scheme = load_config(folder), schemes.of_folder(folder)
    with Shards(folder) as shards:
        found = inventory.plan(shards, cfg, scheme)
        for weights in found.values():
            inventory.check_kept(shards, cfg, weights)
    return found, cfg


@pytest.mark.parametrize(
    ("layers", "gb"), [(4, 32.4), pytest.param(61, 688.6, marks=pytest.mark.full)]
)
def test_deepseek_v3_stays_fp8(layers, gb, tmp_path):
    """Real sizes and an MTP module: every matrix, and rotary rows inside of their blocks."""
    config = presets.deepseek_v3().to_hf() | {"quantization_config": DEEPSEEK_V3}
    config["num_hidden_layers"] = layers
    size = hollow(tmp_path, config, all_of("fp8"))
    assert round(size / 1e9, 1) == gb
    found, cfg = plan(tmp_path)
    kinds = {leaf: weights[0].kind for leaf, weights in found.items()}
    copies = 2  # of embedding and head; they are not loaded
    assert sum(map(len, found.values())) == len(dict(tensor_shapes(config))) - copies
    assert kinds["moe_layers.self_attn.q_b_proj"] == ("e4m3", (128, 128))
    kv_a = found["moe_layers.self_attn.kv_a_proj_with_mqa"][0]
    assert kv_a.scales_shape() == (5, 56)
    plain = {leaf for leaf, kind in kinds.items() if kind is None}
    assert {leaf.rpartition(".")[2] for leaf in plain} == {
        "weight",
        "e_score_correction_bias",
        "eh_proj",
    }
    assert cfg.mtp.num_nextn_predict_layers == 1


@pytest.mark.full
def test_kimi_k2_thinking_stays_int4(tmp_path):
    config = presets.kimi_k2().to_hf() | {"quantization_config": KIMI_K2_THINKING}
    hollow(tmp_path, config, experts_of("words", "plain"))
    found, _ = plan(tmp_path)
    quantised = {leaf for leaf, weights in found.items() if weights[0].kind is not None}
    experts = "moe_layers.mlp.experts."
    assert quantised == {experts + "gate_up_proj", experts + "down_proj"}
    assert {weights.kind for leaf in quantised for weights in found[leaf]} == {("int4", (1, 32))}
