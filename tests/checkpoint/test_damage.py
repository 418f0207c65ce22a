"""Folders that are incomplete, damaged, hostile or another model: an error that names the culprit.

Each case spoils a good folder of three files in one way, and says what the message must hold.
"""

import json
import os
import shutil
from pathlib import Path

import ml_dtypes
import numpy as np
import pytest

from dskjax.checkpoint import CheckpointError, load_config, load_hf
from dskjax.config import ModelConfig
from dskjax.params import named_leaves
from tests.checkpoint.build import draw, tiny_config, write_folder
from tests.checkpoint.spoil import (
    FILES,
    INDEX,
    config,
    cut,
    damage,
    edit,
    put,
    remap,
    remove,
    set_map,
    text,
    then,
    weight_map,
)

EXPERT = "model.layers.2.mlp.experts.3.up_proj.weight"
Q_B = "model.layers.1.self_attn.q_b_proj.weight"
MTP = "model.layers.3."
ZEROS = np.zeros(3, np.float32)
CASES = {
    # what is there at all
    "no directory": damage(shutil.rmtree, "expected a checkpoint directory, found nothing"),
    "a file": damage(
        lambda folder: (shutil.rmtree(folder), folder.write_text("x")),
        "expected a checkpoint directory, found a file",
    ),
    "no config": damage(remove("config.json"), "config.json: cannot be read (No such file"),
    "config is a directory": damage(
        then(remove("config.json"), lambda folder: (folder / "config.json").mkdir()),
        "config.json: cannot be read (Is a directory",
    ),
    "config not JSON": damage(text("config.json", "{,}"), "config.json: not readable as UTF-8"),
    "config not text": damage(text("config.json", b"\xff\xfe"), "config.json: not readable"),
    "config empty": damage(text("config.json", ""), "config.json: not readable as UTF-8"),
    "config a list": damage(text("config.json", "[]"), "config.json: expected a JSON object"),
    "config twice": damage(
        text("config.json", '{"vocab_size": 1, "vocab_size": 2}'), "key 'vocab_size' occurs twice"
    ),
    "config field missing": damage(
        text("config.json", '{"model_type": "deepseek_v3"}'), "config.json: ", "has no field"
    ),
    "config field odd": damage(config(vocab_size="48"), "config.json: ", "'vocab_size'", "'48'"),
    "config of another model": damage(
        config(model_type="llama"), "config.json: ", "'llama'", error=NotImplementedError
    ),
    "no weights": damage(
        remove("*.safetensors", INDEX),
        "has no weights: expected model.safetensors, or model.safetensors.index.json",
    ),
    "index without files": damage(remove("*.safetensors"), INDEX, FILES[0], "that file is missing"),
    "pickles only": damage(
        then(remove("*.safetensors", INDEX), text("pytorch_model.bin", b"\x80\x04.")),
        "pickled weights (pytorch_model.bin)",
        "convert the checkpoint to safetensors first",
    ),
    "pickled shards": damage(
        then(remove("*.safetensors", INDEX), text("consolidated.00.pth", b"PK")),
        "pickled weights (consolidated.00.pth)",
    ),
    "shards without index": damage(remove(INDEX), FILES[0], "add the index of several"),
    "file beside an index": damage(
        lambda folder: shutil.copy(folder / FILES[0], folder / "model.safetensors"),
        "has both model.safetensors and model.safetensors.index.json",
        "remove the one that is out of date",
    ),
    # the index
    "index not JSON": damage(text(INDEX, "{"), f"{INDEX}: not readable as UTF-8"),
    "index a list": damage(text(INDEX, "[]"), f"{INDEX}: expected a JSON object, found list"),
    "no weight_map": damage(
        text(INDEX, "{}"), f"{INDEX}: expected a non-empty object 'weight_map'"
    ),
    "weight_map empty": damage(lambda f: set_map(f, {}), "'weight_map', found {}"),
    "weight_map a list": damage(lambda f: set_map(f, ["a"]), "'weight_map', found ['a']"),
    "tensor twice in the index": damage(
        text(INDEX, '{"weight_map": {"a": "b.safetensors", "a": "c.safetensors"}}'),
        "key 'a' occurs twice",
    ),
    "index points nowhere": damage(
        remap(Q_B, "model-00009-of-00003.safetensors"),
        f"{INDEX}: tensor '{Q_B}' should be in model-00009-of-00003.safetensors",
        "that file is missing",
    ),
    "index names the wrong file": damage(
        lambda f: remap(Q_B, next(x for x in FILES if x != weight_map(f)[Q_B]))(f),
        f"{INDEX}: tensor '{Q_B}' should be in model-0000",
        "which does not hold it",
    ),
    "index forgets a tensor": damage(
        lambda f: set_map(f, {n: x for n, x in weight_map(f).items() if n != Q_B}),
        f"{INDEX}: does not mention tensor '{Q_B}' of model-0000",
    ),
    # ways out of the folder
    **{
        f"path {file!r}": damage(
            then(
                lambda folder: shutil.copy(folder / FILES[0], folder.parent / "evil.safetensors"),
                remap(Q_B, file),
            ),
            f"{INDEX}: tensor '{Q_B}' points to {file!r}; expected the name of a .safetensors file",
        )
        for file in (
            "../evil.safetensors",
            "/etc/passwd",
            "/etc/evil.safetensors",
            "sub/evil.safetensors",
            "..\\evil.safetensors",
            "C:evil.safetensors",
            "evil.safetensors\0",
            "evil\0.safetensors",
            "pytorch_model.bin",
            "..",
            "",
            7,
            None,
            ["a"],
        )
    },
    # the files; test_safetensors.py has all the ways a header can be wrong
    "empty file": damage(cut(FILES[1], 0), FILES[1], "holds 0 bytes"),
    "truncated file": damage(cut(FILES[1], 9000), FILES[1], "tensor '", "it is truncated"),
    "truncated header": damage(cut(FILES[1], 100), FILES[1], "the header claims"),
    "header is a bomb": damage(
        text(FILES[2], (2**40).to_bytes(8, "little") + b"{}"), FILES[2], f"claims {2**40} bytes"
    ),
    "shard is a directory": damage(
        then(remove(FILES[2]), lambda folder: (folder / FILES[2]).mkdir()),
        FILES[2],
        "not a regular file",
    ),
    "shard is a pipe": damage(
        then(remove(FILES[2]), lambda folder: os.mkfifo(folder / FILES[2])),
        FILES[2],
        "not a regular file",
    ),
    "dangling link": damage(
        then(remove(FILES[2]), lambda folder: (folder / FILES[2]).symlink_to("gone")),
        FILES[2],
        "that file is missing",
    ),
    # tensors against the config
    "tensor missing": damage(
        put(Q_B, None),
        f"tensor '{Q_B}' is missing; expected shape [96, 20] for num_hidden_layers=3",
    ),
    "expert missing": damage(put(EXPERT, None), f"tensor '{EXPERT}' is missing", "[16, 24]"),
    "gate's bias missing": damage(
        put("model.layers.2.mlp.gate.e_score_correction_bias", None),
        "'model.layers.2.mlp.gate.e_score_correction_bias' is missing; expected shape [4]",
    ),
    "embedding missing": damage(
        put("model.embed_tokens.weight", None), "'model.embed_tokens.weight' is missing", "[48, 24]"
    ),
    "head missing": damage(put("lm_head.weight", None), "'lm_head.weight' is missing"),
    "part of an MTP module missing": damage(
        put(MTP + "enorm.weight", None), f"'{MTP}enorm.weight' is missing"
    ),
    "MTP module but for its copies missing": damage(
        lambda folder: edit(
            folder,
            lambda tensors: [
                tensors.pop(n) for n in list(tensors) if n.startswith(MTP) and "embed" not in n
            ],
        ),
        f"'{MTP}",
        "is missing",
    ),
    "tensor unexpected": damage(
        put("model.layers.0.self_attn.q_proj.weight", ZEROS),
        f"{FILES[0]}: unexpected tensor 'model.layers.0.self_attn.q_proj.weight'; expected only",
    ),
    "two tensors unexpected": damage(
        then(put("a", ZEROS), put("b", ZEROS)), "unexpected tensor 'a' (and 1 more)"
    ),
    "adapter": damage(put("base_model.model.lora_A.weight", ZEROS), "unexpected tensor 'base_"),
    "one expert too many": damage(
        put("model.layers.2.mlp.experts.4.up_proj.weight", ZEROS),
        "unexpected tensor 'model.layers.2.mlp.experts.4.up_proj.weight'",
        "n_routed_experts=4",
    ),
    "fused and plain experts": damage(
        put("model.layers.2.mlp.experts.down_proj", np.zeros((4, 24, 16), np.float32)),
        "unexpected tensor 'model.layers.2.mlp.experts.0.down_proj.weight' (and 3 more)",
    ),
    "fewer layers in the config": damage(
        config(num_hidden_layers=2), "tensor 'model.layers.2.e", "num_hidden_layers=2"
    ),
    "more layers in the config": damage(
        config(num_hidden_layers=9), "tensor 'model.layers.", "is missing", "num_hidden_layers=9"
    ),
    "more dense layers in the config": damage(
        config(first_k_dense_replace=2), "model.layers.1.mlp.", "first_k_dense_replace=2"
    ),
    "fewer experts in the config": damage(
        config(n_routed_experts=2, n_group=1),
        "unexpected tensor 'model.layers.",
        "n_routed_experts=2",
    ),
    "a billion layers in the config": damage(
        config(num_hidden_layers=10**9), "is missing", "num_hidden_layers=1000000000"
    ),
    "a billion MTP modules in the config": damage(
        config(num_nextn_predict_layers=10**9), "is missing", "num_nextn_predict_layers=1000000000"
    ),
    "a billion experts in the config": damage(
        config(n_routed_experts=10**9), "is missing", "n_routed_experts=1000000000"
    ),
    "more than an int in the config": damage(
        config(hidden_size=10**30), "config.json: field 'hidden_size' = 1000", "expected less than"
    ),
    "MTP not in the config": damage(
        config(num_nextn_predict_layers=0), f"unexpected tensor '{MTP}", "_predict_layers=0"
    ),
    "more MTP in the config": damage(
        config(num_nextn_predict_layers=2), "'model.layers.4.", "num_nextn_predict_layers=2"
    ),
    "tied in the config only": damage(
        then(config(tie_word_embeddings=True), put("lm_head.weight", np.zeros((4, 4), np.float32))),
        "tensor 'lm_head.weight' has shape [4, 4]; expected [48, 24]",
    ),
    "shape": damage(
        put(Q_B, np.zeros((20, 96), np.float32)),
        f"tensor '{Q_B}' has shape [20, 96]; expected [96, 20] from config.json",
        ".safetensors: ",
    ),
    "rank": damage(
        put(Q_B, np.zeros(1920, np.float32)), f"'{Q_B}' has shape [1920]; expected [96, 20]"
    ),
    "sizes in the config": damage(
        config(vocab_size=50), "'model.embed_tokens.weight' has shape [48, 24]; expected [50, 24]"
    ),
    "size of an expert": damage(
        put(EXPERT, np.zeros((17, 24), np.float32)), f"'{EXPERT}' has shape [17, 24]", "[16, 24]"
    ),
    "size of a copy": damage(
        put(MTP + "embed_tokens.weight", np.zeros((49, 24), np.float32)),
        f"'{MTP}embed_tokens.weight' has shape [49, 24]; expected [48, 24]",
    ),
    "dtype of a copy": damage(
        put(MTP + "shared_head.head.weight", np.zeros((48, 24), ml_dtypes.bfloat16)),
        f"'{MTP}shared_head.head.weight' has dtype BF16; expected F32",
        "copy of 'lm_head.weight'",
    ),
    # dtypes and kinds of checkpoint
    "double precision": damage(
        put(Q_B, np.zeros((96, 20))), f"'{Q_B}' has dtype F64; expected BF16, F16, F32"
    ),
    "integers": damage(put(Q_B, np.zeros((96, 20), np.int32)), f"'{Q_B}' has dtype I32", "BF16"),
    "V3.2": damage(
        put("model.layers.0.self_attn.indexer.wk.weight", ZEROS),
        "DeepSeek-V3.2",
        error=NotImplementedError,
    ),
}


@pytest.fixture(scope="module")
def good(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("good") / "model"
    config = tiny_config(num_nextn_predict_layers=1)
    write_folder(folder, config, draw(config), files=3)
    return folder


@pytest.fixture
def folder(good, tmp_path) -> Path:
    return shutil.copytree(good, tmp_path / "model")


@pytest.mark.parametrize("case", CASES)
def test_message_names_the_culprit(case, folder):
    spoilt = CASES[case]
    spoilt.do(folder)
    with pytest.raises(spoilt.error) as error:
        load_hf(folder)
    message = str(error.value)
    assert str(folder) in message
    for part in spoilt.says:
        assert part in message, message


def test_nothing_is_read_before_everything_is_checked(folder, monkeypatch):
    last = max(weight_map(folder))
    put(last, ZEROS)(folder)
    reads, preadv = [], os.preadv

    def counted(handle, buffers, offset):
        reads.append(offset)
        return preadv(handle, buffers, offset)

    monkeypatch.setattr(os, "preadv", counted)
    with pytest.raises(CheckpointError, match="has shape"):
        load_hf(folder)
    assert reads == [0, 8] * 3  # the length and the header of each file


def test_no_handle_is_left_open(good, folder):
    before = len(os.listdir("/proc/self/fd"))
    load_hf(good)
    (folder / FILES[2]).write_bytes(b"")
    for place in (folder, folder.parent):
        with pytest.raises(CheckpointError):
            load_hf(place)
    assert len(os.listdir("/proc/self/fd")) == before


@pytest.mark.parametrize("seed", range(60))
def test_random_damage_is_an_error_or_harmless(seed, good, folder):
    """Bytes of any file flipped, cut or doubled: never another exception, never a wrong shape."""
    rng = np.random.default_rng(seed)
    path = folder / rng.choice(["config.json", INDEX, *FILES])
    content = bytearray(path.read_bytes())
    if path.suffix == ".safetensors":  # the header, or one flip in a thousand would hit it
        reach = 8 + int.from_bytes(content[:8], "little")
    else:
        reach = len(content)
    kind = rng.integers(4)
    at = int(rng.integers(reach))
    if kind == 0:
        content[at] ^= 1 << int(rng.integers(8))
    elif kind == 1:
        del content[at:]
    elif kind == 2:
        del content[at : at + int(rng.integers(1, 9))]
    else:
        content[at:at] = content[at : at + int(rng.integers(1, 9))]
    path.write_bytes(content)
    try:
        params, cfg = load_hf(folder)
    except (CheckpointError, NotImplementedError) as error:
        assert str(folder) in str(error)
    else:
        wanted = {leaf: w.shape for leaf, w in named_leaves(load_hf(good)[0])}
        assert {leaf: w.shape for leaf, w in named_leaves(params)} == wanted


@pytest.mark.parametrize("value", [None, [], {}, "x", -1, 1e400, True, [[1]], {"type": 3}, 10**30])
def test_config_values_of_any_kind_are_read_or_refused(value, folder):
    fields = json.loads((folder / "config.json").read_text())
    fields |= dict.fromkeys(("rope_parameters", "quantization_config", "num_local_experts"))
    for field in fields:
        spoilt = {**fields, field: value}
        text = json.dumps(spoilt).replace("Infinity", "1e400")
        (folder / "config.json").write_text(text)
        try:
            assert isinstance(load_config(folder), ModelConfig), field
        except (CheckpointError, NotImplementedError) as error:
            assert "config.json" in str(error), field
