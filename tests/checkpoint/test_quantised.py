"""Quantized checkpoints: the stored bits as QTensors, or what they mean as floats, to the bit."""

import dataclasses
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dskjax import mesh, model, presets
from dskjax.axes import Rules, Sharding
from dskjax.checkpoint import CheckpointError, buffers, leaves, load_hf, stream
from dskjax.params import named_leaves, tree_of, unstack
from pallas_kernels.quant import QTensor
from tests.checkpoint import quantised as by_hand
from tests.checkpoint.build import same_bits, write_folder
from tests.checkpoint.quantised import all_of, experts_of
from tests.oracles import formats

BF16 = ml_dtypes.bfloat16


@dataclasses.dataclass(frozen=True)
class Case:
    """A kind of checkpoint: what its config says, and how each tensor is stored."""

    says: dict[str, Any]
    form_of: Callable[[str], str]
    options: dict[str, Any] = dataclasses.field(default_factory=dict)
    beside: dict[str, Any] | None = None
    keeps: bool = True


FP8, PACKED = by_hand.FP8, by_hand.PACKED
CASES = {
    "fp8": Case(FP8, all_of("fp8")),
    "fp8, bf16 scales": Case(FP8, all_of("fp8"), {"scale_dtype": BF16}),
    "fp8, e8m0 scales": Case(FP8, all_of("fp8"), {"scale_dtype": by_hand.E8M0}),
    "fp8 but for experts": Case(FP8, experts_of("plain", "fp8")),
    "w4afp8": Case(by_hand.W4AFP8, experts_of("int8", "fp8")),
    "int4 experts": Case(PACKED, experts_of("words", "plain"), {"scale_dtype": BF16}),
    "int4": Case(PACKED, all_of("words"), {"scale_dtype": np.float16}),
    "row pairs": Case(by_hand.AWQ, all_of("row_pairs")),
    "row pairs with factors": Case(
        by_hand.AWQ, all_of("row_pairs"), {"factors": True}, keeps=False
    ),
    "row pairs, no word in config.json": Case(
        {}, experts_of("row_pairs", "plain"), beside={"quantization": by_hand.AWQ}
    ),
    "mixed, row pairs": Case(FP8, experts_of("row_pairs", "fp8"), beside=by_hand.MIXED),
    "mixed, int8": Case(FP8, experts_of("int8", "fp8"), beside=by_hand.MIXED),
}
KEPT = [name for name, case in CASES.items() if case.keeps]


def write(folder: Path, case: Case, files: int = 1, **changes: Any) -> by_hand.Made:
    """Writes a checkpoint of a kind."""
    config = by_hand.config(case.says or None, **changes)
    made = by_hand.make(config, case.form_of, **case.options)
    write_folder(folder, config, made.tensors, files)
    if case.beside is not None:
        (folder / "hf_quant_config.json").write_text(json.dumps(case.beside))
    return made


def real_leaves(folder: Path, made: by_hand.Made, dtype: Any, **changes: Any) -> dict[str, Any]:
    """The leaves of the same checkpoint stored as float32."""
    real = {name: value.astype(np.float32) for name, value in made.real.items()}
    write_folder(folder, by_hand.config(**changes), real)
    return dict(named_leaves(load_hf(folder, dtype=dtype)[0]))


def meaning(leaf: Any) -> np.ndarray:
    """float32 values of a leaf, a QTensor's by the independent formats."""
    if not isinstance(leaf, QTensor):
        return np.asarray(leaf, np.float32)
    codes, scales = np.asarray(leaf.values), np.asarray(leaf.scales)
    return np.float32(formats.dequantise(codes, scales, leaf.block, leaf.format))


def same_leaves(found: Any, expected: Any) -> None:
    """The same structure and bits, on whatever devices."""
    assert jax.tree.structure(found) == jax.tree.structure(expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert (a.dtype, a.shape) == (b.dtype, b.shape)
        assert np.asarray(a).tobytes() == np.asarray(b).tobytes()


@pytest.mark.parametrize("files", [1, 3])  # with 3, scales lie in other files than their values
@pytest.mark.parametrize("name", CASES)
def test_dequantised_is_what_the_codes_mean(name, files, tmp_path):
    made = write(tmp_path / "a", CASES[name], files)
    for dtype in (jnp.float32, None):
        params, cfg = load_hf(tmp_path / "a", dtype=dtype, quantised="dequantise")
        expected = real_leaves(tmp_path / str(dtype), made, dtype or BF16)
        same_bits(params, tree_of(expected))
    assert cfg.mtp.num_nextn_predict_layers == 2


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("name", KEPT)
def test_kept_is_stored_bits_with_float32_scales(name, files, tmp_path):
    case = CASES[name]
    made = write(tmp_path / "a", case, files)
    found = dict(named_leaves(load_hf(tmp_path / "a")[0]))
    expected = real_leaves(tmp_path / "b", made, np.float32)
    assert found.keys() == expected.keys()
    kept = {leaf for leaf, value in found.items() if isinstance(value, QTensor)}
    linear = {leaf for leaf in found if leaf.endswith(("_proj", "_with_mqa"))}
    linear -= {"mtp_layers.eh_proj"}
    experts = {leaf for leaf in linear if ".experts." in leaf}
    wanted = {"fp8 but for experts": linear - experts, "int4 experts": experts}
    wanted["row pairs, no word in config.json"] = experts
    assert kept == wanted.get(name, linear)
    for leaf, value in found.items():
        assert value.shape == expected[leaf].shape, leaf
        if leaf not in kept:
            assert value.dtype == (np.float32 if leaf.endswith("bias") else BF16), leaf
        else:
            check_parts(value)
        assert np.array_equal(meaning(value), np.asarray(expected[leaf])), leaf


def check_parts(value: QTensor) -> None:
    """Dtypes and shapes that the class promises."""
    assert value.scales.dtype == np.float32
    if value.format == "e4m3":
        assert value.block == by_hand.BLOCK and value.values.dtype == by_hand.E4M3
    else:
        assert value.block == (1, by_hand.GROUP) and value.values.dtype == np.uint8
    *lead, n, k = value.shape
    rows, columns = value.block
    assert value.scales.shape == (*lead, -(-n // rows), -(-k // columns))


def test_codes_and_scales_keep_their_bits_and_rotary_rows_move(tmp_path):
    made = write(tmp_path, CASES["fp8"])
    params, _ = load_hf(tmp_path)
    name = "model.layers.2.self_attn.q_b_proj.weight"
    found = params["moe_layers"]["self_attn"]["q_b_proj"][1]
    assert np.array_equal(found.scales, made.tensors[f"{name}_scale_inv"])
    heads = made.tensors[name].view(np.uint8).reshape(4, 24, 64)
    order = [*range(16), 16, 18, 20, 22, 17, 19, 21, 23]
    assert np.array_equal(np.asarray(found.values).view(np.uint8), heads[:, order].reshape(96, 64))
    name = "model.layers.2.mlp.experts.3.up_proj.weight"
    found = params["moe_layers"]["mlp"]["experts"]["gate_up_proj"][1, 3, 1]
    assert np.asarray(found.values).tobytes() == made.tensors[name].tobytes()
    assert np.array_equal(found.scales, made.tensors[f"{name}_scale_inv"])


def test_scales_of_int4_rows_move_along(tmp_path):
    made = write(tmp_path, CASES["int4"])
    params, _ = load_hf(tmp_path)
    found = params["dense_layers"]["self_attn"]["kv_a_proj_with_mqa"]
    scales = made.tensors["model.layers.0.self_attn.kv_a_proj_with_mqa.weight_scale"]
    order = [*range(32), 32, 34, 36, 38, 33, 35, 37, 39]
    assert np.array_equal(found.scales[0], scales[order].astype(np.float32))


@pytest.mark.parametrize("name", ["fp8", "w4afp8", "int4"])
def test_separate_layers_are_those_of_unstack(name, tmp_path):
    write(tmp_path, CASES[name], files=3)
    for quantised in ("keep", "dequantise"):
        stacked, cfg = load_hf(tmp_path, quantised=quantised)
        found, same_cfg = load_hf(tmp_path, quantised=quantised, layers="separate")
        assert same_cfg == cfg
        expected = unstack(stacked)
        same_leaves(found, expected)


def test_layers_of_several_kinds_are_separate_or_dequantised(tmp_path):
    """The last layer of some checkpoints stays in another format."""

    def form_of(name):
        return all_of("fp8" if ".layers.1." not in name else "plain")(name)

    made = write(tmp_path / "a", Case(FP8, form_of))
    with pytest.raises(CheckpointError, match="quantised='dequantise'") as error:
        load_hf(tmp_path / "a")
    for layer in (1, 2):
        assert f"model.layers.{layer}." in str(error.value)
    found, _ = load_hf(tmp_path / "a", layers="separate")
    one, two = (layer["self_attn"]["o_proj"] for layer in found["moe_layers"])
    assert isinstance(two, QTensor) and not isinstance(one, QTensor)
    expected = real_leaves(tmp_path / "b", made, np.float32)["moe_layers.self_attn.o_proj"]
    assert np.array_equal([meaning(one), meaning(two)], expected)
    params, _ = load_hf(tmp_path / "a", quantised="dequantise", dtype=np.float32)
    assert np.array_equal(params["moe_layers"]["self_attn"]["o_proj"], expected)


def test_kimi_k2_thinking(tmp_path):
    """compressed-tensors int4, groups of 32; attention, shared experts, dense MLPs in bf16."""
    tiny = presets.tiny_kimi().to_hf()
    config = tiny | {"hidden_size": 64, "moe_intermediate_size": 64}
    config |= {"quantization_config": PACKED}
    made = by_hand.make(config, experts_of("words", "plain"), scale_dtype=BF16)
    write_folder(tmp_path, config, made.tensors, files=3)
    params, cfg = load_hf(tmp_path)
    assert cfg.model_type == "kimi_k2"
    experts = params["moe_layers"]["mlp"]["experts"]
    assert isinstance(experts["down_proj"], QTensor) and experts["down_proj"].block == (1, 32)
    assert params["moe_layers"]["self_attn"]["o_proj"].dtype == BF16
    name = f"model.layers.{cfg.num_dense_layers}.mlp.experts.1.down_proj.weight"
    assert np.array_equal(meaning(experts["down_proj"][0, 1]), made.real[name])


RULES = {
    "experts": ({"ep": 4, "tp": 2}, {"experts": "ep", "mlp": "tp"}),
    "layers": ({"ep": 2, "tp": 4}, {"layers": "ep", "heads": "tp"}),
    # 5 rows a device: odd for pairs of rows, and no end of a block of scales
    "odd": ({"ep": 8}, {"latent": "ep"}),
}


def placement(name):
    if name not in RULES:
        return mesh.preset(name, mesh.make_mesh(dp=2, ep=2, tp=2))
    axes, rules = RULES[name]
    return Sharding(mesh.make_mesh(**axes), Rules.make(rules))


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", ["fp8", "int4", "row pairs"])
@pytest.mark.parametrize("sharding", ["tensor", "fsdp", "train", *RULES])
def test_a_mesh_holds_the_same(name, sharding, tmp_path):
    """Trunk and MTP modules; presets and rules that cut where blocks, groups and pairs do not."""
    write(tmp_path, CASES[name], files=3)
    placed = placement(sharding)
    plain, cfg = load_hf(tmp_path)
    found, _ = load_hf(tmp_path, sharding=placed)
    same_leaves(found, plain)
    wanted = placed.params(model.param_specs(cfg), plain)
    assert jax.tree.map(lambda array: array.sharding, found) == wanted
    assert any(not array.sharding.is_fully_replicated for array in jax.tree.leaves(found))


@pytest.mark.devices(8)
@pytest.mark.parametrize("quantised", ["keep", "dequantise"])
def test_a_mesh_holds_separate_layers(quantised, tmp_path):
    write(tmp_path, CASES["w4afp8"], files=3)
    options = {"layers": "separate", "quantised": quantised}
    plain, _ = load_hf(tmp_path, **options)
    found, _ = load_hf(tmp_path, sharding=placement("train"), **options)
    same_leaves(found, plain)
    assert found["mtp_layers"][1]["block"]["mlp"]["gate"]["weight"].sharding.mesh.size == 8


@pytest.mark.devices(8)
def test_scales_are_split_where_parts_end_between_blocks(tmp_path):
    write(tmp_path, CASES["fp8"])
    tensor = placement("tensor")
    params, _ = load_hf(tmp_path, sharding=tensor)
    gate_up = params["moe_layers"]["mlp"]["experts"]["gate_up_proj"]  # 64 rows, 2 x 2 blocks of 16
    spec = tensor.of((None, None, None, "mlp", None)).spec
    assert gate_up.values.sharding.spec == gate_up.scales.sharding.spec == spec
    down = params["moe_layers"]["mlp"]["experts"]["down_proj"]  # 64 columns, blocks of 24
    assert not down.values.sharding.is_fully_replicated
    assert down.scales.sharding.is_fully_replicated


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("name", "sharding", "chunk"),
    [
        ("fp8", "train", leaves._CHUNK),
        ("int4", None, 1500),
        ("row pairs with factors", "layers", leaves._CHUNK),
    ],
)
def test_devices_that_are_not_the_host_get_the_same(name, sharding, chunk, tmp_path, monkeypatch):
    """What a GPU gets: arrays of the device, updated in place, if need be in pieces."""
    write(tmp_path, CASES[name], files=3)
    options: dict[str, Any] = {"sharding": sharding and placement(sharding)}
    options["quantised"] = "keep" if CASES[name].keeps else "dequantise"
    expected, _ = load_hf(tmp_path, **options)
    places, update = set(), buffers._update

    def in_place(array, *rest):
        before = array.unsafe_buffer_pointer()
        after = update(array, *rest)
        places.add(after.unsafe_buffer_pointer() == before)
        return after

    monkeypatch.setattr(buffers, "_is_host", lambda device: False)
    monkeypatch.setattr(buffers, "_update", in_place)
    monkeypatch.setattr(leaves, "_CHUNK", chunk)
    found, _ = load_hf(tmp_path, **options)
    assert places == {True}
    same_leaves(found, expected)
    for a, b in zip(jax.tree.leaves(found), jax.tree.leaves(expected), strict=True):
        assert a.sharding == b.sharding


@pytest.mark.devices(8)
@pytest.mark.parametrize(("quantised", "chunk"), [("keep", 900), ("dequantise", 3500)])
@pytest.mark.parametrize("name", ["fp8", "int4", "row pairs"])
def test_rows_in_pieces_are_the_same_rows(name, quantised, chunk, tmp_path, monkeypatch):
    """Large tensors are read in pieces, which need not end where blocks, heads or pairs do."""
    write(tmp_path, CASES[name], files=2)
    expected, _ = load_hf(tmp_path, quantised=quantised)
    jobs, run = [], stream.run

    def counted(todo, **options):
        jobs.append([*todo])
        run(jobs[-1], **options)

    monkeypatch.setattr(stream, "run", counted)
    load_hf(tmp_path, quantised=quantised)
    monkeypatch.setattr(leaves, "_CHUNK", chunk)
    same_leaves(load_hf(tmp_path, quantised=quantised)[0], expected)
    placed = load_hf(tmp_path, quantised=quantised, sharding=placement("odd"))[0]
    same_leaves(placed, expected)
    whole, pieces, _ = map(len, jobs)
    assert pieces > 1.5 * whole


def test_options_that_do_not_exist_are_refused(tmp_path):
    write(tmp_path, CASES["fp8"])
    with pytest.raises(ValueError, match="quantised='no' must be one of keep, dequantise"):
        load_hf(tmp_path, quantised="no")
    with pytest.raises(ValueError, match="layers='no' must be one of stacked, separate"):
        load_hf(tmp_path, layers="no")
