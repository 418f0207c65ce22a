"""Weights of an engine in the layout that its kernels read."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import hopper, model, presets
from dskjax.quantise import quantise
from pallas_kernels.grouped_matmul import PackedInt4
from pallas_kernels.grouped_matmul.packed_int4 import unpack
from serve.engine_api import Role
from serve.placement import Placement, place_params


@pytest.mark.parametrize("unroll", [False, True])
def test_experts_in_int4_are_packed_for_one_hopper(unroll, monkeypatch):
    cfg = presets.tiny_v3()
    moe = dataclasses.replace(cfg.moe, moe_intermediate_size=128)
    cfg = dataclasses.replace(cfg, hidden_size=256, num_hidden_layers=3, moe=moe)
    params = quantise(model.init(cfg, jax.random.key(0), dtype=jnp.float32), "w4afp8")
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
