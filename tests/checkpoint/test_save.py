"""Saving checkpoint folders: what others expect to find, whole or not at all."""

import json
import os

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dskjax import mesh, model
from dskjax.checkpoint import load_hf, save_hf
from dskjax.config import ModelConfig
from pallas_kernels.quant import FP8_BLOCK, quantise
from tests.checkpoint.build import random_params, same_bits, tiny_config

BF16 = ml_dtypes.bfloat16


@pytest.mark.devices(8)
def test_sharded_params_are_saved_as_they_are(tmp_path):
    cfg = ModelConfig.from_hf(tiny_config())
    params = random_params(cfg, BF16)
    sharding = mesh.preset("train", mesh.make_mesh(dp=2, ep=2, tp=2))
    placed = jax.device_put(params, sharding.params(model.param_specs(cfg)))
    save_hf(tmp_path / "a", placed, cfg)
    save_hf(tmp_path / "b", params, cfg)
    one, two = (tmp_path / n / "model.safetensors" for n in "ab")
    assert one.read_bytes() == two.read_bytes()


def test_written_folder_is_what_others_expect(tmp_path):
    cfg = ModelConfig.from_hf(tiny_config())
    params = random_params(cfg, BF16)
    extra = {"transformers_version": "4.33.1", "_note": "made by a test"}
    save_hf(tmp_path / "a", params, cfg, max_shard_bytes=30_000, extra_config=extra)
    index = json.loads((tmp_path / "a" / "model.safetensors.index.json").read_text())
    files = sorted(set(index["weight_map"].values()))
    assert files == [
        f"model-{i + 1:05d}-of-{len(files):05d}.safetensors" for i in range(len(files))
    ]
    assert len(files) > 3
    assert index["metadata"]["total_size"] == sum(w.nbytes for w in jax.tree.leaves(params))
    order = [name for file in files for name, at in index["weight_map"].items() if at == file]
    assert order[0] == "model.embed_tokens.weight"
    layers = [int(name.split(".")[2]) for name in order if name.startswith("model.layers.")]
    assert layers == sorted(layers)
    for file in files:
        content = (tmp_path / "a" / file).read_bytes()
        length = int.from_bytes(content[:8], "little")
        header = json.loads(content[8 : 8 + length])
        assert header["__metadata__"] == {"format": "pt"}
        assert len(content) - 8 - length <= 30_000 or len(header) == 2
    config = json.loads((tmp_path / "a" / "config.json").read_text())
    assert config["torch_dtype"] == "bfloat16" and config["architectures"] == [
        "DeepseekV3ForCausalLM"
    ]
    assert config["_note"] == "made by a test"


def test_what_cannot_be_saved_is_refused_before_anything_is_written(tmp_path):
    cfg = ModelConfig.from_hf(tiny_config())
    good = random_params(cfg, np.float32)

    def refused(error, match, params=good, **options):
        with pytest.raises(error, match=match):
            save_hf(tmp_path / "a", params, cfg, **options)
        assert not list(tmp_path.iterdir())

    head = good["lm_head"]["weight"]
    refused(
        ValueError,
        "lack weight 'lm_head.weight'",
        {k: v for k, v in good.items() if k != "lm_head"},
    )
    refused(ValueError, "unknown weight 'more.weight'", {**good, "more": {"weight": head}})
    refused(ValueError, r"\(24, 48\); expected \(48, 24\)", {**good, "lm_head": {"weight": head.T}})
    wide = {"weight": head.astype(np.float64)}
    refused(ValueError, "'lm_head.weight' has dtype float64", {**good, "lm_head": wide})
    quantised = {"weight": quantise(jnp.asarray(head), FP8_BLOCK)}
    refused(NotImplementedError, "'lm_head.weight' is a QTensor", {**good, "lm_head": quantised})
    refused(
        ValueError,
        "'lm_head.weight' is a list; expected an array",
        {**good, "lm_head": {"weight": head.tolist()}},
    )
    says = {"quantization_config": {"quant_method": "fp8"}}
    refused(ValueError, "these weights make it None; leave it out", extra_config=says)
    refused(ValueError, "changes the model", extra_config={"vocab_size": 49})
    refused(ValueError, "does not know: surprise=1", extra_config={"surprise": 1})
    refused(ValueError, "max_shard_bytes=0 must be positive", max_shard_bytes=0)


def test_folder_is_written_whole_or_not_at_all(tmp_path, monkeypatch):
    cfg = ModelConfig.from_hf(tiny_config())
    old, new = random_params(cfg, np.float32, 1), random_params(cfg, np.float32, 2)
    place = tmp_path / "a"
    place.mkdir()  # an empty folder is free
    save_hf(place, old, cfg, max_shard_bytes=30_000)
    (place / "tokenizer.json").write_text("{}")
    with pytest.raises(FileExistsError, match=r"pass overwrite=True \(--overwrite\) to replace it"):
        save_hf(place, new, cfg)

    fsync, calls = os.fsync, []

    def full(handle):
        calls.append(handle)
        if len(calls) == 3:
            raise OSError(28, "No space left on device")
        fsync(handle)

    with monkeypatch.context() as broken:
        broken.setattr(os, "fsync", full)
        with pytest.raises(OSError, match="No space left"):
            save_hf(place, new, cfg, max_shard_bytes=30_000, overwrite=True)
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    same_bits(old, load_hf(place)[0])

    save_hf(place, new, cfg, overwrite=True)
    same_bits(new, load_hf(place)[0])
    names = {"config.json", "model.safetensors", "tokenizer.json"}  # no shard of the old one
    assert {path.name for path in place.iterdir()} == names
    assert [path.name for path in tmp_path.iterdir()] == ["a"]
    (tmp_path / "home").mkdir()
    (tmp_path / "home" / "thesis.txt").write_text("precious")
    with pytest.raises(FileExistsError, match="not a checkpoint folder"):
        save_hf(tmp_path / "home", new, cfg, overwrite=True)
    with pytest.raises(FileExistsError, match="not a checkpoint folder"):
        save_hf(tmp_path / "home" / "thesis.txt", new, cfg, overwrite=True)
    assert (tmp_path / "home" / "thesis.txt").read_text() == "precious"
