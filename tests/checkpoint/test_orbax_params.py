"""Orbax folders of params: the same bits on any mesh, layer by layer; damage is named."""

import json
import os
import shutil

import jax
import ml_dtypes
import numpy as np
import orbax.checkpoint as ocp
import pytest

from dskjax import mesh, model
from dskjax.checkpoint import (
    CheckpointError,
    load,
    load_config,
    load_hf,
    load_params,
    save_hf,
    save_params,
)
from dskjax.checkpoint.part_files import PartReader
from dskjax.config import ModelConfig
from dskjax.params import unstack
from tests.checkpoint import random_codes
from tests.checkpoint.build import random_params, same_bits, tiny_config
from tests.checkpoint.random_codes import fp8, int4_experts, same, small, w4afp8

BF16 = ml_dtypes.bfloat16
PARTS = ["layer-00000", "layer-00001", "layer-00002", "top"]


def odd(name):
    """What no Hugging Face folder holds: three formats together."""
    return ("int4", (4, 20)) if "experts.down" in name else w4afp8(name)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """(folder, params, config); tests that spoil it copy it first."""
    folder, cfg = tmp_path_factory.mktemp("saved") / "a", small()
    params = random_codes.params(cfg, w4afp8)
    save_params(folder, params, cfg, extra_config={"_note": "by a test"})
    return folder, params, cfg


@pytest.mark.parametrize("kinds", [lambda name: None, fp8, odd])
def test_every_bit_comes_back(kinds, tmp_path):
    cfg = small(num_hidden_layers=3, num_nextn_predict_layers=2)
    params = random_codes.params(cfg, kinds)
    params["norm"]["weight"] = params["norm"]["weight"].astype(np.float32)
    save_params(tmp_path / "a", unstack(params), cfg)
    found, found_cfg = load_params(tmp_path / "a")
    assert found_cfg == cfg
    same(found, params)


def test_a_folder_is_what_it_says(saved):
    folder, params, cfg = saved
    files = sorted(path.name for path in folder.iterdir())
    assert files == sorted([*PARTS, "config.json", "dskjax-params.json"])
    assert load_config(folder) == cfg
    assert json.loads((folder / "config.json").read_text())["_note"] == "by a test"
    index = json.loads((folder / "dskjax-params.json").read_text())
    assert (index["format"], index["version"], index["dtype"]) == ("dskjax-params", 1, "bfloat16")
    assert sorted(index["parts"]) == PARTS
    leaf = index["leaves"]["moe_layers.mlp.experts.down_proj"]
    assert (leaf["format"], leaf["block"]) == ("int4", [1, 128])


def test_plain_orbax_reads_a_part(saved):
    folder, params, _ = saved
    with ocp.StandardCheckpointer() as reader:
        layer = reader.restore(folder / "layer-00001")
        top = reader.restore(folder / "top")
    experts = params["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
    found = layer["mlp"]["experts"]["gate_up_proj"]
    assert set(found) == {"values", "scales"}
    assert np.asarray(found["values"]).tobytes() == experts.values[0].tobytes()
    assert np.asarray(found["scales"]).tobytes() == experts.scales[0].tobytes()
    same(top["lm_head"], params["lm_head"])


@pytest.mark.parametrize("layers", ["stacked", "separate"])
@pytest.mark.parametrize("quantised", ["keep", "dequantise"])
def test_options_are_those_of_load_hf(layers, quantised, saved, tmp_path):
    folder, params, cfg = saved
    save_hf(tmp_path / "b", params, cfg)
    for dtype in (None, "float16"):
        options = {"layers": layers, "quantised": quantised, "dtype": dtype}
        same(load_params(folder, **options)[0], load_hf(tmp_path / "b", **options)[0])


@pytest.mark.devices(8)
@pytest.mark.parametrize(
    ("name", "layers", "quantised"),
    [
        ("train", "stacked", "keep"),
        ("fsdp", "separate", "keep"),
        ("tensor", "stacked", "dequantise"),
    ],
)
def test_a_mesh_holds_the_same(name, layers, quantised, saved, monkeypatch):
    folder, params, cfg = saved
    sharding = mesh.preset(name, mesh.make_mesh(dp=2, ep=2, tp=2))
    read, asked = PartReader.read, []

    def watched(self, part, places):
        asked.extend(jax.tree.leaves(places))
        return read(self, part, places)

    monkeypatch.setattr(PartReader, "read", watched)
    options = {"layers": layers, "quantised": quantised}
    found, _ = load_params(folder, sharding=sharding, **options)
    assert any(not place.is_fully_replicated for place in asked)  # Orbax reads parts only
    monkeypatch.undo()
    plain, _ = load_params(folder, **options)
    same(found, plain)
    if layers == "stacked":
        places = sharding.params(model.param_specs(cfg), plain)
        assert jax.tree.map(lambda x: x.sharding, found) == places


def test_load_tells_folders_apart(saved, tmp_path):
    folder, params, cfg = saved
    save_hf(tmp_path / "b", params, cfg)
    for place in (folder, tmp_path / "b", str(folder)):
        found, found_cfg = load(place, quantised="keep", layers="stacked")
        assert found_cfg == cfg
        same(found, params)
    for options in ({"quantised": "drop"}, {"layers": "some"}, {"dtype": "int8"}):
        with pytest.raises(ValueError, match=next(iter(options))):
            load(folder, **options)


def test_a_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    cfg = ModelConfig.from_hf(tiny_config())
    old, new = random_params(cfg, np.float32, 1), random_params(cfg, BF16, 2)
    place = tmp_path / "a"
    save_params(place, old, cfg)
    (place / "tokenizer.json").write_text("{}")
    with pytest.raises(FileExistsError, match="overwrite=True"):
        save_params(place, new, cfg)
    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 40:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_params(place, new, cfg, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    same_bits(old, load_params(place)[0])
    save_hf(place, new, cfg, overwrite=True)  # another kind in the same place
    assert sorted(path.name for path in place.iterdir()) == [
        "config.json",
        "model.safetensors",
        "tokenizer.json",
    ]
    same_bits(new, load(place)[0])
    save_params(place, old, cfg, overwrite=True)
    same_bits(old, load(place)[0])


def test_what_cannot_be_saved_is_refused(tmp_path):
    cfg = small()
    params = random_codes.params(cfg, int4_experts)
    with pytest.raises(ValueError, match="lack weight 'lm_head.weight'"):
        save_params(tmp_path / "a", {k: v for k, v in params.items() if k != "lm_head"}, cfg)
    with pytest.raises(ValueError, match="changes the model"):
        save_params(tmp_path / "a", params, cfg, extra_config={"vocab_size": 49})
    assert not list(tmp_path.iterdir())


# ------------------------------------------------------------------ damage


def drop(name):
    return lambda folder: shutil.rmtree(folder / name)


def index(change):
    """Changes the JSON of the index."""

    def spoil(folder):
        file = folder / "dskjax-params.json"
        content = json.loads(file.read_text())
        change(content)
        file.write_text(json.dumps(content))

    return spoil


def largest(part, change):
    """Changes the bytes of the largest file of a part."""

    def spoil(folder):
        files = [path for path in (folder / part).rglob("*") if path.is_file()]
        file = max(files, key=lambda path: path.stat().st_size)
        file.write_bytes(change(file.read_bytes()))

    return spoil


def swap(folder):
    (folder / "layer-00001").rename(folder / "x")
    (folder / "layer-00002").rename(folder / "layer-00001")
    (folder / "x").rename(folder / "layer-00002")


LEAF = "moe_layers.self_attn.o_proj"
DAMAGE = {
    "no index": (lambda f: (f / "dskjax-params.json").unlink(), "dskjax-params.json: cannot be"),
    "index is no JSON": (lambda f: (f / "dskjax-params.json").write_text("{"), "UTF-8 JSON"),
    "no config": (lambda f: (f / "config.json").unlink(), "config.json: cannot be read"),
    "a later version": (index(lambda c: c.update(version=2)), r"\('dskjax-params', 2\); expected"),
    "no list of leaves": (index(lambda c: c.pop("leaves")), "leaves: expected a JSON object"),
    "a leaf too few": (index(lambda c: c["leaves"].pop(LEAF)), f"lacks leaf '{LEAF}'"),
    "a leaf too many": (index(lambda c: c["leaves"].update(x={})), "has an unknown leaf 'x'"),
    "unknown dtype": (
        index(lambda c: c["leaves"].update({"norm.weight": {"dtype": "int8"}})),
        "leaf 'norm.weight': dtype = 'int8'; expected one of bfloat16",
    ),
    "unknown format": (
        index(lambda c: c["leaves"][LEAF].update(format="int3")),
        f"leaf '{LEAF}': format = 'int3'; expected one of e4m3, int4",
    ),
    "block of zero": (
        index(lambda c: c["leaves"][LEAF].update(block=[0, 128])),
        f"leaf '{LEAF}': block = .0, 128.; expected two positive",
    ),
    "another block": (
        index(lambda c: c["leaves"][LEAF].update(block=[64, 128])),
        "layer-00001: array 'self_attn.o_proj.scales': expected",
    ),
    "a vector that is quantized": (
        index(lambda c: c["leaves"].update({"norm.weight": c["leaves"][LEAF]})),
        "leaf 'norm.weight': a weight of shape .128. cannot be quantized so",
    ),
    "another kind": (
        index(lambda c: c["leaves"].update({LEAF: {"dtype": "bfloat16"}})),
        "layer-00001: array 'self_attn.o_proj': expected",
    ),
    "copies are no list": (index(lambda c: c.update(copies="a")), "copies = 'a'; expected a list"),
    "a copy of nothing": (index(lambda c: c.update(copies=["a"])), "tensor 'a' is no copy"),
    "a part not in the index": (
        index(lambda c: c["parts"].pop("layer-00002")),
        "part 'layer-00002': expected a JSON object, found None",
    ),
    "a part without size": (
        index(lambda c: c["parts"]["top"].pop("nbytes")),
        "part 'top': expected nbytes and sha256",
    ),
    "a part is missing": (drop("layer-00001"), "layer-00001: this part is missing"),
    "the top is missing": (drop("top"), "top: this part is missing"),
    "a file is cut": (
        largest("layer-00002", lambda b: b[:-1]),
        "layer-00002: this part holds",
    ),
    "a file is longer": (
        largest("top", lambda b: b + b"x"),
        "top: this part holds",
    ),
    "parts change places": (swap, "layer-00001: this part holds"),
    "another model": (
        lambda f: (f / "config.json").write_text(
            json.dumps(small(hidden_size=256).to_hf() | {"torch_dtype": "bfloat16"})
        ),
        "top: array 'embed_tokens.weight': expected",
    ),
}


@pytest.mark.parametrize("kind", DAMAGE)
def test_damage_is_named(kind, saved, tmp_path):
    spoil, says = DAMAGE[kind]
    shutil.copytree(saved[0], tmp_path / "a")
    spoil(tmp_path / "a")
    with pytest.raises(CheckpointError, match=says):
        load_params(tmp_path / "a")


@pytest.mark.parametrize("name", ["_METADATA", "manifest.ocdbt"])
def test_garbage_of_the_right_size_is_named(name, saved, tmp_path):
    """Before Orbax begins to read arrays: what it began would end after it has given up."""
    shutil.copytree(saved[0], tmp_path / "a")
    file = tmp_path / "a" / "layer-00001" / name
    file.write_bytes(b"\xff" * file.stat().st_size)
    with pytest.raises(CheckpointError, match="layer-00001: cannot be restored"):
        load_params(tmp_path / "a")
