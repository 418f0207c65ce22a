"""Training on one GPU gives the same bits every time: nothing is added in the order of arrival, and
with --deterministic nothing is chosen by timing it.
"""

import contextvars
import dataclasses
import os
from pathlib import Path

import jax
import numpy as np
import pytest

from dskjax import presets
from dskjax.config import MtpConfig
from train_mtp.data import Batch
from train_mtp.optim import AdamW
from train_mtp.step import Recipe, init_state, train_step

MODEL = str(Path(__file__).parents[2] / "examples" / "tiny-deepseek")
COMMANDS = {
    "pretrain": ["pretrain", "--tokenizer", MODEL, "--model", MODEL],
    "run": ["train-mtp", "run", MODEL],
    "study": ["train-mtp", "study", MODEL, "--table", "none.json", "--eval-data", "none.txt"],
}


@pytest.mark.gpu
def test_steps_taken_twice_are_the_same():
    """Two layers of DeepSeek-V2-Lite's heads and widths, an MTP module, few and frequent ids."""
    cfg = presets.preset("deepseek-v2-lite")
    assert cfg.moe is not None
    cfg = dataclasses.replace(
        cfg,
        vocab_size=64,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        mtp=MtpConfig(num_nextn_predict_layers=1),
        moe=dataclasses.replace(cfg.moe, n_routed_experts=16),
    )
    recipe = Recipe(cfg=cfg, optimizer=AdamW(lr=1e-3, warmup=1, steps=10))
    rng, shape = np.random.default_rng(0), (4, 1024)
    tokens = np.minimum(rng.geometric(0.1, shape), 63).astype(np.int32)
    segments = np.broadcast_to(np.arange(1024) // 300 + 1, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(1024) % 300, shape).astype(np.int32)

    def trained() -> list[np.ndarray]:
        state = init_state(recipe, 0)
        for _ in range(4):
            state, _ = train_step(state, Batch(tokens, segments, positions), recipe=recipe)
        return [np.asarray(leaf) for leaf in jax.tree.leaves(state)]

    first = trained()
    assert all(np.isfinite(np.float32(leaf)).all() for leaf in first)
    for _ in range(3):
        for one, other in zip(first, trained(), strict=True):
            np.testing.assert_array_equal(one, other)


@pytest.mark.parametrize("name", COMMANDS)
def test_a_command_compiles_one_way(dskjax, monkeypatch, tmp_path, name):
    flags = "--xla_cpu_enable_fast_math=false"
    monkeypatch.setenv("XLA_FLAGS", flags)
    mesh = [] if name == "study" else ["--mesh", "dp=1"]
    wanted = [*COMMANDS[name], *mesh, "--data", "none.txt", "--out", str(tmp_path)]
    assert contextvars.copy_context().run(dskjax, *wanted)[0] == 2
    assert os.environ["XLA_FLAGS"] == flags
    code, _, err = contextvars.copy_context().run(dskjax, *wanted, "--deterministic")
    assert code == 2 and "none." in err  # past the option, to the text that is not there
    assert os.environ["XLA_FLAGS"].startswith(f"{flags} --xla_gpu_autotune_level=0 ")


@pytest.mark.parametrize(("device", "refused"), [("cpu", False), ("gpu", True)])
def test_one_order_is_for_one_gpu(dskjax, monkeypatch, tmp_path, device, refused):
    monkeypatch.setenv("XLA_FLAGS", "")
    monkeypatch.setattr(jax, "default_backend", lambda: device)
    wanted = [*COMMANDS["run"], "--mesh", "dp=2", "--data", "none.txt", "--out", str(tmp_path)]
    code, _, err = contextvars.copy_context().run(dskjax, *wanted, "--deterministic")
    assert code == 2
    assert ("holds on one GPU, and the mesh has 2: give --mesh dp=1" in err) == refused
