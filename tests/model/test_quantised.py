"""The model runs from quantised params as from the weights they stand for: whole sequences, MTP,
the paged cache, text, unstacked layers, a mesh.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import PartitionSpec

from dskjax import mesh, model
from dskjax.axes import Rules, Sharding
from dskjax.decode import generate
from dskjax.params import WeightSpec, cast, named_leaves, unstack
from dskjax.quantise import quantise
from pallas_kernels import QTensor
from pallas_kernels.testing import assert_close, assert_equal, jit
from tests.model.common import Pages, ragged, run_forward, run_forward_mtp
from tests.model.quantised import CFG, PRECISIONS, dequantised, plain, quantised, with_leaf
from tests.tolerances import LAYERS_IN_BF16, MODEL

TOKENS = np.random.default_rng(8).integers(0, CFG.vocab_size, (3, 17), np.int32)
IMPLS = ("reference", "xla")
PARTS = ("hidden", "logits", "experts", "h^1", "MTP logits", "MTP experts")
needs_8 = pytest.mark.devices(8)


@functools.cache
def forward(impl):
    """Compiled: (params, tokens [3, 17]) -> `PARTS`."""

    @jit
    def run(params, tokens):
        out = model.trunk(params, tokens, cfg=CFG, impl=impl)
        chain = model.mtp_chain(params, tokens, out.hidden, cfg=CFG, depths=1, impl=impl)
        logits = [model.head(params, h, cfg=CFG) for h in (out.hidden, chain.hidden[0])]
        parts = (out.hidden, logits[0], out.experts, chain.hidden[0], logits[1], chain.experts[0])
        return dict(zip(PARTS, parts, strict=True))

    return lambda params, tokens=TOKENS: run(params, jnp.asarray(tokens))


@functools.cache
def expected(precision, impl="reference"):
    return forward(impl)(dequantised(quantised(precision)))


def check(params, precision, impl="reference"):
    want = expected(precision, impl)
    for name, got in forward(impl)(params).items():
        if "experts" in name:
            assert_equal(got, want[name], name)
        else:
            assert_close(got, want[name], MODEL, name)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("precision", PRECISIONS)
def test_whole_sequences_and_mtp(precision, impl):
    check(quantised(precision), precision, impl)


def test_quantising_changes_the_logits():
    """What the tests above compare is not the unquantised model."""
    exact = np.asarray(forward("reference")(plain())["logits"])
    errors = [
        np.linalg.norm(expected(p)["logits"] - exact) / np.linalg.norm(exact) for p in PRECISIONS
    ]
    assert 0.01 < errors[0] < errors[1] < 1


@pytest.mark.parametrize("precision", PRECISIONS)
def test_bf16(precision):
    """`xla` rounds a weight to bf16 before its product, as an array would have been."""
    specs = model.param_specs(CFG)
    params = cast(quantised(precision), specs, jnp.bfloat16)
    hidden = forward("xla")(params)["h^1"]
    assert hidden.dtype == jnp.bfloat16
    want = forward("xla")(cast(dequantised(params), specs, jnp.bfloat16))["h^1"]
    assert_close(hidden, want, LAYERS_IN_BF16, "h^1")


# ------------------------------------------------------------------ planted bugs


def _swap_gate_and_up(q):
    return dataclasses.replace(q, scales=q.scales[..., ::-1, :, :])


def _roll(axis):
    return lambda q: dataclasses.replace(q, scales=jnp.roll(q.scales, 1, axis=axis))


def _transpose(q):
    square = q.scales.swapaxes(-1, -2)  # as many blocks as before, read along the other axis
    return dataclasses.replace(q, scales=square.reshape(q.scales.shape))


def _high_nibble_first(q):
    return dataclasses.replace(q, values=(q.values >> 4) | (q.values << 4))


BUGS = {
    "scales of the next block of columns": ("dense_layers.self_attn.o_proj", _roll(-1)),
    "scales of the next block of rows": ("dense_layers.self_attn.kv_b_proj", _roll(-2)),
    "scales transposed": ("dense_layers.mlp.gate_up_proj", _transpose),
    "scales of another expert": ("moe_layers.mlp.experts.down_proj", _roll(1)),
    "scales of another layer": ("moe_layers.mlp.experts.gate_up_proj", _roll(0)),
    "scales of up at gate": ("moe_layers.mlp.shared_experts.gate_up_proj", _swap_gate_and_up),
    "nibbles exchanged": ("moe_layers.mlp.experts.gate_up_proj", _high_nibble_first),
    "scales of the next group in MTP": ("mtp_layers.block.mlp.experts.down_proj", _roll(-1)),
}


@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug):
    path, change = BUGS[bug]
    with pytest.raises(AssertionError):
        check(with_leaf(quantised("w4afp8"), path, change), "w4afp8")


# ------------------------------------------------------------------ the paged cache


@pytest.mark.parametrize(("precision", "impl"), [("fp8", "xla"), ("w4afp8", "reference")])
def test_paged_forward(precision, impl):
    """A prefill, then a decode step, through the trunk and the MTP module."""
    params, pages, want = quantised(precision), Pages.make(CFG), expected(precision)
    for done, new, form in (([0, 0, 0], [5, 4, 3], "expanded"), ([5, 4, 3], [1, 1, 1], "absorbed")):
        step = functools.partial(ragged, pages, done=done, new=new, size=sum(new), form=form)
        hidden, cache = run_forward(CFG, impl)(params, pages.cache, step(tokens=TOKENS))
        following = step(tokens=TOKENS[:, 1:])
        h, pages.cache = run_forward_mtp(CFG)(params, cache, following, hidden, 0)
        rows = [
            (b, d + i) for b, (d, n) in enumerate(zip(done, new, strict=True)) for i in range(n)
        ]
        for name, got in (("hidden", hidden), ("h^1", h)):
            assert_close(got, np.stack([want[name][at] for at in rows]), MODEL, f"{form} {name}")


PROMPT = 5
"""Tokens of each prompt; the rest of a row of `TOKENS` is as long as the text."""


def continue_prompts(params):
    """[3, 12] greedy tokens after the prompts, two drafts a step."""
    prompts, count = TOKENS[:, :PROMPT].tolist(), TOKENS.shape[1] - PROMPT
    result = generate(
        params, CFG, prompts, max_tokens=count, drafts=2, accept="strict", ignore_eos=True
    )
    assert result.ties == 0
    return np.array(result.tokens, np.int32)


@functools.cache
def text(precision):
    return continue_prompts(quantised(precision))


@pytest.mark.parametrize("precision", PRECISIONS)
def test_greedy_text(precision):
    """Every new token is the best one of the dequantised model after all before it."""
    rows = np.concatenate([TOKENS[:, :PROMPT], text(precision)], axis=1)
    logits = forward("reference")(dequantised(quantised(precision)), rows)["logits"]
    assert_equal(text(precision), np.int32(logits[:, PROMPT - 1 : -1].argmax(-1)))


def test_precisions_differ_in_text():
    assert (text("fp8") != text("w4afp8")).any()


# ------------------------------------------------------------------ unstacked layers


@pytest.mark.parametrize("precision", PRECISIONS)
def test_unstack(precision):
    """Every layer's values and scales are arrays of their own."""
    params = quantised(precision)
    separate = unstack(params)
    for group, count in (("dense_layers", 1), ("moe_layers", 2), ("mtp_layers", 1)):
        assert isinstance(separate[group], tuple) and len(separate[group]) == count
        for i, layer in enumerate(separate[group]):
            want = jax.tree.map(lambda x, i=i: x[i], params[group])
            assert jax.tree.structure(layer) == jax.tree.structure(want)
            jax.tree.map(assert_equal, layer, want)
    assert unstack(separate)["moe_layers"] is separate["moe_layers"]


def test_unstacked_layers_give_the_same_text():
    assert_equal(continue_prompts(unstack(quantised("w4afp8"))), text("w4afp8"))


# ------------------------------------------------------------------ a mesh


@functools.cache
def devices_2_2_2():
    return mesh.make_mesh(dp=2, ep=2, tp=2, devices=jax.devices()[:8])


def place(name, precision):
    sharding = mesh.preset(name, devices_2_2_2())
    params = jax.tree.map(np.asarray, quantised(precision))
    return jax.device_put(params, sharding.params(model.param_specs(CFG), params))


@needs_8
@pytest.mark.parametrize("precision", PRECISIONS)
@pytest.mark.parametrize("name", ["tensor", "fsdp", "train"])
def test_a_mesh(name, precision):
    params = place(name, precision)
    down = dict(named_leaves(params))["moe_layers.mlp.experts.down_proj"]
    split = {"tensor": (None, "tp"), "fsdp": (("dp", "ep"), None), "train": ("dp", "tp")}
    assert tuple(down.values.sharding.spec)[-2:] == split[name]
    check(params, precision)


@needs_8
def test_quantising_on_a_mesh_gives_the_same_bits():
    sharding = mesh.preset("train", devices_2_2_2())
    placed = jax.device_put(
        jax.tree.map(np.asarray, plain()), sharding.params(model.param_specs(CFG))
    )
    jax.tree.map(assert_equal, quantise(placed, "w4afp8"), quantised("w4afp8"))


def shapes_of(shape, block):
    int4 = block[0] == 1
    *lead, n, k = shape
    return QTensor(
        jax.ShapeDtypeStruct((*lead, n, k // 2 if int4 else k), jnp.uint8),
        jax.ShapeDtypeStruct((*lead, -(-n // block[0]), -(-k // block[1])), jnp.float32),
        block,
        "int4" if int4 else "e4m3",
    )


@needs_8
@pytest.mark.parametrize(
    ("shape", "block", "told"),
    [
        ((2, 256, 768), (128, 128), ["dp=2 * ep=2", "'embed'", "e4m3", "768", "192", "1, 2, 3, 6"]),
        ((2, 384, 512), (128, 128), ["w: tp=2", "'heads'", "384", "192", "128", "one of 1, 3"]),
        ((2, 130, 256), (1, 128), ["dp=2 * ep=2", "int4", "256", "parts of 64", "one of 1, 2"]),
    ],
)
def test_a_split_inside_a_block_is_refused(shape, block, told):
    sharding = Sharding(devices_2_2_2(), Rules.make({"heads": "tp", "embed": ("dp", "ep")}))
    with pytest.raises(ValueError, match=r"^a\.w: ") as caught:
        sharding.params(
            {"a": {"w": WeightSpec(shape, ("layers", "heads", "embed"), "normal")}},
            {"a": {"w": shapes_of(shape, block)}},
        )
    assert not [part for part in told if part not in str(caught.value)]


@needs_8
@pytest.mark.parametrize(
    ("shape", "block", "scales"),
    [
        ((2, 512, 512), (128, 128), (None, "tp", ("dp", "ep"))),  # whole blocks in every part
        ((2, 128, 512), (128, 128), (None, None, ("dp", "ep"))),  # one block of rows
        ((2, 130, 512), (1, 128), (None, "tp", ("dp", "ep"))),  # a scale a row
        ((2, 130, 330), (1, 128), (None, "tp", None)),  # three groups, the last cut off
        ((2, 256, 320), (128, 128), (None, "tp", None)),  # the same with blocks of rows
    ],
)
def test_scales_are_split_on_whole_blocks_only(shape, block, scales):
    sharding = Sharding(devices_2_2_2(), Rules.make({"heads": "tp", "embed": ("dp", "ep")}))
    q = shapes_of(shape, block)
    placed = sharding.quantised(("layers", "heads", "embed"), q, "w")
    assert placed.scales.spec == PartitionSpec(*scales)
    columns = ("dp", "ep") if q.values.shape[-1] % 4 == 0 else None
    assert placed.values.spec == PartitionSpec(None, "tp", columns)
    assert (placed.block, placed.format) == (q.block, q.format)
