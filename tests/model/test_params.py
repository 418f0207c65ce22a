"""Parameters: declared once; counted to the last digit; initialised, bound and cast by name."""

import dataclasses
import functools
import math

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import model, paged, params, presets
from dskjax.batch import RaggedBatch
from dskjax.cache import init_cache
from dskjax.layers.norm import RmsNorm
from dskjax.params import bind, named_leaves, specs_of, weight
from pallas_kernels import quant, quantise
from tests.model.common import tiny
from tests.oracles import weights

V3 = presets.deepseek_v3()
REAL = [name for name in presets.PRESETS if not name.startswith("tiny")]


def test_parameter_count_of_an_mtp_module():
    """Without embedding and head, which are the trunk's."""
    assert params.count(model.param_specs(V3)["mtp_layers"]) == 11_610_068_224


def test_parameter_counts_by_part():
    """Attention 187.1M a layer, an expert 44.04M, a dense MLP 396.4M."""
    specs = model.param_specs(V3)
    attention = params.count(specs["dense_layers"]["self_attn"]) / 3
    expert = params.count(specs["moe_layers"]["mlp"]["experts"]) / (58 * 256)
    dense = params.count(specs["dense_layers"]["mlp"]) / 3
    assert [round(n / 1e6, d) for n, d in ((attention, 1), (expert, 2), (dense, 1))] == [
        187.1,
        44.04,
        396.4,
    ]


@pytest.mark.parametrize("name", REAL)
def test_real_models_have_the_checkpoint_shapes(name):
    """Every stacked shape follows from those of the checkpoint; gate and up are one array here."""
    cfg = presets.preset(name)
    hub, got = dict(weights.shapes(cfg.to_hf())), dict(named_leaves(model.param_specs(cfg)))
    dense, layers = cfg.num_dense_layers, cfg.num_hidden_layers
    total = sum(math.prod(shape) for shape in hub.values())
    assert sum(math.prod(spec.shape) for spec in got.values()) == total
    first, moe = "model.layers.0.", f"model.layers.{dense}."
    for name in ("self_attn.kv_b_proj", "self_attn.o_proj", "mlp.down_proj"):
        assert got[f"dense_layers.{name}"].shape == (dense, *hub[f"{first}{name}.weight"])
    gate, up = (hub[f"{moe}mlp.experts.0.{n}_proj.weight"] for n in ("gate", "up"))
    experts = cfg.moe.n_routed_experts
    assert got["moe_layers.mlp.experts.gate_up_proj"].shape == (layers - dense, experts, 2, *gate)
    assert gate == up


@pytest.mark.parametrize("name", ["tiny-v3", "tiny-v2", "tiny-v2lite", "tiny-kimi"])
def test_tiny_models_have_the_declared_layout(name):
    """The stacked layout written down a second time in tests.oracles has these names and shapes."""
    t = tiny(name)
    specs = {name: spec.shape for name, spec in named_leaves(model.param_specs(t.cfg))}
    assert specs == {name: value.shape for name, value in named_leaves(t.params)}


# ------------------------------------------------------------------ shapes of the true 671B model


def test_apply_of_the_671b_config():
    out = jax.eval_shape(
        functools.partial(model.apply, cfg=V3),
        model.abstract_params(V3),
        jax.ShapeDtypeStruct((2, 4096), jnp.int32),
    )
    assert (out.shape, out.dtype) == ((2, 4096, 129280), jnp.float32)


@pytest.mark.parametrize("form", ["absorbed", "expanded"])
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8", "fp8_tensor"])
def test_forward_of_the_671b_config(form, kv_dtype):
    i32 = lambda *shape: jax.ShapeDtypeStruct(shape, jnp.int32)  # noqa: E731
    cache = jax.eval_shape(
        lambda: init_cache(V3, num_pages=8, page_size=64, dtype=jnp.bfloat16, kv_dtype=kv_dtype)
    )
    arrays = (i32(128, 2), i32(128, 4), i32(128))

    def step(weights, cache, *arrays):
        batch = RaggedBatch.uniform(*arrays, form)
        hidden, after = paged.forward(weights, cache, batch, cfg=V3)
        h, last = paged.forward_mtp(weights, after, batch, hidden, cfg=V3, module=0)
        return hidden, after, h, last

    hidden, after, h, last = jax.eval_shape(step, model.abstract_params(V3), cache, *arrays)
    assert (hidden.shape, hidden.dtype) == ((256, 7168), jnp.bfloat16)
    assert cache == after == last
    assert h == hidden


def test_cache_bytes_per_token():
    """62 layers, 71424 B in bf16; fp8 latents with 4 fp32 scales, 656 B a layer."""

    def size(kv_dtype):
        cache = jax.eval_shape(
            lambda: init_cache(V3, num_pages=1, page_size=1, dtype=jnp.bfloat16, kv_dtype=kv_dtype)
        )
        return sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache))

    assert (size("auto"), size("fp8")) == (71424, 62 * 656)


@pytest.mark.parametrize(
    ("options", "match"),
    [
        ({"num_pages": 0}, "num_pages=0"),
        ({"page_size": 0}, "page_size"),
        ({"kv_dtype": "int8"}, "'int8'"),
    ],
)
def test_cache_refuses(options, match):
    sizes = {"num_pages": 1, "page_size": 1, "dtype": jnp.float32} | options
    with pytest.raises(ValueError, match=match):
        init_cache(tiny().cfg, **sizes)


# ------------------------------------------------------------------ init


SMALL = {
    "a": {"x": params.WeightSpec((64, 400), ("embed", "mlp"), "normal")},
    "b": {"x": params.WeightSpec((64, 400), ("embed", "mlp"), "normal")},
    "n": params.WeightSpec((7,), ("embed",), "ones"),
    "z": params.WeightSpec((7,), ("experts",), "zeros", "float32"),
}


def test_initial_values():
    values = params.initialise(SMALL, jax.random.key(0), jnp.bfloat16)
    assert values["a"]["x"].dtype == jnp.bfloat16 and values["z"].dtype == jnp.float32
    assert (values["n"] == 1).all() and (values["z"] == 0).all()
    spread = np.float64(values["a"]["x"]).std()
    assert spread == pytest.approx(0.5 * 400**-0.5, rel=0.02)
    assert (values["a"]["x"] != values["b"]["x"]).mean() > 0.9


def test_a_weight_keeps_its_values_when_others_are_added():
    key = jax.random.key(0)
    all_of_them = params.initialise(SMALL, key, jnp.float32)
    alone = params.initialise({"b": SMALL["b"]}, key, jnp.float32, std=None)
    np.testing.assert_array_equal(alone["b"]["x"], all_of_them["b"]["x"])


def test_std_overrides():
    values = params.initialise({"a": SMALL["a"]}, jax.random.key(1), jnp.float32, std=0.006)
    assert float(values["a"]["x"].std()) == pytest.approx(0.006, rel=0.02)


def test_abstract_is_what_init_makes():
    cfg = tiny().cfg
    made = jax.eval_shape(lambda k: model.init(cfg, k, dtype=jnp.bfloat16), jax.random.key(0))
    assert made == model.abstract_params(cfg, jnp.bfloat16)
    bias = made["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"]
    assert bias.dtype == jnp.float32


def test_cast_keeps_fixed_dtypes_and_quantized_weights():
    values = params.initialise(SMALL, jax.random.key(0), jnp.float32)
    values["b"]["x"] = quantise(values["b"]["x"], quant.INT4_GROUP)
    out = params.cast(values, SMALL, jnp.bfloat16)
    assert out["a"]["x"].dtype == out["n"].dtype == jnp.bfloat16
    assert out["z"].dtype == jnp.float32
    assert out["b"]["x"] is values["b"]["x"]


# ------------------------------------------------------------------ bind and declare


def test_bind_reads_back_what_it_was_given():
    x = jnp.arange(4.0)
    module = bind(RmsNorm, {"weight": x}, 4, 1e-6, "embed")
    np.testing.assert_array_equal(module.weight[...], x)


@pytest.mark.parametrize("given", [{}, {"wait": 1}, {"weight": 1, "bias": 2}])
def test_bind_names_what_does_not_fit(given):
    with pytest.raises(ValueError, match="wait|bias|weight"):
        bind(RmsNorm, given, 4, 1e-6, "embed")


def test_forgetting_a_weight_of_a_model_names_it():
    t = tiny()
    attn = {k: v for k, v in t.params["moe_layers"]["self_attn"].items() if k != "o_proj"}
    broken = t.params | {"moe_layers": t.params["moe_layers"] | {"self_attn": attn}}
    with pytest.raises(ValueError, match="o_proj"):
        jax.eval_shape(lambda p: model.apply(p, jnp.asarray(t.tokens), cfg=t.cfg), broken)


@pytest.mark.parametrize(
    ("shape", "axes", "match"),
    [((2, 3), ("embed",), "1 axes"), ((2,), ("width",), "width.*known: batch")],
)
def test_weights_are_declared_with_known_axes(shape, axes, match):
    with pytest.raises(ValueError, match=match):
        weight(shape, axes=axes)


def test_specs_carry_axes_and_initialisers():
    specs = dict(named_leaves(model.param_specs(V3)))
    down = specs["moe_layers.mlp.experts.down_proj"]
    assert down.axes == ("layers", "experts", "expert_embed", "mlp") and down.init == "normal"
    assert specs["norm.weight"].init == "ones"
    bias = specs["mtp_layers.block.mlp.gate.e_score_correction_bias"]
    assert (bias.dtype, bias.init, bias.axes) == ("float32", "zeros", ("layers", None))
    assert specs_of(RmsNorm, 4, 1e-6, "embed") == {
        "weight": params.WeightSpec((4,), ("embed",), "ones")
    }


def test_tied_embeddings_have_no_head():
    cfg = dataclasses.replace(tiny("tiny-v2lite").cfg, tie_word_embeddings=True)
    assert "lm_head" not in model.param_specs(cfg)
    shared = {"embed_tokens": {"weight": jnp.eye(cfg.vocab_size, cfg.hidden_size)}}
    np.testing.assert_array_equal(
        model.head(shared, jnp.ones(cfg.hidden_size), cfg=cfg)[: cfg.hidden_size], 1
    )


def test_embedding_gradients_are_summed_in_fp32():
    """1000 places of one token in bf16, whose own sums stop at 256; ids outside count nowhere."""
    table = {"embed_tokens": {"weight": jnp.zeros((4, 2), jnp.bfloat16)}}
    ids = jnp.asarray([1] * 1000 + [3, 4])
    grad = jax.grad(lambda p: model.embed(p, ids).sum())(table)["embed_tokens"]["weight"]
    np.testing.assert_array_equal(np.float32(grad)[:, 0], [0, 1000, 0, 1])


def test_quantized_weights_are_one_leaf():
    q = quantise(jnp.ones((2, 128)), quant.INT4_GROUP)
    tree = {"a": q, "b": jnp.ones(3)}
    assert len(jax.tree.leaves(tree, is_leaf=params.is_weight)) == 2
