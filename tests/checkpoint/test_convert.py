"""Converting checkpoints gives what loading, changing and saving gives.

Sources are made by hand (`quantised`), without our writer.
"""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np
import pytest

from dskjax import quantise
from dskjax.checkpoint import CheckpointError, Conversion, convert, load, load_hf, save_hf
from tests.checkpoint import quantised as by_hand
from tests.checkpoint.build import draw, read_folder, same_bits, tiny_config, write_folder
from tests.checkpoint.quantised import all_of, experts_of

BF16 = ml_dtypes.bfloat16
INDEX = "model.safetensors.index.json"


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of checkpoint: what its config says, how tensors are stored, whether names stay."""

    says: dict[str, Any] | None
    form_of: Callable[[str], str]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    same_names: bool = True


FP8 = by_hand.FP8 | {"weight_block_size": [128, 128]}
W4AFP8 = by_hand.W4AFP8 | {"weight_block_size": [128, 128], "group_size": 128}
PACKED = json.loads(json.dumps(by_hand.PACKED).replace('"group_size": 32', '"group_size": 128'))
AWQ = by_hand.AWQ | {"group_size": 128}
CASES = {
    "bf16": Case(None, lambda name: "plain"),
    "fp8": Case(FP8, all_of("fp8")),
    "fp8, e8m0 scales": Case(FP8, all_of("fp8"), {"scale_dtype": by_hand.E8M0}),
    "fp8 but for experts": Case(FP8, experts_of("plain", "fp8")),
    "w4afp8": Case(W4AFP8, experts_of("int8", "fp8")),
    "int4 experts": Case(PACKED, experts_of("words", "plain"), {"scale_dtype": BF16}),
    "int4": Case(PACKED, all_of("words")),
    "row pairs": Case(AWQ, all_of("row_pairs"), same_names=False),
}


def config(**changes: Any) -> dict[str, Any]:
    """A small V3 whose inputs groups of 128 divide."""
    sizes = {"hidden_size": 128, "q_lora_rank": 128, "intermediate_size": 128}
    sizes |= {"kv_lora_rank": 128, "moe_intermediate_size": 128, "v_head_dim": 32}
    return tiny_config(**sizes, num_hidden_layers=2, num_nextn_predict_layers=1, **changes)


@pytest.fixture
def write(monkeypatch):
    """Writes a source of three files with a tokenizer beside it; returns its tensors."""
    monkeypatch.setattr(by_hand, "BLOCK", (128, 128))
    monkeypatch.setattr(by_hand, "GROUP", 128)

    def write(folder: Path, case: Case, files: int = 3, **changes: Any) -> dict[str, np.ndarray]:
        made = config(torch_dtype="bfloat16", _note="from a test", **changes)
        made |= {} if case.says is None else {"quantization_config": case.says}
        tensors = by_hand.make(made, case.form_of, **case.options).tensors
        write_folder(folder, made, tensors, files)
        (folder / "tokenizer.json").write_text('{"a": 1}')
        (folder / "README.md").write_text("card")
        (folder / "pytorch_model.bin").write_text("pickle")
        (folder / ".gitattributes").write_text("hidden")
        return tensors

    return write


def same_files(found: Path, expected: Path) -> None:
    names = sorted(path.name for path in expected.iterdir())
    assert sorted(path.name for path in found.iterdir()) == names
    for name in names:
        assert (found / name).read_bytes() == (expected / name).read_bytes(), name


def same_tensors(found: dict[str, np.ndarray], expected: dict[str, np.ndarray]) -> None:
    assert sorted(found) == sorted(expected)
    for name, value in expected.items():
        assert (found[name].dtype, found[name].shape) == (value.dtype, value.shape), name
        assert found[name].tobytes() == value.tobytes(), name


def same_params(found: Any, expected: Any) -> None:
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for path, value in jax.tree_util.tree_leaves_with_path(expected):
        other = found
        for key in path:
            other = other[key.key] if hasattr(key, "key") else getattr(other, key.name)
        assert (other.dtype, other.shape) == (value.dtype, value.shape), path
        assert np.asarray(other).tobytes() == np.asarray(value).tobytes(), path


def json_of(path: Path) -> dict[str, Any]:
    return json.loads(path.read_text())


# ------------------------------------------------------------------ nothing changes


@pytest.mark.parametrize("name", CASES)
def test_other_shards_hold_the_same(name, write, tmp_path):
    case, source, target = CASES[name], tmp_path / "a", tmp_path / "b"
    tensors = write(source, case)
    convert(source, target, Conversion(max_shard_bytes=60_000))
    if case.same_names:
        same_tensors(read_folder(target), tensors)
        assert json_of(target / "config.json") == json_of(source / "config.json")
    same_params(load_hf(target)[0], load_hf(source)[0])
    files = sorted(path.name for path in target.glob("*.safetensors"))
    assert len(files) > 4
    assert files == sorted(set(json_of(target / INDEX)["weight_map"].values()))
    others = {path.name for path in target.iterdir()} - set(files)
    assert others == {"config.json", INDEX, "tokenizer.json", "README.md"}
    assert (target / "tokenizer.json").read_text() == '{"a": 1}'


@pytest.mark.parametrize("name", CASES)
def test_orbax_and_back_is_the_same(name, write, tmp_path):
    case, source = CASES[name], tmp_path / "a"
    tensors = write(source, case)
    convert(source, tmp_path / "o", Conversion(to="orbax"))
    same_params(load(tmp_path / "o")[0], load_hf(source)[0])
    assert not list((tmp_path / "o").glob("model*.safetensors"))
    convert(tmp_path / "o", tmp_path / "b", Conversion())
    if case.same_names:
        same_tensors(read_folder(tmp_path / "b"), tensors)
        assert json_of(tmp_path / "b" / "config.json") == json_of(source / "config.json")
    convert(source, tmp_path / "c", Conversion())
    same_files(tmp_path / "b", tmp_path / "c")


def test_fused_experts_become_one_tensor_each(tmp_path):
    cfg = tiny_config(num_hidden_layers=2, num_nextn_predict_layers=0)
    tensors = draw(cfg, BF16)
    fused = {n: w for n, w in tensors.items() if ".experts." not in n}
    of = lambda e, own: tensors[f"model.layers.1.mlp.experts.{e}.{own}_proj.weight"]  # noqa: E731
    both = [np.concatenate([of(e, "gate"), of(e, "up")]) for e in range(4)]
    fused["model.layers.1.mlp.experts.gate_up_proj"] = np.stack(both)
    fused["model.layers.1.mlp.experts.down_proj"] = np.stack([of(e, "down") for e in range(4)])
    write_folder(tmp_path / "a", cfg, fused)
    convert(tmp_path / "a", tmp_path / "b", Conversion())
    same_tensors(read_folder(tmp_path / "b"), tensors)


def test_modules_that_are_not_there_are_not_declared(tmp_path, caplog):
    cfg = tiny_config(num_nextn_predict_layers=0)
    write_folder(tmp_path / "a", cfg | {"num_nextn_predict_layers": 2}, draw(cfg))
    convert(tmp_path / "a", tmp_path / "b", Conversion())
    assert "without MTP modules" in caplog.text
    assert json_of(tmp_path / "b" / "config.json")["num_nextn_predict_layers"] == 0


# ------------------------------------------------------------------ something changes


@pytest.mark.parametrize("to", ["hf", "orbax"])
@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("fp8", {}),
        ("w4afp8", {}),
        ("int4", {}),
        ("row pairs", {"factors": True}),
    ],
)
def test_dequantised_is_what_loading_dequantised_gives(name, options, to, write, tmp_path):
    case, source = CASES[name], tmp_path / "a"
    write(source, dataclasses.replace(case, options=case.options | options))
    params, cfg = load_hf(source, dtype="float32", quantised="dequantise")
    change = {"dequantise": True, "dtype": "float32"}
    convert(source, tmp_path / "b", Conversion(to=to, **change))
    same_params(load(tmp_path / "b")[0], params)
    told = json_of(tmp_path / "b" / "config.json")
    assert "quantization_config" not in told and told["torch_dtype"] == "float32"
    assert told["_note"] == "from a test"
    save_hf(tmp_path / "c", params, cfg, alias_copies=True)
    if to == "hf":
        same_tensors(read_folder(tmp_path / "b"), read_folder(tmp_path / "c"))
    if not options:
        convert(source, tmp_path / "o", Conversion(to="orbax"))
        convert(tmp_path / "o", tmp_path / "d", Conversion(**change))
        same_tensors(read_folder(tmp_path / "d"), read_folder(tmp_path / "c"))


@pytest.mark.parametrize(
    ("name", "precision", "dtype"),
    [
        ("bf16", "fp8", None),
        ("fp8", "w4afp8", "float32"),
        pytest.param("bf16", "w4afp8", None, marks=pytest.mark.full),
        pytest.param("int4 experts", "w4afp8", None, marks=pytest.mark.full),
        pytest.param("w4afp8", "fp8", "float32", marks=pytest.mark.full),
        pytest.param("int4", "fp8", None, marks=pytest.mark.full),
    ],
)
def test_quantised_is_what_quantising_gives(name, precision, dtype, write, tmp_path):
    source, conversion = tmp_path / "a", Conversion(quantise=precision, dtype=dtype)
    write(source, CASES[name])
    params, cfg = load_hf(source, dtype=dtype)
    expected = quantise(params, precision)
    convert(source, tmp_path / "b", conversion)
    same_params(load(tmp_path / "b")[0], expected)
    save_hf(tmp_path / "c", expected, cfg, alias_copies=True)
    same_tensors(read_folder(tmp_path / "b"), read_folder(tmp_path / "c"))
    says = json_of(tmp_path / "b" / "config.json")["quantization_config"]
    assert says == json_of(tmp_path / "c" / "config.json")["quantization_config"]
    convert(source, tmp_path / "o", Conversion(to="orbax"))
    convert(tmp_path / "o", tmp_path / "d", conversion)
    same_tensors(read_folder(tmp_path / "d"), read_folder(tmp_path / "c"))
    convert(source, tmp_path / "p", dataclasses.replace(conversion, to="orbax"))
    same_params(load(tmp_path / "p")[0], expected)


def test_dtype_is_the_callers_or_the_embeddings(tmp_path, caplog):
    cfg = tiny_config()
    tensors = draw(cfg)
    tensors = {n: w.astype(BF16) if "embed_tokens" in n else w for n, w in tensors.items()}
    write_folder(tmp_path / "a", cfg | {"dtype": "bfloat16"}, tensors)
    for dtype, name in ((None, "bfloat16"), ("float32", "float32"), ("float16", "float16")):
        convert(tmp_path / "a", tmp_path / name, Conversion(dtype=dtype))
        assert ("pass dtype=float32" in caplog.text) == (dtype is None)
        caplog.clear()
        same_bits(load_hf(tmp_path / name)[0], load_hf(tmp_path / "a", dtype=dtype)[0])
        caplog.clear()
        told = json_of(tmp_path / name / "config.json")
        assert told["dtype"] == name
        stored = read_folder(tmp_path / name)
        assert stored["lm_head.weight"].dtype == np.dtype(getattr(ml_dtypes, name, name))
        bias = "model.layers.1.mlp.gate.e_score_correction_bias"
        assert stored[bias].dtype == np.float32


def test_weights_of_two_kinds_in_a_leaf_are_refused_or_changed(write, tmp_path):
    form_of = lambda name: "fp8" if "layers.0.self_attn.o_proj" in name else "plain"  # noqa: E731
    mixed = lambda name: all_of("fp8")(name) if "experts.1." in name else form_of(name)  # noqa: E731
    write(tmp_path / "a", Case(FP8, mixed))
    with pytest.raises(CheckpointError, match="both are parts of"):
        convert(tmp_path / "a", tmp_path / "b", Conversion())
    convert(tmp_path / "a", tmp_path / "b", Conversion(dequantise=True))
    same_bits(load_hf(tmp_path / "b")[0], load_hf(tmp_path / "a", quantised="dequantise")[0])
