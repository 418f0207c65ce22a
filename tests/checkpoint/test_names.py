"""Names and shapes against a list of tensors that was written from the specification alone."""

import math
import sys

import numpy as np
import pytest

from dskjax import model, presets
from dskjax.checkpoint import names
from dskjax.config import ModelConfig
from dskjax.params import named_leaves, tree_of
from tests.checkpoint.build import tiny_config
from tests.goldens.cases import CASES, random_case
from tests.goldens.weights import tensor_shapes

CONFIGS = {case.name: case.base for case in CASES}
CONFIGS |= {f"{f}-{i}": random_case(i, f).base for f in ("v3", "v2") for i in range(10)}
CONFIGS |= {
    name: presets.preset(name).to_hf()
    for name in ("deepseek-v2-lite", "tiny-v3", "tiny-v2lite")  # deepseek-v3 is further below
}


def by_leaf(cfg, stored=()):
    out = {}
    for slot in names.slots(cfg, stored):
        out.setdefault(slot.leaf, []).append(slot)
    return out


@pytest.mark.parametrize("name", CONFIGS)
def test_names_and_shapes_are_those_of_the_hub(name):
    config = {"rope_theta": 1e4} | CONFIGS[name]
    cfg = ModelConfig.from_hf(config)
    wanted = dict(tensor_shapes(config))
    found = {slot.name: slot.shape for slot in names.slots(cfg)}
    copies = {alias: slot.shape for alias, slot in names.aliases(cfg).items()}
    assert found | copies == wanted
    assert not set(found) & set(copies)
    assert all(names.alias_of(own, cfg) is None for own in found)
    assert all(names.layer_of(name) < sys.maxsize for name in found if ".layers." in name)


@pytest.mark.parametrize("name", ["deepseek-v2-lite", "tiny-v3"])
def test_slots_tile_their_leaves(name):
    cfg = presets.preset(name)
    specs = dict(named_leaves(model.param_specs(cfg)))
    for leaf, slots in by_leaf(cfg).items():
        shape = specs[leaf].shape
        assert all(slot.shape == shape[len(slot.index) :] for slot in slots)
        lead = shape[: len(slots[0].index)]
        assert [slot.index for slot in slots] == list(np.ndindex(*lead)), leaf
        assert {slot.leaf for slot in slots} == {leaf}


PLACES = """
layers.0.mlp.up_proj.weight                       dense_layers.mlp.gate_up_proj 0 1
layers.3.mlp.experts.7.gate_proj.weight           moe_layers.mlp.experts.gate_up_proj 0 7 0
layers.60.mlp.experts.9.up_proj.weight            moe_layers.mlp.experts.gate_up_proj 57 9 1
layers.60.mlp.experts.9.down_proj.weight          moe_layers.mlp.experts.down_proj 57 9
layers.4.mlp.shared_experts.gate_proj.weight      moe_layers.mlp.shared_experts.gate_up_proj 1 0
layers.5.mlp.gate.e_score_correction_bias         moe_layers.mlp.gate.e_score_correction_bias 2
layers.5.self_attn.q_a_layernorm.weight           moe_layers.self_attn.q_a_layernorm.weight 2
layers.61.eh_proj.weight                          mtp_layers.eh_proj 0
layers.61.enorm.weight                            mtp_layers.enorm.weight 0
layers.61.shared_head.norm.weight                 mtp_layers.norm.weight 0
layers.61.input_layernorm.weight                  mtp_layers.block.input_layernorm.weight 0
layers.61.mlp.experts.255.up_proj.weight          mtp_layers.block.mlp.experts.gate_up_proj 0 255 1
norm.weight                                       norm.weight
"""


def test_the_685_billion_values_of_deepseek_v3():
    cfg = presets.deepseek_v3()
    slots = {slot.name: slot for slot in names.slots(cfg)}
    copies = names.aliases(cfg)
    shapes = {name: slot.shape for name, slot in (slots | copies).items()}
    assert shapes == dict(tensor_shapes(cfg.to_hf()))
    assert len(copies) == 2 and len(shapes) == len(slots) + 2
    assert round(sum(map(math.prod, shapes.values())) / 1e9, 1) == 684.5
    for line in PLACES.split("\n")[1:-1]:
        name, leaf, *index = line.split()
        found = slots[f"model.{name}"]
        assert (found.leaf, found.index) == (leaf, tuple(map(int, index))), name


def test_fused_experts_replace_their_layer_only():
    cfg = ModelConfig.from_hf(tiny_config())
    fused = "model.layers.2.mlp.experts.gate_up_proj"
    slots = by_leaf(cfg, {fused})
    own = [s for s in slots["moe_layers.mlp.experts.gate_up_proj"] if s.index[0] == 1]
    assert own == [names.Slot(fused, "moe_layers.mlp.experts.gate_up_proj", (1,), (4, 32, 24))]
    others = {leaf: [s for s in part if s.name != fused] for leaf, part in slots.items()}
    plain = by_leaf(cfg)
    for leaf, part in others.items():
        kept = [s for s in plain[leaf] if s.index[:1] != (1,) or "experts.gate_up" not in leaf]
        assert part == (kept if leaf == "moe_layers.mlp.experts.gate_up_proj" else plain[leaf])


def test_rotary_rows_are_the_last_of_each_head():
    cfg = ModelConfig.from_hf(tiny_config())  # heads of 16 + 8, latent of 32 + 8
    head = [*range(16), 16, 18, 20, 22, 17, 19, 21, 23]
    expected = [24 * h + row for h in range(4) for row in head]
    for leaf in ("moe_layers.self_attn.q_b_proj", "x.q_proj"):
        order = names.row_order(leaf, cfg)
        assert order is not None and order.tolist() == expected
    order = names.row_order("mtp_layers.block.self_attn.kv_a_proj_with_mqa", cfg)
    assert order is not None
    assert order.tolist() == [*range(32), 32, 34, 36, 38, 33, 35, 37, 39]
    for leaf in ("x.q_a_proj", "x.kv_b_proj", "x.o_proj", "embed_tokens.weight"):
        assert names.row_order(leaf, cfg) is None
    half_split = ModelConfig.from_hf(tiny_config(rope_interleave=False))
    assert names.row_order("x.q_proj", half_split) is None


def test_trees_and_dotted_names_are_inverse():
    leaves = {"a.b.c": 1, "a.d": 2, "e": 3}
    assert tree_of(leaves) == {"a": {"b": {"c": 1}, "d": 2}, "e": 3}
    assert dict(named_leaves(tree_of(leaves))) == leaves
