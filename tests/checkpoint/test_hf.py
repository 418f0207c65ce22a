"""Checkpoint folders in and out: every bit in its place, sharded or not; nothing half-written."""

import logging
import os
import tracemalloc

import jax
import jax.numpy as jnp
import ml_dtypes
import numpy as np
import pytest

from dskjax import mesh, model, presets
from dskjax.axes import Rules, Sharding
from dskjax.checkpoint import buffers, load_config, load_hf, save_hf
from dskjax.config import ModelConfig
from dskjax.params import named_leaves
from tests.checkpoint.build import (
    draw,
    random_params,
    read_folder,
    same_bits,
    tiny_config,
    write_folder,
)

BF16 = ml_dtypes.bfloat16
TIED = {"tie_word_embeddings": True}
CONFIGS = {
    "v3": tiny_config(),
    "v3 half-split": tiny_config(rope_interleave=False),
    "v3 tied": tiny_config(**TIED),
    "v3 no mtp": tiny_config(num_nextn_predict_layers=0),
    "v3 all moe": tiny_config(first_k_dense_replace=0),
    "v3 dense trunk": tiny_config(first_k_dense_replace=3),
    "v3 no shared": tiny_config(n_shared_experts=0),
    "v2lite": presets.tiny_v2lite().to_hf(),
}


def pick(tensors, config, leaf_layer, name):
    """The stored tensor as our params should hold it: rotary rows in half-split order."""
    stored = tensors[f"model.layers.{leaf_layer}.{name}"]
    nope, rope = config["qk_nope_head_dim"], config["qk_rope_head_dim"]
    order = [*range(0, rope, 2), *range(1, rope, 2)] if config.get("rope_interleave", True) else ...
    if name.startswith(("self_attn.q_b_proj", "self_attn.q_proj")):
        heads = stored.reshape(-1, nope + rope, stored.shape[1]).copy()
        heads[:, nope:] = heads[:, nope:][:, order]
        return heads.reshape(stored.shape)
    if name.startswith("self_attn.kv_a_proj"):
        out = stored.copy()
        out[-rope:] = out[-rope:][order]
        return out
    return stored


@pytest.mark.parametrize("files", [1, 3])
@pytest.mark.parametrize("dtype", [np.float32, BF16, np.float16])
def test_every_value_lands_in_its_place(dtype, files, tmp_path):
    config = tiny_config()
    tensors = draw(config, dtype)
    write_folder(tmp_path, config, tensors, files)
    params, cfg = load_hf(tmp_path)
    assert cfg == ModelConfig.from_hf(config) == load_config(tmp_path)
    leaves = {leaf: np.asarray(value) for leaf, value in named_leaves(params)}
    specs = dict(named_leaves(model.param_specs(cfg)))
    assert {leaf: value.shape for leaf, value in leaves.items()} == {
        leaf: spec.shape for leaf, spec in specs.items()
    }
    assert all(w.dtype == (specs[leaf].dtype or dtype) for leaf, w in leaves.items())

    def same(leaf, index, expected):
        assert np.array_equal(leaves[leaf][index], expected), (leaf, index)

    same("embed_tokens.weight", (), tensors["model.embed_tokens.weight"])
    same("norm.weight", (), tensors["model.norm.weight"])
    same("lm_head.weight", (), tensors["lm_head.weight"])
    groups = {"dense_layers": [0], "moe_layers": [1, 2], "mtp_layers.block": [3, 4]}
    for group, layers in groups.items():
        for at, layer in enumerate(layers):
            for own in ("q_a_proj", "q_b_proj", "kv_a_proj_with_mqa", "kv_b_proj", "o_proj"):
                name = f"self_attn.{own}"
                same(f"{group}.{name}", at, pick(tensors, config, layer, f"{name}.weight"))
            for name in ("input_layernorm", "post_attention_layernorm", "self_attn.q_a_layernorm"):
                name = f"{name}.weight"
                same(f"{group}.{name}", at, pick(tensors, config, layer, name))
            mlp = f"model.layers.{layer}.mlp."
            swiglus = {"mlp.": ((at,), mlp)}
            if group != "dense_layers":
                same(f"{group}.mlp.gate.weight", at, tensors[mlp + "gate.weight"])
                bias = tensors[mlp + "gate.e_score_correction_bias"]
                same(f"{group}.mlp.gate.e_score_correction_bias", at, bias)
                swiglus = {"mlp.shared_experts.": ((at,), mlp + "shared_experts.")}
                for e in range(4):
                    inside = f"{mlp}experts.{e}."
                    gate_up = f"{group}.mlp.experts.gate_up_proj"
                    same(gate_up, (at, e, 0), tensors[inside + "gate_proj.weight"])
                    same(gate_up, (at, e, 1), tensors[inside + "up_proj.weight"])
                    down = tensors[inside + "down_proj.weight"]
                    same(f"{group}.mlp.experts.down_proj", (at, e), down)
            for leaf, (index, prefix) in swiglus.items():
                gate_up = f"{group}.{leaf}gate_up_proj"
                same(gate_up, (*index, 0), tensors[prefix + "gate_proj.weight"])
                same(gate_up, (*index, 1), tensors[prefix + "up_proj.weight"])
                same(f"{group}.{leaf}down_proj", index, tensors[prefix + "down_proj.weight"])
    for at, layer in enumerate([3, 4]):
        prefix = f"model.layers.{layer}."
        same("mtp_layers.eh_proj", at, tensors[prefix + "eh_proj.weight"])
        same("mtp_layers.enorm.weight", at, tensors[prefix + "enorm.weight"])
        same("mtp_layers.hnorm.weight", at, tensors[prefix + "hnorm.weight"])
        same("mtp_layers.norm.weight", at, tensors[prefix + "shared_head.norm.weight"])


@pytest.mark.parametrize(
    ("dtype", "limit"), [(np.float32, 20_000), (BF16, 10**9)], ids=["fp32 shards", "bf16 file"]
)
@pytest.mark.parametrize("name", CONFIGS)
def test_round_trip_is_bit_exact(name, dtype, limit, tmp_path):
    cfg = ModelConfig.from_hf(CONFIGS[name])
    params = random_params(cfg, dtype)
    save_hf(tmp_path / "a", params, cfg, max_shard_bytes=limit)
    loaded, found = load_hf(tmp_path / "a")
    assert found == cfg
    same_bits(params, loaded)
    # and what we wrote from what we loaded is the same files
    save_hf(tmp_path / "b", loaded, cfg, max_shard_bytes=limit)
    for path in sorted((tmp_path / "a").iterdir()):
        assert path.read_bytes() == (tmp_path / "b" / path.name).read_bytes(), path.name
    assert (len(list((tmp_path / "a").glob("*.safetensors"))) == 1) == (limit == 10**9)


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("copies", [False, True])
def test_another_programs_files_come_back_as_they_were(name, copies, tmp_path):
    config = CONFIGS[name]
    tensors = draw(config | {"n_shared_experts": config["n_shared_experts"] or 1}, BF16)
    tensors = {
        n: w for n, w in tensors.items() if config["n_shared_experts"] or "shared_exp" not in n
    }
    if config["tie_word_embeddings"]:
        del tensors["lm_head.weight"]
        for n in tensors:
            if n.endswith("shared_head.head.weight"):
                tensors[n] = tensors["model.embed_tokens.weight"]
    write_folder(tmp_path / "a", config, tensors, files=2)
    save_hf(tmp_path / "b", *load_hf(tmp_path / "a"), alias_copies=copies)
    written = read_folder(tmp_path / "b")
    alias = (".embed_tokens.weight", ".shared_head.head.weight")
    wanted = {
        n: w
        for n, w in tensors.items()
        if copies or not (n.startswith("model.layers.") and n.endswith(alias))
    }
    if copies and config["tie_word_embeddings"]:
        wanted["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    assert set(written) == set(wanted)
    for n, w in wanted.items():
        assert written[n].dtype == w.dtype and written[n].tobytes() == w.tobytes(), n


@pytest.mark.devices(8)
def test_fused_experts_of_transformers_5_are_read(tmp_path):
    config = tiny_config()
    tensors = draw(config)
    write_folder(tmp_path / "plain", config, tensors)
    fused = {}
    for name, w in tensors.items():
        if ".mlp.experts." not in name or name.startswith("model.layers.1."):
            fused[name] = w  # layer 1 stays as it is
    for layer in (2, 3, 4):
        p = f"model.layers.{layer}.mlp.experts."
        part = lambda own, p=p: [tensors[f"{p}{e}.{own}_proj.weight"] for e in range(4)]  # noqa: E731
        pairs = zip(part("gate"), part("up"), strict=True)
        fused[p + "gate_up_proj"] = np.stack([np.concatenate(pair) for pair in pairs])
        fused[p + "down_proj"] = np.stack(part("down"))
    write_folder(tmp_path / "fused", config, fused, files=3)
    expected, _ = load_hf(tmp_path / "plain")
    same_bits(expected, load_hf(tmp_path / "fused")[0])
    experts = Sharding(mesh.make_mesh(dp=2, ep=2, tp=2), Rules.make({"experts": "ep", "mlp": "tp"}))
    same_bits(expected, load_hf(tmp_path / "fused", sharding=experts)[0])


SHARDINGS = {  # functions: a GPU machine that collects the tests may have fewer devices
    "train": lambda: mesh.preset("train", mesh.make_mesh(dp=2, ep=2, tp=2)),
    "replicated": lambda: mesh.preset("replicated", mesh.make_mesh(dp=8)),
    "layers": lambda: of_rules({"ep": 2, "tp": 4}, {"layers": "ep", "heads": "tp"}),
    "latents": lambda: of_rules({"ep": 2, "tp": 4}, {"latent": "tp", "q_latent": "ep"}),
}


def of_rules(axes, rules):
    return Sharding(mesh.make_mesh(**axes), Rules.make(rules))


@pytest.mark.devices(8)
@pytest.mark.parametrize("name", SHARDINGS)
@pytest.mark.parametrize("dtype", [None, jnp.bfloat16])
def test_sharded_load_equals_plain_load(name, dtype, tmp_path):
    write_folder(tmp_path, tiny_config(), draw(tiny_config()), files=2)
    plain, cfg = load_hf(tmp_path, dtype=dtype)
    sharding = SHARDINGS[name]()
    sharded, _ = load_hf(tmp_path, dtype=dtype, sharding=sharding)
    same_bits(plain, sharded)
    wanted = dict(named_leaves(sharding.params(model.param_specs(cfg))))
    assert {leaf: w.sharding for leaf, w in named_leaves(sharded)} == wanted
    if name != "replicated":
        assert sum(not w.sharding.is_fully_replicated for w in jax.tree.leaves(sharded)) > 5


@pytest.mark.devices(8)
def test_loaded_params_may_be_donated(tmp_path):
    """Replicas share one buffer of the host: writing in place would change the other devices'."""
    write_folder(tmp_path, tiny_config(), draw(tiny_config()))
    params, cfg = load_hf(tmp_path, sharding=SHARDINGS["replicated"]())
    expected = jax.tree.map(lambda w: np.array(w) + 1, params)
    add = jax.jit(lambda tree: jax.tree.map(lambda w: w + 1, tree), donate_argnums=0)
    added = add(params)
    for leaf, w in named_leaves(added):
        for shard in w.addressable_shards:
            assert np.array_equal(shard.data, dict(named_leaves(expected))[leaf]), leaf


@pytest.mark.devices(8)
def test_each_part_is_read_once_and_no_more(tmp_path, monkeypatch):
    config = tiny_config()
    write_folder(tmp_path, config, draw(config), files=2)
    read, preadv = [], os.preadv

    def counted(handle, buffers, offset):
        read.append(preadv(handle, buffers, offset))
        return read[-1]

    monkeypatch.setattr(os, "preadv", counted)
    experts = Sharding(mesh.make_mesh(dp=2, ep=4), Rules.make({"experts": "ep", "heads": "ep"}))
    params, _ = load_hf(tmp_path, sharding=experts)
    files = [path.read_bytes() for path in tmp_path.glob("*.safetensors")]
    headers = sum(8 + int.from_bytes(content[:8], "little") for content in files)
    values = sum(w.nbytes for w in jax.tree.leaves(params))
    # o_proj is split by columns, but its rows are read once. Rotary rows stay in their head.
    assert sum(read) == headers + values


@pytest.mark.skipif(jax.default_backend() != "cpu", reason="counts the host's memory")
def test_peak_memory_is_the_result_and_one_tensor(tmp_path):
    config = tiny_config(vocab_size=16384, hidden_size=64, moe_intermediate_size=512)
    tensors = draw(config)
    write_folder(tmp_path, config, tensors)
    tracemalloc.start()
    try:
        params, _ = load_hf(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    result = sum(w.nbytes for w in jax.tree.leaves(params))
    largest = max(w.nbytes for w in tensors.values())
    assert peak < result + largest + 2_000_000, (peak, result, largest)
    assert peak > result  # or nothing was measured: JAX arrays of a CPU are these NumPy buffers


def test_the_host_holds_no_leaf_of_other_devices(tmp_path, monkeypatch):
    """Arrays of a GPU are filled piece by piece; memory of JAX's own is not in this count."""
    config = tiny_config(n_routed_experts=16, moe_intermediate_size=512, hidden_size=128)
    write_folder(tmp_path, config, draw(config))
    monkeypatch.setattr(buffers, "_is_host", lambda device: False)
    load_hf(tmp_path)  # traces and compiles, which takes memory of Python, too
    tracemalloc.start()
    try:
        params, _ = load_hf(tmp_path)
        peak = tracemalloc.get_traced_memory()[1]
    finally:
        tracemalloc.stop()
    largest = params["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
    assert peak < largest.nbytes / 2, (peak, largest.nbytes)


def test_dtype_is_the_callers_or_the_embeddings(tmp_path, caplog):
    config = tiny_config()
    tensors = draw(config, BF16)
    bias = "model.layers.1.mlp.gate.e_score_correction_bias"
    tensors[bias] = tensors[bias].astype(BF16)
    tensors["model.norm.weight"] = np.full(24, 1 + 2**-20, np.float32)
    write_folder(tmp_path, config, tensors)
    with caplog.at_level(logging.WARNING, "dskjax"):
        narrow, _ = load_hf(tmp_path)
    assert (
        "'model.norm.weight' is stored as F32, but params take the embedding's dtype, bfloat16"
        in (caplog.text)
    )
    caplog.clear()
    for dtype in (jnp.float32, np.float16):
        wide, _ = load_hf(tmp_path, dtype=dtype)
        kinds = {leaf: w.dtype for leaf, w in named_leaves(wide)}
        fixed = "gate.e_score_correction_bias"
        assert all(
            d == (np.float32 if leaf.endswith(fixed) else dtype) for leaf, d in kinds.items()
        )
    assert not caplog.text  # whoever names a dtype gets it without comment
    wide, _ = load_hf(tmp_path, dtype=jnp.float32)
    assert (np.asarray(wide["norm"]["weight"]) == np.float32(1 + 2**-20)).all()
    found = np.asarray(wide["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"])[0]
    assert np.array_equal(found, tensors[bias].astype(np.float32))
    leaf = narrow["moe_layers"]["mlp"]["gate"]
    assert (
        leaf["weight"].dtype == jnp.bfloat16 and leaf["e_score_correction_bias"].dtype == np.float32
    )
    with pytest.raises(ValueError, match="must be bfloat16, float16, float32 or None"):
        load_hf(tmp_path, dtype=jnp.int8)


def test_nan_and_infinity_are_values_like_others(tmp_path):
    config = tiny_config()
    tensors = draw(config)
    tensors["model.norm.weight"] = np.resize(np.float32([np.nan, np.inf, -np.inf, -0.0]), 24)
    write_folder(tmp_path, config, tensors)
    found = np.asarray(load_hf(tmp_path)[0]["norm"]["weight"])
    assert found.tobytes() == tensors["model.norm.weight"].tobytes()


def test_absent_mtp_modules_are_dropped_with_a_word(tmp_path, caplog):
    config = tiny_config()
    tensors = draw(config)
    trunk = {n: w for n, w in tensors.items() if ".layers.3." not in n and ".layers.4." not in n}
    write_folder(tmp_path, config, trunk)
    with caplog.at_level(logging.WARNING, "dskjax"):
        params, cfg = load_hf(tmp_path)
    assert cfg.mtp.num_nextn_predict_layers == 0 and "mtp_layers" not in params
    assert (
        "num_nextn_predict_layers=2, but the files hold no tensor of model.layers.3" in caplog.text
    )
    assert str(tmp_path) in caplog.text
    assert load_config(tmp_path).mtp.num_nextn_predict_layers == 2


def test_harmless_extras_and_links_are_accepted(tmp_path):
    config = tiny_config(tie_word_embeddings=True)
    tensors = draw(config)
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = np.zeros(4, np.float32)
    write_folder(tmp_path / "blobs", config, tensors, files=2)
    (tmp_path / "snapshot").mkdir()
    for path in (tmp_path / "blobs").iterdir():  # as in Hugging Face's cache
        (tmp_path / "snapshot" / path.name).symlink_to(f"../blobs/{path.name}")
    params, _ = load_hf(tmp_path / "snapshot", progress=True)
    assert "lm_head" not in params
