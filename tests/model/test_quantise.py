"""`quantise`: which leaves, in which format, with what error; bounded memory."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest

import dskjax
from dskjax import model, params, presets
from dskjax.params import named_leaves, nbytes, unstack
from dskjax.quantise import quantise, quantise_leaf, recipe_of
from pallas_kernels import QTensor, dequantise
from pallas_kernels.quant import FP8_BLOCK, INT4_GROUP
from pallas_kernels.testing import assert_equal
from tests.model.quantised import CFG, PRECISIONS, plain, quantised

KEPT = {
    "embed_tokens.weight",
    "lm_head.weight",
    "norm.weight",
    "moe_layers.mlp.gate.weight",
    "moe_layers.mlp.gate.e_score_correction_bias",
    "mtp_layers.eh_proj",
    "mtp_layers.enorm.weight",
    "mtp_layers.block.self_attn.kv_a_layernorm.weight",
    "mtp_layers.block.mlp.gate.weight",
}


@pytest.mark.parametrize("precision", PRECISIONS)
def test_every_linear_weight_and_no_other(precision):
    """Weights named one by one: every matrix but embedding, head, gates and eh_proj."""
    leaves = dict(named_leaves(quantised(precision)))
    kept = {path for path, leaf in leaves.items() if not isinstance(leaf, QTensor)}
    assert kept > KEPT
    assert {path.rpartition(".")[2] for path in kept} == {
        "weight",
        "e_score_correction_bias",
        "eh_proj",
    }
    int4 = {path for path, leaf in leaves.items() if getattr(leaf, "format", "") == "int4"}
    routed = {
        f"{layers}.mlp.experts.{part}"
        for layers in ("moe_layers", "mtp_layers.block")
        for part in ("gate_up_proj", "down_proj")
    }
    assert int4 == (routed if precision == "w4afp8" else set())
    before = dict(named_leaves(plain()))
    assert all(leaves[path] is before[path] for path in kept), "kept leaves are not copied"


@pytest.mark.parametrize("name", presets.PRESETS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_shapes_of_every_model(name, precision):
    """Values keep their shape, scales have ceil(N / block) by ceil(K / block) a matrix."""
    cfg = presets.preset(name)
    before = dict(named_leaves(model.abstract_params(cfg)))
    out = jax.eval_shape(lambda p: quantise(p, precision), model.abstract_params(cfg))
    for path, leaf in named_leaves(out):
        assert leaf.shape == before[path].shape, path
        if isinstance(leaf, QTensor):
            *lead, n, k = leaf.shape
            bn, bk = (1, 128) if leaf.format == "int4" else (128, 128)
            assert leaf.scales.shape == (*lead, -(-n // bn), -(-k // bk)), path
            assert leaf.scales.dtype == jnp.float32
        else:
            assert leaf.dtype == before[path].dtype


def test_scales_of_cut_blocks():
    """kv_a of DeepSeek-V3 has 576 rows: five row blocks, the last of 64."""
    cfg = presets.deepseek_v3()
    out = jax.eval_shape(lambda p: quantise(p, "fp8"), model.abstract_params(cfg))
    kv_a = out["moe_layers"]["self_attn"]["kv_a_proj_with_mqa"]
    assert kv_a.scales.shape == (58, 5, 56)
    ragged = quantised("w4afp8")["moe_layers"]["mlp"]["experts"]["down_proj"]
    assert ragged.values.shape == (2, 8, 160, 72) and ragged.scales.shape == (2, 8, 160, 2)


# ------------------------------------------------------------------ error

# e4m3 has 3 mantissa bits: half a step is 2^-4 of a value, at least 2^-10 of amax / 448. int4 is
# off by half a step of amax / 7.
ERROR = {
    "e4m3": lambda x, amax: np.maximum(2.0**-4 * np.abs(x), 2.0**-10 * amax / 448),
    "int4": lambda x, amax: amax / 14,
}
RMS = {"e4m3": (0.020, 0.030), "int4": (0.085, 0.125)}
"""Relative error in the 2-norm of normal weights, from below too: something must be lost."""


def block_amax(x, block):
    *lead, n, k = x.shape
    (bn, bk), out = block, np.empty(x.shape)
    for i in range(0, n, bn):
        for j in range(0, k, bk):
            at = (..., slice(i, i + bn), slice(j, j + bk))
            out[at] = np.abs(x[at]).max((-2, -1), keepdims=True)
    return out


def check_error(q, x):
    x, error = np.float64(x), np.float64(dequantise(q)) - np.float64(x)
    limit = ERROR[q.format](x, block_amax(x, q.block))
    assert (np.abs(error) <= limit * (1 + 1e-5)).all()
    low, high = RMS[q.format]
    assert low < np.linalg.norm(error) / np.linalg.norm(x) < high


@pytest.mark.parametrize("precision", PRECISIONS)
def test_error_of_every_weight_is_bounded(precision):
    before = dict(named_leaves(plain()))
    for path, leaf in named_leaves(quantised(precision)):
        if isinstance(leaf, QTensor):
            check_error(leaf, before[path])


@pytest.mark.parametrize("precision", PRECISIONS)
def test_rounding_has_no_bias(precision):
    """Errors cancel: their mean is that of chance, and they neither shrink nor stretch weights."""
    before = dict(named_leaves(plain()))
    for path, leaf in named_leaves(quantised(precision)):
        if isinstance(leaf, QTensor):
            check_bias(dequantise(leaf), before[path], path)


def check_bias(real, x, path):
    x, error = np.float64(x), np.float64(real) - np.float64(x)
    assert abs(error.mean()) < 4 * error.std() / np.sqrt(error.size), path
    assert abs((error * x).sum() / (x * x).sum()) < 4e-3, path


def test_suite_sees_rounding_down():
    x = np.float64(plain()["dense_layers"]["self_attn"]["o_proj"])
    step = block_amax(x, (1, 128)) / 7
    check_bias(np.rint(x / step) * step, x, "nearest")
    for wrong in (np.floor, np.trunc):
        with pytest.raises(AssertionError):
            check_bias(wrong(x / step) * step, x, "down")


@pytest.mark.parametrize("recipe", [FP8_BLOCK, INT4_GROUP], ids=lambda r: r.format)
def test_suite_sees_truncation_and_neighbouring_scales(recipe):
    x = plain()["dense_layers"]["self_attn"]["o_proj"]
    q = quantise_leaf(x, recipe)
    check_error(q, x)
    away = jnp.sign(x) * q.scales.min()  # a step towards zero before rounding
    with pytest.raises(AssertionError):
        check_error(quantise_leaf(x - away * (1 if recipe.format == "int4" else 8), recipe), x)
    rolled = QTensor(q.values, jnp.roll(q.scales, 1, axis=-1), q.block, q.format)
    with pytest.raises(AssertionError):
        check_error(rolled, x)


# ------------------------------------------------------------------ from quantised params


@pytest.mark.parametrize("precision", PRECISIONS)
def test_what_is_in_the_format_stays(precision):
    once = dict(named_leaves(quantised(precision)))
    twice = dict(named_leaves(quantise(quantised(precision), precision)))
    assert once.keys() == twice.keys()
    assert all(twice[path] is leaf for path, leaf in once.items())


def test_int4_from_fp8_goes_through_bf16():
    """FP8 -> fp32 -> bf16 -> int4: without the rounding to bf16 some scales differ."""
    fp8, w4 = quantised("fp8"), quantise(quantised("fp8"), "w4afp8")
    experts, q = (p["moe_layers"]["mlp"]["experts"]["down_proj"] for p in (fp8, w4))
    via_bf16 = quantise_leaf(dequantise(experts, jnp.bfloat16), INT4_GROUP)
    jax.tree.map(assert_equal, q, via_bf16)
    direct = quantise_leaf(dequantise(experts), INT4_GROUP)
    assert (direct.scales != q.scales).mean() > 0.5
    assert w4["moe_layers"]["self_attn"]["o_proj"] is fp8["moe_layers"]["self_attn"]["o_proj"]


def test_unstacked_params_quantise_to_the_same_bits():
    """Matrix by matrix: a scale sees nothing of other layers and experts."""
    stacked, separate = unstack(quantised("w4afp8")), quantise(unstack(plain()), "w4afp8")
    assert jax.tree.structure(stacked) == jax.tree.structure(separate)
    jax.tree.map(assert_equal, stacked, separate)


def test_memory_is_a_few_matrices():
    """Temporaries of 48 matrices of 256x512: the fp32 copy of all would be 25 MB, of one 0.5."""
    weight = jax.ShapeDtypeStruct((6, 8, 256, 512), jnp.bfloat16)
    for recipe in (FP8_BLOCK, INT4_GROUP):
        used = quantise_leaf.lower(weight, recipe).compile().memory_analysis()
        assert used.temp_size_in_bytes < 4 * 4 * 256 * 512 + used.output_size_in_bytes


def test_bytes():
    """A byte a weight and 4 for each 128 x 128; half a byte and 4 for each 128."""
    specs = {"dense_layers": {"o_proj": jax.ShapeDtypeStruct((3, 512, 384), jnp.bfloat16)}}
    assert nbytes(specs) == 2 * 3 * 512 * 384
    fp8 = jax.eval_shape(lambda p: quantise(p, "fp8"), specs)
    assert nbytes(fp8) == 3 * (512 * 384 + 4 * 4 * 3)
    experts = {"experts": specs["dense_layers"] | {"down_proj": specs["dense_layers"]["o_proj"]}}
    int4 = jax.eval_shape(lambda p: quantise(p, "w4afp8"), experts)
    assert nbytes(int4) == 2 * 3 * (512 * 192 + 4 * 512 * 3)


# ------------------------------------------------------------------ refusals


def test_refusals():
    with pytest.raises((ValueError, TypeError), match="int3"):
        quantise(plain(), "int3")
    with pytest.raises(ValueError, match="'norm'.*no linear weight"):
        quantise({"norm": plain()["norm"]}, "fp8")
    odd = {"moe_layers": {"experts": {"down_proj": jnp.ones((2, 4, 7))}}}
    with pytest.raises(ValueError, match=r"moe_layers.experts.down_proj.*\(2, 4, 7\).*fp8"):
        quantise(odd, "w4afp8")


def test_recipe_of_a_leaf():
    experts = ("moe_layers", "mlp", "experts", "down_proj")
    assert recipe_of(experts, "w4afp8") == INT4_GROUP and recipe_of(experts, "fp8") == FP8_BLOCK
    assert recipe_of(("moe_layers", "mlp", "shared_experts", "down_proj"), "w4afp8") == FP8_BLOCK
    assert recipe_of(("mtp_layers", "eh_proj"), "fp8") is None


def test_it_is_exported():
    assert dskjax.quantise is quantise


def test_cast_leaves_quantised_weights_alone():
    cast = params.cast(quantised("fp8"), model.param_specs(CFG), jnp.bfloat16)
    assert cast["embed_tokens"]["weight"].dtype == jnp.bfloat16
    assert (
        cast["dense_layers"]["self_attn"]["o_proj"]
        is (quantised("fp8")["dense_layers"]["self_attn"]["o_proj"])
    )
