"""Training states: resumed bit for bit, on any sharding, whatever kills the writer."""

import json
import logging
import math
import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import optax
import pytest

from dskjax import mesh, model
from dskjax.checkpoint import CheckpointError
from dskjax.checkpoint.store import Store, restore, save
from dskjax.config import ModelConfig
from pallas_kernels.quant import QTensor
from tests.checkpoint.build import random_params, tiny_config

CFG = ModelConfig.from_hf(tiny_config(num_nextn_predict_layers=1))


def some_params(seed=0):
    """A few of the groups: every shape costs compile time somewhere."""
    params = random_params(CFG, jnp.bfloat16, seed)
    keep = {
        "embed_tokens": params["embed_tokens"],
        "moe_layers": {"mlp": params["moe_layers"]["mlp"]},
    }
    return jax.tree.map(jnp.asarray, keep)


def training_state(seed=0):
    """Everything a run may hold: nested dicts, optax tuples, keys, counters, quantized weights."""
    params = some_params(seed)
    optimiser = optax.chain(optax.clip_by_global_norm(1.0), optax.adamw(1e-3))
    rng = np.random.default_rng(seed)
    fp8 = rng.standard_normal((130, 200)).astype(jnp.float8_e4m3fn)
    int4 = rng.integers(0, 256, (130, 100), np.uint8)
    scales = rng.random((130, 2), np.float32)
    return {
        "params": params,
        "optimiser": optimiser.init(params),
        "key": jax.random.key(seed + 7),
        "keys": jax.random.split(jax.random.key(seed, impl="rbg"), (2, 3)),
        "raw_key": jax.random.PRNGKey(seed),
        "step": jnp.int32(seed),
        "flags": (jnp.array([True, False]), jnp.float32(math.nan), None, {}),
        "fp8": QTensor(jnp.asarray(fp8), jnp.asarray(scales[:2]), (128, 128), "e4m3"),
        "int4": QTensor(jnp.asarray(int4), jnp.asarray(scales), (1, 128), "int4"),
    }


def bits(leaf):
    if jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key):
        leaf = jax.random.key_data(leaf)
    return np.asarray(leaf).tobytes()


def same_state(a, b):
    assert jax.tree.structure(a) == jax.tree.structure(b)
    for x, y in zip(jax.tree.leaves(a), jax.tree.leaves(b), strict=True):
        assert (x.dtype, x.shape, bits(x)) == (y.dtype, y.shape, bits(y))


def abstract(tree):
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype), tree)


def files_below(folder: Path):
    return [path for path in folder.rglob("*") if path.is_file()]


def test_a_state_comes_back_bit_for_bit(tmp_path):
    states = {step: training_state(step) for step in (2, 5, 9)}
    extra = {"position": {"file": "a.txt", "row": 12}, "loss": 1.5, "names": ["a", "ü"]}
    with Store(tmp_path / "run", keep_last=2) as store:
        assert store.latest() is None and store.steps() == []
        for step, state in states.items():
            store.save(step, state, extra | {"step": step})
        store.wait()
        assert store.steps() == [5, 9] and store.latest() == 9
        for step in (5, 9):
            found, kept = store.restore(step, abstract(states[step]))
            same_state(states[step], found)
            assert kept == extra | {"step": step}
    with Store(tmp_path / "run") as again:  # another process would see the same
        assert again.latest() == 9
        found, kept = again.restore(9, states[9])
        same_state(states[9], found)
        again.save(10, states[2])
        assert again.restore(10, states[2])[1] == {}


def test_a_saved_state_may_be_donated_at_once(tmp_path):
    spoil = jax.jit(lambda tree: jax.tree.map(lambda x: x * 0 - 1, tree), donate_argnums=0)
    with Store(tmp_path) as store:
        for step in range(4):
            state = {"w": jnp.full((1 << 20,), step, jnp.float32)}
            store.save(step, state)
            jax.block_until_ready(spoil(state))
            store.wait()
            assert (np.asarray(store.restore(step, abstract(state))[0]["w"]) == step).all()


def test_milestones_are_kept(tmp_path):
    with Store(tmp_path, keep_last=1, keep_every=4) as store:
        for step in range(2, 11, 2):
            store.save(step, {"x": jnp.int32(step)})
        store.wait()
        assert store.steps() == [4, 8, 10]
    for options in ({"keep_last": 0}, {"keep_every": -1}):
        with pytest.raises(ValueError, match="must be positive or None"):
            Store(tmp_path, **options)


@pytest.mark.devices(8)
def test_a_state_moves_between_shardings(tmp_path):
    params, specs = some_params(), model.param_specs(CFG)
    specs = {
        "embed_tokens": specs["embed_tokens"],
        "moe_layers": {"mlp": specs["moe_layers"]["mlp"]},
    }
    wanted = {
        name: mesh.preset(name, mesh.make_mesh(dp=2, ep=2, tp=2)).params(specs)
        for name in ("train", "tensor")
    }
    placed = jax.device_put(params, wanted["train"])
    save(tmp_path / "sharded", placed, {"of": "train"})
    save(tmp_path / "whole", params)
    for name, shardings in wanted.items():
        like = jax.tree.map(
            lambda x, s: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=s), params, shardings
        )
        for source in ("sharded", "whole"):
            found, _ = restore(tmp_path / source, like)
            same_state(params, found)
            assert jax.tree.map(lambda x: x.sharding, found) == shardings, (name, source)
    found, extra = restore(tmp_path / "sharded", abstract(params))
    same_state(params, found)
    assert extra == {"of": "train"}
    assert all(len(x.devices()) == 1 for x in jax.tree.leaves(found))


SMALL = {"a": jnp.arange(6.0).reshape(2, 3), "b": (jnp.int32(1), jnp.zeros(4, jnp.bfloat16))}
A, (B0, B1) = SMALL["a"], SMALL["b"]
OTHERS = {
    "shape": (SMALL | {"a": A.T}, "'a': expected float32[3,2], found float32[2,3]"),
    "dtype": (
        SMALL | {"b": (B0, B1.astype(jnp.float16))},
        "'b.1': expected float16[4], found bfloat16[4]",
    ),
    "missing": (SMALL | {"c": B1}, "'c': expected bfloat16[4], found None"),
    "extra": ({"a": A}, "'b.0': expected none, found int32[]"),
    "structure": ({"a": A, "b": {"x": B0}}, "'b.x': expected int32[], found None"),
    "empty": ({}, "'a': expected none, found float32[2,3]"),
}


@pytest.mark.parametrize("case", OTHERS)
def test_another_structure_is_refused_by_the_first_leaf(case, saved_small):
    like, message = OTHERS[case][0], re.escape(OTHERS[case][1])
    with pytest.raises(CheckpointError, match=message):
        restore(saved_small, like)
    with Store(saved_small.parent / "run") as store, pytest.raises(CheckpointError, match=message):
        store.restore(1, like)


@pytest.fixture(scope="module")
def saved_small(tmp_path_factory):
    folder = tmp_path_factory.mktemp("small")
    save(folder / "one", SMALL)
    with Store(folder / "run") as store:
        store.save(1, SMALL)
    return folder / "one"


def test_what_cannot_be_saved_is_refused(tmp_path):
    with Store(tmp_path / "run") as store:
        store.save(3, SMALL)
        for step in (3, 2):
            with pytest.raises(
                ValueError, match=f"step={step} must come after the last step .*, 3"
            ):
                store.save(step, SMALL)
        with pytest.raises(ValueError, match="leaf 'n' is a int; a state holds JAX arrays"):
            store.save(4, {"n": 3})
        with pytest.raises(ValueError, match="leaf 'n.0' is a ndarray"):
            store.save(4, {"n": [np.zeros(2)]})
        with pytest.raises(ValueError, match="is not JSON: .*set"):
            store.save(4, SMALL, {"seen": {1}})
        with pytest.raises(ValueError, match="same dotted name"):
            store.save(4, {"a": {"b": jnp.int32(1)}, "a.b": jnp.int32(1)})
        with pytest.raises(CheckpointError, match=r"no checkpoint of step=7; found \[3\]"):
            store.restore(7, SMALL)
        assert store.steps() == [3]
        store.save(4, SMALL)  # and a refusal leaves nothing behind
        same_state(SMALL, store.restore(4, SMALL)[0])
    save(tmp_path / "one", SMALL)
    with pytest.raises(FileExistsError, match="exists already"):
        save(tmp_path / "one", SMALL)
    for place in (tmp_path / "nowhere", tmp_path / "run"):
        with pytest.raises(CheckpointError, match=f"{place}: "):
            restore(place, SMALL)


def test_lost_and_cut_files_are_an_error(tmp_path):
    state = {"w": jnp.arange(5000.0)}
    save(tmp_path / "good", state)
    names = [path.relative_to(tmp_path / "good") for path in files_below(tmp_path / "good")]
    refused = []
    for number, name in enumerate(names):
        for how in ("lost", "cut"):
            copy = tmp_path / f"{number}-{how}"
            subprocess.run(["cp", "-r", tmp_path / "good", copy], check=True)
            if how == "lost":
                (copy / name).unlink()
            else:
                os.truncate(copy / name, (copy / name).stat().st_size // 2)
            try:
                found, _ = restore(copy, state)
            except CheckpointError as error:
                assert str(copy) in str(error)
                refused.append((name.name, how))
            else:  # notes of Orbax that the values do not depend on
                same_state(state, found)
    assert len(refused) >= 6, refused


def test_a_manifest_that_is_none_is_told_before_arrays_are_read(tmp_path):
    """What Orbax began to read of the others would end after it has given up, with tracebacks."""
    save(tmp_path / "a", SMALL)
    manifest = tmp_path / "a" / "state" / "manifest.ocdbt"
    manifest.write_bytes(b"\xff" * manifest.stat().st_size)
    with pytest.raises(CheckpointError, match="a: cannot be restored .*is no manifest"):
        restore(tmp_path / "a", SMALL)


WRITER = """
    import os, sys
    import jax, jax.numpy as jnp
    jax.config.update("jax_platforms", "cpu")
    from dskjax.checkpoint.store import Store
    store = Store(sys.argv[1])
    state = lambda k: {"x": jnp.full((4_000_000,), k, jnp.float32), "k": jnp.int32(k)}
    store.save(1, state(1), {"at": 1})
    store.wait()
    store.save(2, state(2), {"at": 2})
    while len(os.listdir(sys.argv[1])) < 2:  # until its thread has begun
        pass
    os._exit(9)  # as kill -9 would: no thread is waited for, nothing is cleaned up
"""


def test_a_killed_writer_leaves_the_step_before(tmp_path):
    run = tmp_path / "run"
    root = Path(__file__).parents[2]
    done = subprocess.run(
        [sys.executable, "-c", textwrap.dedent(WRITER), str(run)], cwd=root, timeout=100
    )
    assert done.returncode == 9
    leftovers = [path.name for path in run.iterdir() if path.name != "1"]
    assert leftovers and "2" not in leftovers, leftovers  # it was in the middle of step 2
    like = {"x": jnp.zeros(4_000_000), "k": jnp.int32(0)}
    with Store(run) as store:
        assert store.steps() == [1] and store.latest() == 1
        found, extra = store.restore(1, like)
        assert extra == {"at": 1} and int(found["k"]) == 1 and (np.asarray(found["x"]) == 1).all()
        assert [path.name for path in run.iterdir() if path.name != "1"] == leftovers  # only read
        store.save(3, {"k": jnp.int32(33)})
        store.wait()
        assert store.steps() == [1, 3]
        assert int(store.restore(3, {"k": jnp.int32(0)})[0]["k"]) == 33
    assert sorted(path.name for path in run.iterdir()) == ["1", "3"]  # the writer swept up


def test_strangers_in_the_folder_are_no_steps(tmp_path, caplog):
    (tmp_path / "plots_7").mkdir()
    (tmp_path / "metrics.jsonl").write_text(json.dumps({"loss": 1}))
    (tmp_path / "12").write_text("a file")
    with caplog.at_level(logging.WARNING), Store(tmp_path) as store:
        assert store.latest() is None
        store.save(3, SMALL)
        store.wait()
        assert store.steps() == [3]
    assert not caplog.records
