"""A mesh that would cut blocks of a stored weight is refused when it is loaded."""

import dataclasses
import re

import jax
import jax.numpy as jnp
import pytest

from dskjax import mesh, model
from dskjax.checkpoint import load_hf, save_hf
from dskjax.checkpoint.orbax_params import load_params, save_params
from dskjax.quantise import quantise
from tests.train_mtp import toy


@pytest.mark.devices(8)
@pytest.mark.parametrize(("save", "read"), [(save_hf, load_hf), (save_params, load_params)])
def test_a_degree_that_cuts_blocks_is_refused_by_name(save, read, tmp_path):
    cfg = dataclasses.replace(toy.model(), intermediate_size=256)
    weights = model.init(cfg, jax.random.key(0), dtype=jnp.bfloat16)
    save(tmp_path / "model", quantise(weights, "fp8"), cfg)

    def split(tp: int):
        return mesh.preset("tensor", mesh.make_mesh(tp=tp, devices=jax.devices()[:tp]))

    told = r"^dense_layers\.mlp\.(down|gate_up)_proj: tp=4 would split the 'mlp' axis .* in one of "
    with pytest.raises(ValueError, match=told + re.escape("1, 2") + "$"):
        read(tmp_path / "model", sharding=split(4))
    params, _ = read(tmp_path / "model", sharding=split(2))
    down = params["dense_layers"]["mlp"]["down_proj"]
    assert down.values.sharding == down.scales.sharding
