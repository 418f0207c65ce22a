"""The slices that are measured on meshes decode what one device decodes."""

import argparse
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from benchmarks import mesh_times, v3_ep8
from benchmarks.mesh_slice import Slice, config_of
from benchmarks.mesh_times import Load, measure, same_tokens
from dskjax.decode.ranks import Ranks
from dskjax.mesh import make_mesh, preset

pytestmark = pytest.mark.devices(4)


@functools.cache
def tiny(redundant=0, **axes):
    sizes = axes or {"ep": 4}
    mesh = make_mesh(**sizes, devices=jax.devices()[: np.prod(list(sizes.values()))])
    return Slice(
        cfg=config_of("tiny-v3", 2, redundant),
        ranks=Ranks(preset("decode", mesh)),
        precision="bf16",
        kv_dtype="auto",
        dtype=jnp.float32,
    )


@functools.cache
def weights(model):
    return model.params()


def test_a_mesh_chooses_the_tokens_of_one_device():
    found = same_tokens(tiny(), weights(tiny()), batch=3, context=100)
    assert found == {"tokens": 1.0, "drafts": 1.0}


def test_it_sees_ranks_that_have_each_others_experts(monkeypatch):
    model, right = tiny(), weights(tiny())

    def turned(layer):
        experts = layer["mlp"]["experts"]
        rolled = {name: jnp.roll(w, 4, axis=0) for name, w in experts.items()}
        return layer | {"mlp": layer["mlp"] | {"experts": rolled}}

    wrong = right | {"moe_layers": tuple(map(turned, right["moe_layers"]))}
    real = Ranks.program

    def program(ranks, cfg, config):
        run = real(ranks, cfg, config)
        mixed = lambda params, *rest: run(wrong, *rest)  # noqa: E731
        return mixed if ranks.count > 1 else run

    monkeypatch.setattr(Ranks, "program", program)
    assert same_tokens(model, right, batch=3, context=100)["tokens"] < 0.9


def test_a_step_is_timed_and_its_tokens_counted(monkeypatch):
    monkeypatch.setattr(mesh_times, "RUNS", 2)
    load = Load(batch=3, context=100, drafts=2, chunk=8)
    found = measure(tiny(), weights(tiny()), load, acceptance=0.8)
    assert 1.2 < found["tokens"] < 3 and found["step_us"]["samples"] == 2
    rate = 3 * found["tokens"] / found["step_us"]["median"] * 1e6
    assert found["decoded_per_second_per_gpu"] == pytest.approx(rate)
    assert found["prefilled_per_second_per_gpu"] == pytest.approx(8e6 / found["step_us"]["median"])


@pytest.mark.full
def test_a_bias_makes_loads_uneven_and_a_plan_evens_them(monkeypatch):
    monkeypatch.setattr(mesh_times, "RUNS", 2)
    monkeypatch.setattr(v3_ep8, "slice_on", lambda args, layers, redundant=0: tiny(redundant))
    args = argparse.Namespace(batch=[8], context=[64], layers=None, redundant=8, acceptance=0.5)
    before, after = v3_ep8.eplb(args)
    assert before["redundant"] == 0 and after["redundant"] == 8
    assert after["max_over_mean"] < before["max_over_mean"] > 1.2
    cfg = tiny().cfg
    counts = v3_ep8.count_experts(tiny(), weights(tiny()), Load(batch=8, context=64))
    assert counts.shape == (cfg.num_moe_layers, cfg.moe.n_routed_experts)
    np.testing.assert_array_equal(counts.sum(axis=1), 4 * 8 * cfg.moe.num_experts_per_tok)
