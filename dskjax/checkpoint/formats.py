"""Which public format can hold the weights of a model, and what `config.json` says of it.

    fp8                 every quantized weight in e4m3 with block scales: DeepSeek-V3
    w4afp8              routed experts int4 with groups of 128, all other linear weights fp8
    compressed-tensors  int4 with groups, the rest plain: "pack-quantized", as Kimi-K2-Thinking

`stored` names the tensors of each; here the choice is made, for all weights of a model together.
"""

from collections.abc import Mapping
from typing import Any

from dskjax.checkpoint import names
from dskjax.checkpoint.schemes import GROUPS, Form
from dskjax.checkpoint.weights import LeafInfo
from dskjax.config import ModelConfig

_E4M3_BLOCK = (128, 128)
_W4_BLOCK = (1, 128)
_FIX = "dequantise it, or quantise all with dskjax.quantise"


def choose(leaves: Mapping[str, LeafInfo]) -> dict[str, Form]:
    """The form in which each leaf is written.

    Raises:
        NotImplementedError: no public format holds these weights together; names one and why.
    """
    kinds = {name: leaf.kind for name, leaf in leaves.items() if leaf.kind is not None}
    for name in kinds:
        if not names.is_linear(name):
            raise NotImplementedError(
                f"weight {name!r} is a QTensor; public formats keep the embedding, head, gates, "
                "eh_proj and norms plain: dequantise it"
            )
    int4 = {name: block for name, (code, block) in kinds.items() if code == "int4"}
    fp8 = {name: block for name, (code, block) in kinds.items() if code == "e4m3"}
    _check_one_block(int4)
    _check_one_block(fp8)
    for name, (rows, group) in int4.items():
        _check_int4(name, rows, group, leaves[name].shape[-1])
    if int4 and fp8:
        _check_w4afp8(leaves, int4, fp8)
    int4_form: Form = "int8" if fp8 else "words"
    return {
        name: int4_form if name in int4 else "fp8" if name in fp8 else "plain" for name in leaves
    }


def describe(
    leaves: Mapping[str, LeafInfo], forms: Mapping[str, Form], cfg: ModelConfig
) -> dict[str, Any] | None:
    """The `quantization_config` of these weights; None when all are plain."""
    blocks = {forms[name]: leaf.kind[1] for name, leaf in leaves.items() if leaf.kind is not None}
    if not blocks:
        return None
    if "words" in blocks:
        return _pack_quantized(blocks["words"][1], _plain_modules(forms, cfg))
    block = list(blocks["fp8"])
    if "int8" in blocks:
        return {
            "quant_method": "w4afp8",
            "activation_scheme": "dynamic",
            "weight_block_size": block,
            "group_size": blocks["int8"][1],
        }
    config = {
        "quant_method": "fp8",
        "activation_scheme": "dynamic",
        "fmt": "e4m3",
        "weight_block_size": block,
    }
    plain = [name for name, form in forms.items() if form == "plain" and names.is_linear(name)]
    if plain:
        config["modules_to_not_convert"] = _plain_modules(forms, cfg)
    return config


def _check_one_block(blocks: Mapping[str, tuple[int, int]]) -> None:
    for name, block in blocks.items():
        first, other = next(iter(blocks.items()))
        if block != other:
            raise NotImplementedError(
                f"weight {name!r} has a scale per {block[0]}x{block[1]} values and {first!r} one "
                f"per {other[0]}x{other[1]}; a checkpoint has one block for all: {_FIX}"
            )


def _check_int4(name: str, rows: int, group: int, columns: int) -> None:
    if rows != 1 or group not in GROUPS:
        raise NotImplementedError(
            f"weight {name!r} is int4 with a scale per {rows}x{group} values; public formats have "
            f"one per row and {', '.join(map(str, GROUPS))} inputs: {_FIX}"
        )
    if columns % group:
        raise NotImplementedError(
            f"weight {name!r} is int4 with {columns} inputs, which groups of {group} do not "
            "divide, as public formats want: quantise it as fp8, or dequantise it"
        )


def _check_w4afp8(
    leaves: Mapping[str, LeafInfo],
    int4: Mapping[str, tuple[int, int]],
    fp8: Mapping[str, tuple[int, int]],
) -> None:
    why = "weights in both int4 and fp8 have the W4AFP8 format only, which has"
    for name, leaf in leaves.items():
        if name in int4 and (".experts." not in name or int4[name] != _W4_BLOCK):
            raise NotImplementedError(
                f"weight {name!r} is int4 with groups of {int4[name][1]}; {why} int4 for routed "
                f"experts, in groups of {_W4_BLOCK[1]}: {_FIX}"
            )
        if name in fp8 and (".experts." in name or fp8[name] != _E4M3_BLOCK):
            rows, columns = fp8[name]
            raise NotImplementedError(
                f"weight {name!r} is fp8 with blocks of {rows}x{columns}; {why} fp8 for all linear "
                f"weights but routed experts, in blocks of 128x128: {_FIX}"
            )
        if leaf.kind is None and names.is_linear(name):
            raise NotImplementedError(f"weight {name!r} is plain; {why} no plain ones: {_FIX}")


def _plain_modules(forms: Mapping[str, Form], cfg: ModelConfig) -> list[str]:
    """The linear modules that are not quantized, under the names that other programs give them."""
    plain = [slot for slot in names.slots(cfg) if forms.get(slot.leaf) == "plain"]
    found = [slot.name for slot in plain if len(slot.shape) == 2 and slot.name != names.EMBEDDING]
    found += [name for name in names.aliases(cfg) if name.endswith("head.weight")]
    return [name.removesuffix(".weight") for name in sorted(set(found), key=names.layer_of)]


def _pack_quantized(group: int, ignore: list[str]) -> dict[str, Any]:
    weights = {
        "num_bits": 4,
        "type": "int",
        "symmetric": True,
        "strategy": "group",
        "group_size": group,
        "dynamic": False,
    }
    return {
        "quant_method": "compressed-tensors",
        "format": "pack-quantized",
        "quantization_status": "compressed",
        "kv_cache_scheme": None,
        "config_groups": {
            "group_0": {
                "targets": ["Linear"],
                "weights": weights,
                "input_activations": None,
                "output_activations": None,
            }
        },
        "ignore": ignore,
    }
