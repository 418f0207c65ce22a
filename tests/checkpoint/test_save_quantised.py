"""Saving quantized params: the public formats, bit for bit, and what none of them holds."""

import dataclasses
import json

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dskjax import mesh, model
from dskjax.checkpoint import load_hf, save_hf
from dskjax.layers.rope import half_split_order
from dskjax.params import named_leaves, tree_of, unstack
from tests.checkpoint import random_codes
from tests.checkpoint.build import read_folder
from tests.checkpoint.random_codes import FP8, INT4, fp8, int4, int4_experts, same, small, w4afp8
from tests.oracles import formats

BF16 = ml_dtypes.bfloat16
CASES = {
    "fp8": (fp8, np.float32),
    "fp8, other blocks": (lambda n: fp8(n) and ("e4m3", (32, 48)), np.float32),
    "fp8 but for experts": (lambda n: None if ".experts." in n else fp8(n), np.float32),
    "w4afp8": (w4afp8, np.float32),
    "int4": (int4, np.float32),
    "int4 experts": (int4_experts, BF16),
}


def says(folder):
    return json.loads((folder / "config.json").read_text()).get("quantization_config")


@pytest.mark.parametrize("name", CASES)
def test_loading_gives_the_same_bits(name, tmp_path):
    kinds, scales = CASES[name]
    cfg = small(kv_lora_rank=120) if "blocks" in name else small()
    params = random_codes.params(cfg, kinds, scales)
    save_hf(tmp_path / "a", params, cfg, max_shard_bytes=100_000)
    found, found_cfg = load_hf(tmp_path / "a")
    assert found_cfg == cfg
    same(found, params)


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["w4afp8", "int4"])
def test_separate_and_sharded_params_make_the_same_files(name, tmp_path):
    kinds, scales = CASES[name]
    cfg = small()
    params = jax.tree.map(jnp.asarray, random_codes.params(cfg, kinds, scales))
    sharding = mesh.preset("train", mesh.make_mesh(dp=2, ep=2, tp=2))
    placed = jax.device_put(params, sharding.params(model.param_specs(cfg), params))
    for folder, tree in (("a", params), ("b", unstack(params)), ("c", placed)):
        save_hf(tmp_path / folder, tree, cfg)
    for file in (tmp_path / "a").iterdir():
        for folder in ("b", "c"):
            assert (tmp_path / folder / file.name).read_bytes() == file.read_bytes()


def stored_rows(cfg, values):
    """Rows of one head's projection in the order of DeepSeek's files: rotary ones interleaved."""
    rope, out = cfg.mla.qk_rope_head_dim, np.array(values)
    head = cfg.mla.qk_nope_head_dim + rope
    for start in range(0, len(values), head):
        rows = np.array(values)[start + head - rope : start + head]
        out[start + head - rope : start + head][half_split_order(rope)] = rows
    return out


def test_tensors_are_what_the_formats_say(tmp_path):
    """By the independent unpacking of the oracles, without our loader."""
    cfg = small()
    for name in ("fp8", "w4afp8", "int4 experts"):
        kinds, scales = CASES[name]
        params = random_codes.params(cfg, kinds, scales)
        save_hf(tmp_path / name, params, cfg)
    fp8_, w4, packed = (read_folder(tmp_path / n) for n in ("fp8", "w4afp8", "int4 experts"))

    leaf = random_codes.params(cfg, fp8)["moe_layers"]["self_attn"]["q_b_proj"]
    base = "model.layers.1.self_attn.q_b_proj.weight"
    assert fp8_[base].dtype == ml_dtypes.float8_e4m3fn
    codes = stored_rows(cfg, leaf.values[0].view(np.uint8))
    assert np.array_equal(fp8_[base].view(np.uint8), codes)
    assert fp8_[f"{base}_scale_inv"].dtype == np.float32
    assert np.array_equal(fp8_[f"{base}_scale_inv"], leaf.scales[0])

    experts = random_codes.params(cfg, w4afp8)["mtp_layers"]["block"]["mlp"]["experts"]
    base = "model.layers.2.mlp.experts.3.up_proj.weight"
    assert w4[base].dtype == np.int8 and w4[base].shape == (128, 64)
    assert np.array_equal(w4[base].view(np.uint8), experts["gate_up_proj"].values[0, 3, 1])
    assert np.array_equal(w4[f"{base}_scale_inv"], experts["gate_up_proj"].scales[0, 3, 1])
    assert w4["model.layers.1.self_attn.o_proj.weight"].dtype == ml_dtypes.float8_e4m3fn

    experts = random_codes.params(cfg, int4_experts, BF16)["moe_layers"]["mlp"]["experts"]
    base = "model.layers.1.mlp.experts.2.down_proj.weight"
    assert base not in packed
    words, shape = packed[f"{base}_packed"], packed[f"{base}_shape"]
    assert words.dtype == np.int32 and words.shape == (128, 16)
    nibbles = (words.view(np.uint32)[..., None] >> (4 * np.arange(8, dtype=np.uint32))) & 15
    meant = formats.int4_unpack(experts["down_proj"].values[0, 2])
    assert np.array_equal(nibbles.reshape(128, 128).astype(int) - 8, meant)
    assert shape.dtype == np.int64 and shape.tolist() == [128, 128]
    assert packed[f"{base}_scale"].dtype == BF16  # nothing is lost
    assert np.array_equal(packed[f"{base}_scale"], experts["down_proj"].scales[0, 2].astype(BF16))
    exact = random_codes.params(cfg, int4_experts)
    save_hf(tmp_path / "exact", exact, cfg)
    assert read_folder(tmp_path / "exact")[f"{base}_scale"].dtype == np.float32


def test_config_says_what_is_quantised(tmp_path):
    cfg = small()
    for name, (kinds, scales) in CASES.items():
        if "other" not in name:
            save_hf(tmp_path / name, random_codes.params(cfg, kinds, scales), cfg)
    fp8_ = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": [128, 128],
    }
    assert says(tmp_path / "fp8") == fp8_
    found = says(tmp_path / "fp8 but for experts")
    kept = found.pop("modules_to_not_convert")
    assert found == fp8_
    assert "model.layers.1.mlp.experts.0.gate_proj" in kept and "lm_head" in kept
    assert not [name for name in kept if "self_attn" in name or "shared_experts" in name]
    found = says(tmp_path / "w4afp8")
    assert (found["quant_method"], found["group_size"]) == ("w4afp8", 128)
    found = says(tmp_path / "int4")
    assert (found["quant_method"], found["format"]) == ("compressed-tensors", "pack-quantized")
    assert found["config_groups"]["group_0"]["weights"]["group_size"] == 64
    assert found["config_groups"]["group_0"]["targets"] == ["Linear"]
    rest = ["mlp.gate", "mlp.gate", "eh_proj", "shared_head.head"]
    plain = [f"model.layers.{i}.{n}" for i, n in zip((1, 2, 2, 2), rest, strict=True)]
    assert sorted(found["ignore"]) == sorted([*plain, "lm_head"])
    found = says(tmp_path / "int4 experts")
    tensors = read_folder(tmp_path / "int4 experts")
    linear = {
        name.removesuffix(".weight")
        for name, value in tensors.items()
        if name.endswith(".weight") and value.ndim == 2 and "embed" not in name
    }
    assert set(found["ignore"]) == linear | {"model.layers.2.shared_head.head"}
    assert len(set(found["ignore"])) == len(found["ignore"])


@pytest.mark.parametrize(
    ("kinds", "says"),
    [
        (lambda n: FP8 if n == "lm_head.weight" else fp8(n), "'lm_head.weight' is a QTensor"),
        (lambda n: FP8 if n.endswith("mlp.gate.weight") else fp8(n), "mlp.gate.weight' is a QT"),
        (lambda n: ("int4", (1, 16)) if "experts." in n else None, "1x16 values.*one per row and"),
        (lambda n: ("int4", (2, 32)) if "experts." in n else None, "2x32 values.*one per row and"),
        (lambda n: ("int4", (1, 32)) if "o_proj" in n else int4(n), "one block for all"),
        (lambda n: ("e4m3", (64, 128)) if "o_proj" in n else fp8(n), "one block for all"),
        (lambda n: INT4 if "o_proj" in n else fp8(n), "o_proj' is int4.*W4AFP8.*routed experts"),
        (lambda n: int4_experts(n) or fp8(n), "experts.*is int4 with groups of 32.*groups of 128"),
        (lambda n: w4afp8(n) and INT4 if "gate_up" in n else fp8(n), "dense_layers.*is int4"),
        (lambda n: None if "q_a_proj" in n else w4afp8(n), "q_a_proj' is plain.*no plain ones"),
        (lambda n: FP8 if "experts.down" in n else w4afp8(n), "experts.down_proj' is fp8"),
    ],
)
def test_what_no_public_format_holds_is_named(kinds, says, tmp_path):
    cfg = small()
    with pytest.raises(NotImplementedError, match=says):
        save_hf(tmp_path / "a", random_codes.params(cfg, kinds), cfg)
    assert not list(tmp_path.iterdir())


def test_groups_must_divide_the_inputs(tmp_path):
    cfg = small(moe_intermediate_size=96)
    with pytest.raises(NotImplementedError, match="down_proj' is int4 with 96 inputs"):
        save_hf(tmp_path / "a", random_codes.params(cfg, w4afp8), cfg)


def test_rotary_rows_must_stay_in_their_blocks(tmp_path):
    cfg = small()
    tight = lambda n: fp8(n) and ("e4m3", (20, 128))  # noqa: E731
    with pytest.raises(NotImplementedError, match="q_b_proj'.*more than one block of 20 rows"):
        save_hf(tmp_path / "a", random_codes.params(cfg, tight), cfg)
    plain = dataclasses.replace(cfg, rope=dataclasses.replace(cfg.rope, rope_interleave=False))
    params = random_codes.params(plain, tight)
    save_hf(tmp_path / "a", params, plain)  # nothing moves
    same(load_hf(tmp_path / "a")[0], params)


def test_malformed_leaves_are_named(tmp_path):
    cfg = small()
    leaves = dict(named_leaves(random_codes.params(cfg, fp8)))
    name = "moe_layers.self_attn.kv_b_proj"  # [1, 192, 128]
    good = leaves[name]
    for changes, match in [
        ({"scales": good.scales[:, :1]}, r"scales of shape \(1, 1, 1\); expected \(1, 2, 1\)"),
        ({"scales": good.scales.astype(np.float16)}, "scales of float16; e4m3 has"),
        ({"values": good.values.view(np.int8)}, "QTensor of int8 .*e4m3 has float8_e4m3fn"),
        ({"values": good.values[:, :128]}, r"has shape \(1, 128, 128\); expected \(1, 192, 128\)"),
        ({"format": "int4"}, r"has shape \(1, 192, 256\); expected \(1, 192, 128\)"),
    ]:
        with pytest.raises(ValueError, match=f"{name}.*{match}"):
            bad = dataclasses.replace(good, **changes)
            save_hf(tmp_path / "a", tree_of(leaves | {name: bad}), cfg)
    assert not list(tmp_path.iterdir())


def test_separate_layers_must_be_alike_and_complete(tmp_path):
    cfg = small(num_hidden_layers=3)
    layers = unstack(jax.tree.map(jnp.asarray, random_codes.params(cfg, fp8)))
    first, second = layers["moe_layers"]
    plain = second | {"self_attn": second["self_attn"] | {"o_proj": jnp.zeros((128, 128))}}
    for group, match in [
        ((first,), "moe_layers.* has 1 layers; expected 2"),
        ((first, second, second), "has 3 layers; expected 2"),
        ((), "lack weight 'moe_layers"),
        ((first, plain), "o_proj' is e4m3 in blocks of .* in one layer and float32 in another"),
    ]:
        with pytest.raises(ValueError, match=match):
            save_hf(tmp_path / "a", {**layers, "moe_layers": group}, cfg)
    assert not list(tmp_path.iterdir())
