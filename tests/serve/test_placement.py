"""Weights of an engine in the layout that its kernels read."""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dskjax import hopper, model, presets
from dskjax.quantise import quantise
from pallas_kernels.grouped_matmul import PackedInt4
from pallas_kernels.grouped_matmul.packed_int4 import unpack
from serve.engine_api import Role
from serve.placement import Placement, place_params


@functools.cache
def drawn():
    """(params with experts in int4, their config)."""
    cfg = presets.tiny_v3()
    moe = dataclasses.replace(cfg.moe, moe_intermediate_size=128)
    cfg = dataclasses.replace(cfg, hidden_size=256, num_hidden_layers=3, moe=moe)
    draw = jax.jit(lambda: quantise(model.init(cfg, jax.random.key(0)), "w4afp8"))
    return draw(), cfg


@pytest.mark.parametrize("unroll", [False, True])
def test_experts_in_int4_are_packed_for_one_hopper(unroll, monkeypatch):
    params, cfg = drawn()
    for name in ("no_hopper", "whole_arrays_only"):
        monkeypatch.setattr(hopper, name, lambda: None)
    where = Placement("here", Role.IFB, (jax.devices()[0],))
    placed, _ = place_params(params, cfg, where, unroll=unroll, redundant=0)
    layers = placed["moe_layers"]
    packed = (layers[1] if unroll else layers)["mlp"]["experts"]["gate_up_proj"]
    assert isinstance(packed, PackedInt4)
    found = unpack(packed if unroll else packed[1])
    want = params["moe_layers"]["mlp"]["experts"]["gate_up_proj"][1]
    np.testing.assert_array_equal(found.values, want.values)
    np.testing.assert_array_equal(found.scales, want.scales)


@pytest.mark.devices(4)
@pytest.mark.parametrize("redundant", [0, 4])
def test_each_rank_packs_its_experts(redundant, monkeypatch):
    params, cfg = drawn()
    monkeypatch.setattr(hopper, "no_hopper", lambda: None)
    where = Placement("here", Role.IFB, tuple(jax.devices()[:4]), ep=2, dp=2)
    placed, _ = place_params(params, cfg, where, unroll=False, redundant=redundant)
    packed = placed["moe_layers"]["mlp"]["experts"]["gate_up_proj"]
    assert isinstance(packed, PackedInt4)
    assert packed.words.addressable_shards[0].data.size * 2 == packed.words.size
    found = unpack(packed[1])
    want = params["moe_layers"]["mlp"]["experts"]["gate_up_proj"][1]
    np.testing.assert_array_equal(found.values[: len(want.values)], want.values)


@pytest.mark.devices(4)
def test_experts_that_kernels_cannot_take_stay(monkeypatch):
    params, cfg = drawn()
    monkeypatch.setattr(hopper, "no_hopper", lambda: None)
    where = Placement("here", Role.IFB, tuple(jax.devices()[:4]), ep=2, dp=1)  # and tp=2
    placed, _ = place_params(params, cfg, where, unroll=False, redundant=0)
    assert not isinstance(placed["moe_layers"]["mlp"]["experts"]["gate_up_proj"], PackedInt4)
