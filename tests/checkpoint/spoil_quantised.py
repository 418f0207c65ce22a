"""Ways to spoil a quantized checkpoint, and the error that each must give.

One table for each kind of checkpoint: FP8, W4AFP8, words of compressed-tensors, pairs of rows of
ModelOpt, and plain floats.
"""

import copy
from pathlib import Path
from typing import Any

import ml_dtypes
import numpy as np

from tests.checkpoint import quantised as by_hand
from tests.checkpoint.build import write_folder
from tests.checkpoint.quantised import AWQ, E4M3, FP8, GROUP, PACKED, W4AFP8, all_of
from tests.checkpoint.spoil import Spoil, config, copied, damage, edit, put, text, then

BF16 = ml_dtypes.bfloat16
OUT = "model.layers.1.self_attn.o_proj"
EXPERT = "model.layers.2.mlp.experts.3."
DOWN, UP = EXPERT + "down_proj", EXPERT + "up_proj"


def says(**changes: Any) -> Spoil:
    """Changes `quantization_config` of FP8."""
    return config(quantization_config={**FP8, **changes})


def packed(weights: dict[str, Any] | None = None, **changes: Any) -> Spoil:
    """Changes what compressed-tensors says, of the weights or of everything."""
    told = copy.deepcopy(PACKED) | changes
    if weights is not None:
        told["config_groups"]["group_0"]["weights"] |= weights
    return config(quantization_config=told)


def poke(name: str, value: float) -> Spoil:
    """Puts a value into the middle of a tensor."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors[name] = tensors[name].copy()
        tensors[name][-1, 1] = value

    return lambda folder: edit(folder, change)


def recast(name: str, dtype: Any) -> Spoil:
    return lambda folder: edit(folder, lambda t: t.update({name: t[name].astype(dtype)}))


def everything_plain(folder: Path) -> None:
    made = by_hand.make(by_hand.config(), all_of("plain"))
    write_folder(folder, by_hand.config(FP8), made.tensors, files=3)


def two_groups(folder: Path) -> None:
    groups = {"group_0": PACKED["config_groups"]["group_0"]}
    groups["group_1"] = copy.deepcopy(groups["group_0"])
    groups["group_1"]["weights"]["group_size"] = 64
    packed(config_groups=groups)(folder)


Z = np.zeros
SCALE = f"{OUT}.weight_scale_inv"  # [4, 3]: 64 rows, 64 columns in blocks of 16 x 24
UNSUPPORTED = NotImplementedError
FP8_CASES = {
    "no scale": damage(put(SCALE, None), f"its companion '{SCALE}' is missing"),
    "scale under another name": damage(
        then(put(SCALE, None), put(f"{OUT}.weight_scale", Z((4, 3), np.float32))),
        f"unexpected tensor '{OUT}.weight_scale'",
        f"its weight '{OUT}.weight' has dtype F8_E4M3",
    ),
    "scale of a plain weight": damage(
        put(f"{OUT}.weight", Z((64, 64), BF16)),
        f"unexpected tensor '{SCALE}'; its weight '{OUT}.weight' has dtype BF16 and no use for it",
    ),
    "scale of no weight": damage(
        put("model.layers.1.more_proj.weight_scale_inv", Z((4, 3), np.float32)),
        "unexpected tensor 'model.layers.1.more_proj.weight_scale_inv'; expected only those of",
    ),
    "scale of another block": damage(
        put(SCALE, Z((1, 1), np.float32)),
        f"'{SCALE}' has shape [1, 1]; expected [4, 3], a scale for each 16x24 of [64, 64]",
    ),
    "scale transposed": damage(put(SCALE, Z((3, 4), np.float32)), f"'{SCALE}' has shape [3, 4]"),
    "scale cut to whole blocks": damage(
        put(SCALE, Z((4, 2), np.float32)), f"'{SCALE}' has shape [4, 2]; expected [4, 3]"
    ),
    "one scale for all": damage(put(SCALE, np.array(1.0, np.float32)), f"'{SCALE}' has shape []"),
    "scale NaN": damage(
        poke(SCALE, np.nan), f"'{SCALE}' holds nan at [3, 1]; expected finite scales"
    ),
    "scale infinite": damage(poke(SCALE, -np.inf), f"'{SCALE}' holds -inf at [3, 1]"),
    "scale e8m0 NaN": damage(
        put(SCALE, np.full((4, 3), 255, np.uint8).view(by_hand.E8M0)),
        f"'{SCALE}' holds nan at [0, 0]",
    ),
    "scale integer": damage(
        recast(SCALE, np.int32), f"'{SCALE}' has dtype I32; expected F32, BF16, F16, F8_E8M0"
    ),
    "scale double": damage(recast(SCALE, np.float64), f"'{SCALE}' has dtype F64"),
    "values cut": damage(
        put(f"{OUT}.weight", Z((64, 63), E4M3)),
        f"'{OUT}.weight' has shape [64, 63]; expected [64, 64] from config.json",
    ),
    "e5m2": damage(
        put(f"{OUT}.weight", Z((64, 64), ml_dtypes.float8_e5m2)),
        f"'{SCALE}'; its weight '{OUT}.weight' has dtype F8_E5M2",
    ),
    "experts of two kinds": damage(
        then(put(f"{UP}.weight", Z((64, 64), BF16)), put(f"{UP}.weight_scale_inv", None)),
        f"'{UP}.weight' is not quantized",
        "e4m3 with a scale for each 16x24, but ",
        "parts of 'moe_layers.mlp.experts.gate_up_proj': load with quantised='dequantise'",
    ),
    "all plain": damage(
        everything_plain, "config.json: quantization_config says 'fp8', but no weight is quantized"
    ),
    "config says nothing": damage(
        config(quantization_config=None),
        ".weight' has dtype F8_E4M3, as quantized weights have, but config.json has no quantiza",
    ),
    "config says another method": damage(
        config(quantization_config=PACKED),
        ".weight' has dtype F8_E4M3, as quantized weights have, but ",
        "quantization_config says 'compressed-tensors'",
    ),
    "config says another block": damage(
        says(weight_block_size=[128, 128]), ".weight_scale_inv' has shape [", "for each 128x128 of"
    ),
    "no object": damage(config(quantization_config=["fp8"]), "_config = ['fp8'] must be an object"),
    "no method": damage(
        config(quantization_config={}), "quantization_config: quant_method = None must be a name"
    ),
    "method a list": damage(says(quant_method=["fp8"]), "quant_method = ['fp8'] must be a name"),
    "unknown method": damage(
        says(quant_method="bitnet"),
        "quant_method 'bitnet' is not supported. Supported: fp8, w4afp8, compressed-tensors",
        "convert the checkpoint to FP8",
        error=UNSUPPORTED,
    ),
    **{
        method: damage(
            says(quant_method=method),
            f"quant_method '{method}' is not supported: ",
            error=UNSUPPORTED,
        )
        for method in ("awq", "gptq", "bitsandbytes", "mxfp4", "fbgemm_fp8")
    },
    **{
        f"block {block}": damage(says(weight_block_size=block), "weight_block_size = ", part)
        for block, part in (
            ([0, 128], "0 must be a positive integer"),
            ([128, -1], "-1 must be a positive integer"),
            ([128, 1.5], "1.5 must be a positive integer"),
            ([True, 8], "True must be a positive integer"),
            ([128], "[128] must be [rows, columns]"),
            (128, "128 must be [rows, columns]"),
        )
    },
    "scales per tensor": damage(
        says(weight_block_size=None), "there is no weight_block_size", error=UNSUPPORTED
    ),
    "static activations": damage(
        says(activation_scheme="static"),
        "activation_scheme = 'static' is not supported, expected 'dynamic'",
        error=UNSUPPORTED,
    ),
    "another fp8": damage(says(fmt="e5m2"), "fmt = 'e5m2' is not supported", error=UNSUPPORTED),
    "head quantized": damage(
        then(
            put("lm_head.weight", Z((48, 64), E4M3)),
            put("lm_head.weight_scale_inv", Z((3, 3), np.float32)),
            put("model.layers.3.shared_head.head.weight", None),
            put("model.layers.4.shared_head.head.weight", None),
        ),
        "'lm_head.weight' is quantized; of this weight only floats are used: load with quantised=",
    ),
    "norm quantized": damage(
        then(put("model.norm.weight", Z(64, E4M3))),
        "'model.norm.weight' is quantized, but it is not one matrix (expected shape [64])",
        error=UNSUPPORTED,
    ),
    "copy quantized": damage(
        put("model.layers.3.embed_tokens.weight", Z((48, 64), E4M3)),
        "'model.layers.3.embed_tokens.weight' has dtype F8_E4M3; expected BF16, F16, F32",
    ),
    "fused experts": damage(
        then(
            lambda folder: edit(
                folder,
                lambda t: [
                    t.pop(n) for n in list(t) if ".layers.2.mlp.experts." in n and "down" in n
                ],
            ),
            put("model.layers.2.mlp.experts.down_proj", Z((4, 64, 64), E4M3)),
        ),
        "'model.layers.2.mlp.experts.down_proj' is quantized, but it is not one matrix",
        "fused experts",
        error=UNSUPPORTED,
    ),
    "tensor in two shards": damage(
        copied(SCALE), f"tensor '{SCALE}' should be in model-0", "holds one, too"
    ),
    "indexer": damage(
        put("model.layers.0.self_attn.indexer.wk.weight_scale_inv", Z((1, 1), np.float32)),
        "DeepSeek-V3.2",
        error=UNSUPPORTED,
    ),
    "k scale": damage(
        put("model.layers.0.self_attn.k_scale", np.ones((), np.float32)),
        "unexpected tensor 'model.layers.0.self_attn.k_scale'",
    ),
    "ModelOpt's file is a list": damage(
        text("hf_quant_config.json", "[]"), "hf_quant_config.json: expected a JSON object"
    ),
    "ModelOpt's file says nothing": damage(
        text("hf_quant_config.json", "{}"), "hf_quant_config.json: field 'quantization' = None"
    ),
    "ModelOpt's NVFP4": damage(
        text("hf_quant_config.json", '{"quantization": {"quant_algo": "NVFP4"}}'),
        "hf_quant_config.json.quantization: quant_algo 'NVFP4' is not supported",
        error=UNSUPPORTED,
    ),
}
INPUT = EXPERT + "w2.input_scale"
W4AFP8_CASES = {
    "experts of bytes": damage(
        put(f"{DOWN}.weight", Z((64, 64), np.int8)),
        f"'{DOWN}.weight' has shape [64, 64]; expected [64, 32], int4 [64, 64] packed",
    ),
    "int4 scale of FP8's shape": damage(
        put(f"{DOWN}.weight_scale_inv", Z((4, 3), np.float32)),
        f"'{DOWN}.weight_scale_inv' has shape [4, 3]; expected [64, 2], a scale for each 1x32",
    ),
    "int4 scale NaN": damage(
        poke(f"{DOWN}.weight_scale_inv", np.nan), f"'{DOWN}.weight_scale_inv' holds nan at [63, 1]"
    ),
    "input scale of a vector": damage(
        put(INPUT, np.ones(4, np.float32)), f"'{INPUT}' has shape [4]; expected [1]"
    ),
    "input scale an integer": damage(put(INPUT, np.ones(1, np.int32)), f"'{INPUT}' has dtype I32"),
    "input scale of no expert": damage(
        put("model.layers.2.mlp.experts.9.w1.input_scale", np.ones(1, np.float32)),
        "unexpected tensor 'model.layers.2.mlp.experts.9.w1.input_scale'",
    ),
    "unsigned experts": damage(
        put(f"{DOWN}.weight", Z((64, 32), np.uint8)), f"'{DOWN}.weight' has dtype U8, as quantized"
    ),
    "experts of two kinds": damage(
        then(
            put(f"{DOWN}.weight", Z((64, 64), E4M3)),
            put(f"{DOWN}.weight_scale_inv", Z((4, 3), np.float32)),
            put(INPUT, None),
        ),
        f"'{DOWN}.weight' is e4m3 with a scale for each 16x24",
        "is int4 with a scale for each 1x32, but",
    ),
    "group of 48": damage(
        config(quantization_config={**W4AFP8, "group_size": 48}),
        "group_size = 48 is not supported, expected one of 32, 64, 128",
        error=UNSUPPORTED,
    ),
    "group of 64": damage(
        config(quantization_config={**W4AFP8, "group_size": 64}),
        ".weight_scale_inv' has shape [64, 2]; expected [64, 1], a scale for each 1x64",
    ),
    "odd inputs": damage(
        config(moe_intermediate_size=33), "is int4 with 33 input columns (config.json); expected an"
    ),
    "inputs that groups do not divide": damage(
        config(moe_intermediate_size=48), "is int4 with 48 input columns", f"groups of {GROUP} div"
    ),
}
SHAPE = f"{OUT}.weight_shape"
WORDS_CASES = {
    "shape contradicts": damage(
        put(SHAPE, np.array([64, 72])), f"'{SHAPE}' says [64, 72]; expected [64, 64] from config"
    ),
    "shape of one number": damage(
        put(SHAPE, np.array([64])), f"'{SHAPE}' has shape [1]; expected [2], rows and columns"
    ),
    "shape in floats": damage(recast(SHAPE, np.float32), f"'{SHAPE}' has dtype F32; expected I64"),
    "no shape": damage(put(SHAPE, None), f"its companion '{SHAPE}' is missing"),
    "no scale": damage(put(f"{OUT}.weight_scale", None), f"'{OUT}.weight_scale' is missing from"),
    "no values": damage(put(f"{OUT}.weight_packed", None), f"tensor '{OUT}.weight' is missing"),
    "zero points": damage(
        put(f"{OUT}.weight_zero_point", Z((8, 2), np.int32)),
        f"'{OUT}.weight_zero_point' belongs to an asymmetric compressed-tensors checkpoint",
        error=UNSUPPORTED,
    ),
    "order of inputs": damage(
        put(f"{OUT}.weight_g_idx", Z(64, np.int32)), "an order of inputs", error=UNSUPPORTED
    ),
    "AutoAWQ": damage(
        put(f"{OUT}.qweight", Z((64, 8), np.int32)), "an AutoAWQ or GPTQ", error=UNSUPPORTED
    ),
    "words of bytes": damage(
        put(f"{OUT}.weight_packed", Z((64, 32), np.uint8)), f"'{OUT}.weight_packed' has dtype U8"
    ),
    "too few words": damage(
        put(f"{OUT}.weight_packed", Z((64, 7), np.int32)),
        f"'{OUT}.weight_packed' has shape [64, 7]; expected [64, 8], int4 [64, 64] packed",
    ),
    **{
        f"{name} = {value!r}": damage(
            packed({name: value}), f"{name} = {value!r} is not supported", error=UNSUPPORTED
        )
        for name, value in (
            ("num_bits", 8),
            ("type", "float"),
            ("symmetric", False),
            ("strategy", "channel"),
            ("dynamic", True),
            ("group_size", 16),
        )
    },
    "no group size": damage(packed({"group_size": None}), "group_size = None must be a positive"),
    "floats": damage(
        packed(format="float-quantized"),
        "format = 'float-quantized' is not supported, expected 'pack-quantized'",
        error=UNSUPPORTED,
    ),
    "rotated": damage(
        packed(transform_config={"config_groups": {"R1": {}}}), "rotated", error=UNSUPPORTED
    ),
    "no groups": damage(packed(config_groups={}), "config_groups is empty"),
    "groups a list": damage(packed(config_groups=[]), "'config_groups' = [] must be an object"),
    "two group sizes": damage(
        two_groups, "group sizes {'group_0': 32, 'group_1': 64} differ", error=UNSUPPORTED
    ),
}
FACTORS = f"{OUT}.pre_quant_scale"
PAIRS_CASES = {
    "factors of inputs": damage(
        put(FACTORS, np.ones(64, BF16)),
        f"'{FACTORS}' scales the inputs of a quantized weight, which has no place for it: load wi",
    ),
    "factors of another length": damage(
        put(FACTORS, np.ones(63, BF16)), f"'{FACTORS}' has shape [63]; expected [64], a factor"
    ),
    "second scale of a vector": damage(
        put(f"{OUT}.weight_scale_2", np.ones(3, np.float32)),
        f"'{OUT}.weight_scale_2' has shape [3]",
    ),
    "odd rows": damage(
        then(
            config(q_lora_rank=63),
            put("model.layers.0.self_attn.q_a_layernorm.weight", np.ones(63, BF16)),
        ),
        "'model.layers.0.self_attn.q_a_proj.weight' packs pairs of rows",
        "makes it 63 rows",
    ),
    "zero points": damage(
        config(quantization_config={**AWQ, "has_zero_point": True}),
        "has_zero_point = True is not supported",
        error=UNSUPPORTED,
    ),
}
PLAIN_CASES = {
    "scale without quantization": damage(
        put(f"{OUT}.weight_scale_inv", Z((1, 1), np.float32)),
        f"unexpected tensor '{OUT}.weight_scale_inv'; its weight '{OUT}.weight' has dtype BF16",
    ),
    "one quantized weight": damage(
        put(f"{OUT}.weight", Z((64, 64), E4M3)),
        f"'{OUT}.weight' has dtype F8_E4M3, as quantized weights have, but config.json has no",
    ),
}
CASES = {
    "fp8": FP8_CASES,
    "w4afp8": W4AFP8_CASES,
    "words": WORDS_CASES,
    "pairs": PAIRS_CASES,
    "plain": PLAIN_CASES,
}
