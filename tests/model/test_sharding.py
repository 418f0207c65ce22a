"""Sharded == unsharded on 8 simulated devices; rules that collide; meshes that do not fit."""

import functools

import jax
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dskjax import mesh, model
from dskjax.axes import LOGICAL_AXES, Rules, Sharding
from dskjax.params import named_leaves
from pallas_kernels.testing import assert_close
from tests.model.common import Pages, ragged, run_apply, run_forward, run_head, run_trunk, tiny
from tests.tolerances import MODEL

needs_8 = pytest.mark.devices(8)


@functools.cache
def devices_2_2_2():
    return mesh.make_mesh(dp=2, ep=2, tp=2, devices=jax.devices()[:8])


@functools.cache
def placed(name):
    """(sharding, params of tiny-v3 on 8 devices)."""
    sharding = mesh.preset(name, devices_2_2_2())
    shardings = sharding.params(model.param_specs(tiny().cfg))
    # From host memory: cutting up arrays of one device would compile a slice for each.
    return sharding, jax.device_put(jax.tree.map(np.asarray, tiny().params), shardings)


PRESETS = ["data", "fsdp", "tensor", "train", "decode", "prefill"]
SPLIT = {  # one weight of each kind, and how each preset splits it
    "lm_head.weight": {
        "fsdp": (None, ("dp", "ep")),
        "tensor": ("tp", None),
        "train": ("tp", ("dp", "ep")),
        "decode": ("tp", None),
        "prefill": (("ep", "tp"), None),
    },
    "moe_layers.mlp.experts.down_proj": {
        "fsdp": (None, None, ("dp", "ep"), None),
        "tensor": (None, None, None, "tp"),
        "train": (None, "ep", "dp", "tp"),
        "decode": (None, "ep", None, "tp"),
        "prefill": (None, "ep", None, "tp"),
    },
}


@needs_8
@pytest.mark.parametrize(
    "name",
    # The step that trains runs on "data" every time.
    [pytest.param(name, marks=pytest.mark.full if name == "data" else ()) for name in PRESETS],
)
def test_apply_equals_unsharded(name):
    t, (sharding, params) = tiny(), placed(name)
    for leaf, want in SPLIT.items():
        spec = dict(named_leaves(params))[leaf].sharding.spec
        assert tuple(spec) == want.get(name, (None,) * len(spec)), (leaf, spec)
    tokens = np.concatenate([t.tokens, t.tokens[:1]])  # 4 rows over dp and ep
    tokens = jax.device_put(tokens, sharding.of(("batch", "sequence")))
    assert tokens.sharding.shard_shape(tokens.shape) == (4 if name == "prefill" else 1, 17)
    logits = run_apply(t.cfg, sharding)(params, tokens)
    want = run_trunk(t).hidden
    want = run_head(t, want)
    assert_close(logits[:3], want, MODEL)
    assert_close(logits[3], want[0], MODEL)


@needs_8
def test_forward_equals_unsharded_with_split_heads():
    t, (_, params) = tiny(), placed("tensor")
    pages, everywhere = Pages.make(t.cfg), jax.NamedSharding(devices_2_2_2(), PartitionSpec())
    cache = jax.device_put(pages.cache, everywhere)
    batch = jax.device_put(
        ragged(pages, t.tokens, [0, 0, 0], [4, 5, 3], 12, "expanded"), everywhere
    )
    hidden, cache = run_forward(t.cfg)(params, cache, batch)
    want = run_trunk(t).hidden
    for start, b, n in ((0, 0, 4), (4, 1, 5), (9, 2, 3)):
        assert_close(hidden[start : start + n], want[b, :n], MODEL)
    pages.cache = cache
    np.testing.assert_array_equal(pages.written(), pages.expected([4, 5, 3]))


# ------------------------------------------------------------------ rules and meshes


def test_rules_give_specs():
    rules = Rules.make({"heads": "tp", "batch": ("dp", "ep"), "embed": None})
    assert rules.spec(("batch", None, "heads", "latent")) == PartitionSpec(
        ("dp", "ep"), None, "tp", None
    )


@pytest.mark.parametrize(
    ("of", "axes"),
    [
        ({"heads": "tp", "mlp": "tp"}, ("heads", "mlp")),
        ({"batch": ("dp", "ep"), "experts": "ep"}, ("batch", "experts")),
        ({"heads": "tp"}, ("heads", "heads")),
    ],
)
def test_a_mesh_axis_used_twice_is_refused(of, axes):
    with pytest.raises(ValueError, match="both .* over mesh axis '(tp|ep)'"):
        Rules.make(of).spec(axes)


def test_rules_name_unknown_axes():
    with pytest.raises(ValueError, match="width.*known: batch"):
        Rules.make({"width": "tp"})


@pytest.mark.parametrize("name", [*PRESETS, "replicated"])
def test_presets_fit_every_weight_of_the_model(name):
    """No collision in any declared weight, and in no activation that the trunk pins."""
    rules = mesh.preset(name, devices_2_2_2()).rules if jax.device_count() >= 8 else None
    rules = rules or mesh._RULES[name]
    for cfg in (tiny().cfg, tiny("tiny-v2lite").cfg):
        for _, spec in named_leaves(model.param_specs(cfg)):
            assert len(rules.spec(spec.axes)) == len(spec.shape)
    assert set(dict(rules.of)) <= set(LOGICAL_AXES)


@needs_8
def test_dimensions_that_do_not_divide_stay_whole():
    sharding = Sharding(devices_2_2_2(), Rules.make({"heads": "tp", "embed": ("dp", "ep")}))
    assert sharding.of(("heads", "embed"), (3, 8)).spec == PartitionSpec(None, ("dp", "ep"))
    assert sharding.of(("heads", "embed"), (4, 6)).spec == PartitionSpec("tp", None)


def test_mesh_sizes_must_multiply_to_the_devices():
    with pytest.raises(ValueError, match="dp=3 .* = 3 must equal the device count, 1"):
        mesh.make_mesh(dp=3, devices=jax.devices()[:1])


def test_unknown_preset_lists_the_known_ones():
    one = mesh.make_mesh(devices=jax.devices()[:1])
    assert one.axis_names == ("dp", "ep", "tp")
    with pytest.raises((ValueError, TypeError), match="'pipeline'"):
        mesh.preset("pipeline", one)


@pytest.mark.parametrize(
    ("text", "want"), [("dp=2,tp=4", {"dp": 2, "tp": 4}), (" ep=8 ", {"ep": 8}), ("", {})]
)
def test_parse_mesh(text, want):
    assert mesh.parse_mesh(text) == want


@pytest.mark.parametrize("text", ["pp=2", "dp", "dp=0", "dp=-1", "dp=two", "dp=2;tp=2"])
def test_parse_mesh_names_the_part(text):
    with pytest.raises(ValueError, match="is not AXIS=N"):
        mesh.parse_mesh(text)
