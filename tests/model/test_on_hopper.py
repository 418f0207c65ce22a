"""Whole steps of a model at the widths of published ones: with the kernels that `auto` takes on
Hopper they mean what they mean in plain JAX.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax import hopper, mesh, model, paged, presets
from dskjax.batch import RaggedBatch
from dskjax.cache import init_cache
from dskjax.config import MtpConfig
from dskjax.decode.ranks import Ranks
from dskjax.expert_parallel.place import place
from dskjax.expert_parallel.rebalance import Rebalancer
from dskjax.hopper import pack_experts, packed_shapes
from dskjax.layers import mla, mlp
from dskjax.params import is_weight, unstack
from dskjax.quantise import quantise
from pallas_kernels import QTensor, act_quant, dequantise, matmul
from pallas_kernels.grouped_matmul import PackedInt4
from pallas_kernels.grouped_matmul.packed_int4 import unpack
from pallas_kernels.testing import assert_close
from tests.tolerances import HOPPER_STEP

LENS = (130, 1, 700, 64)


def narrow(name, **experts):
    """Two layers of a published model with fewer experts and a small vocabulary."""
    cfg = presets.preset(name)
    return dataclasses.replace(
        cfg,
        vocab_size=512,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        mtp=MtpConfig(num_nextn_predict_layers=0),
        moe=dataclasses.replace(cfg.moe, **experts),
    )


V2_LITE = narrow("deepseek-v2-lite")
V3 = narrow("deepseek-v3", n_routed_experts=16, n_group=4, topk_group=2, num_experts_per_tok=4)


@functools.cache
def drawn(cfg, precision="bf16"):
    """Random params, in one program: op by op there would be several for every shape."""

    def make():
        params = model.init(cfg, jax.random.key(0), dtype=jnp.bfloat16)
        return params if precision == "bf16" else quantise(params, precision)

    return jax.jit(make)()


@functools.cache
def params_of(cfg, precision):
    params = drawn(cfg, precision)
    return pack_experts(params) if precision == "w4afp8" else params


def steps(cfg, params, impl, kv_dtype, queries=2):
    """Logits of `queries` last tokens of each sequence, the others prefilled; the lowered step."""
    width = -(-max(LENS) // 64)
    rng = np.random.default_rng(0)
    pages = rng.permutation(4 * width).astype(np.int32).reshape(4, width)
    cache = init_cache(
        cfg, num_pages=4 * width, page_size=64, dtype=jnp.bfloat16, kv_dtype=kv_dtype
    )
    tokens = rng.integers(0, cfg.vocab_size, (4, max(LENS)), np.int32)
    run = jax.jit(functools.partial(paged.forward, cfg=cfg, impl=impl))
    plain = jax.jit(functools.partial(paged.forward, cfg=cfg, impl="xla"))
    before = [max(length - queries, 0) for length in LENS]
    ids = np.concatenate([row[:n] for row, n in zip(tokens, before, strict=True)])
    prompt = RaggedBatch(
        *map(jnp.asarray, (ids, pages, np.int32(before), np.cumsum([0, *before], dtype=np.int32))),
        form="expanded",
    )
    _, cache = plain(params, cache, prompt)
    new = np.stack([row[n : n + queries] for row, n in zip(tokens, before, strict=True)])
    lens = jnp.asarray([n + queries for n in before])
    batch = RaggedBatch.uniform(jnp.asarray(new), jnp.asarray(pages), lens, "absorbed")
    hidden, _ = run(params, cache, batch)
    return model.head(params, hidden, cfg=cfg), run.lower(params, cache, batch).as_text()


def with_rows_in_e4m3(x, w, *, impl):
    """`matmul`, whose plain form takes rows as the kernel for Hopper does."""
    if impl == "xla" and isinstance(w, QTensor):
        x = dequantise(act_quant(x, impl="xla"), x.dtype)
    return matmul(x, w, impl=impl)


@pytest.mark.gpu
@pytest.mark.parametrize("kv_dtype", ["auto", "fp8"])
@pytest.mark.parametrize(
    ("cfg", "precision"),
    [(V2_LITE, "bf16"), (V3, "fp8"), (V3, "w4afp8")],
    ids=["v2-lite bf16", "v3 fp8", "v3 w4afp8"],
)
def test_kernels_of_hopper_give_the_step_of_plain_jax(cfg, precision, kv_dtype, monkeypatch):
    for layer in (mla, mlp):
        monkeypatch.setattr(layer, "matmul", with_rows_in_e4m3)
    params = params_of(cfg, precision)
    want, _ = steps(cfg, params, "xla", kv_dtype)
    got, text = steps(cfg, params, "auto", kv_dtype)
    calls = text.count("mosaic_gpu")
    # Attention; two products of experts, and the dense ones: eight forms of weights.
    assert calls >= (1 if precision == "bf16" else 11), calls
    assert_close(got, want, HOPPER_STEP[precision], "logits")


def small(hidden_size, moe_intermediate_size):
    moe = dataclasses.replace(
        V3.moe, moe_intermediate_size=moe_intermediate_size, n_routed_experts=8
    )
    return dataclasses.replace(
        presets.tiny_v3(), hidden_size=hidden_size, num_hidden_layers=2, moe=moe
    )


def test_packed_experts_are_the_same_experts():
    cfg = small(256, 128)
    params = drawn(cfg, "w4afp8")
    packed = pack_experts(params)
    assert isinstance(packed["moe_layers"]["mlp"]["experts"]["gate_up_proj"], PackedInt4)
    run = jax.jit(functools.partial(model.apply, cfg=cfg, impl="xla"))
    tokens = jnp.arange(24, dtype=jnp.int32).reshape(2, 12)
    np.testing.assert_array_equal(run(packed, tokens), run(params, tokens))


def with_lowest(w):
    """The weights of other quantizers: some are -8."""
    if not isinstance(w, QTensor) or w.format != "int4":
        return w
    return dataclasses.replace(w, values=w.values.at[..., 0].set(0x88))


def test_the_lowest_weights_are_kept():
    cfg = small(256, 128)
    params = drawn(cfg, "w4afp8")
    lowest = jax.tree.map(with_lowest, params, is_leaf=is_weight)
    for given, full_range in ((params, False), (lowest, True)):
        packed = pack_experts(given)["moe_layers"]["mlp"]["experts"]["down_proj"]
        assert packed.full_range == full_range
        want = given["moe_layers"]["mlp"]["experts"]["down_proj"]
        np.testing.assert_array_equal(unpack(packed).values, want.values)


@pytest.mark.devices(8)
@pytest.mark.parametrize("unroll", [False, True])
def test_devices_pack_the_experts_they_have(unroll):
    cfg = small(256, 128)
    params = drawn(cfg, "w4afp8")
    params = unstack(params) if unroll else params
    want = pack_experts(params)
    ranks = Ranks(mesh.preset("decode", mesh.make_mesh(dp=2, ep=4)))
    shardings = functools.partial(ranks.weights, cfg=cfg)
    got = pack_experts(jax.device_put(params, shardings(params)), shardings)
    jax.tree.map(np.testing.assert_array_equal, got, want)  # and the same tree
    words = [x for x in jax.tree.leaves(got) if x.dtype == jnp.int32 and x.ndim >= 5]
    assert words
    for x in words:
        assert x.addressable_shards[0].data.size * 4 == x.size


@pytest.mark.devices(8)
def test_packed_experts_move_between_devices():
    cfg = small(256, 128)
    params = quantise(model.init(cfg, jax.random.key(0), dtype=jnp.bfloat16), "w4afp8")
    where = mesh.preset("decode", mesh.make_mesh(dp=2, ep=4))
    order = np.random.default_rng(0).permutation(16).astype(np.int32) % 8
    moved = []
    for early in (True, False):
        slots, with_slots = place(params, cfg, redundant=8, sharding=where)
        shardings = functools.partial(Ranks(where).weights, cfg=with_slots)
        slots = pack_experts(slots, shardings) if early else slots
        mover = Rebalancer(slots, with_slots, where)
        slots = mover.commit(slots, mover.fetch(slots, "moe_layers", 0, order))
        moved.append(slots if early else pack_experts(slots, shardings))
    jax.tree.map(np.testing.assert_array_equal, *moved)
    original = pack_experts(params)["moe_layers"]["mlp"]["experts"]["down_proj"].words
    found = moved[0]["moe_layers"]["mlp"]["experts"]["down_proj"].words
    np.testing.assert_array_equal(found, np.asarray(original)[:, order])


@pytest.mark.devices(4)
def test_parts_of_packed_weights_are_whole_tiles():
    params = drawn(small(256, 128), "w4afp8")
    packed = packed_shapes(params)["moe_layers"]["mlp"]["experts"]["down_proj"]
    where = mesh.preset("prefill", mesh.make_mesh(tp=4, devices=jax.devices()[:4]))
    with pytest.raises(ValueError, match=r"tp=4 .*'mlp' axis .*128, into parts of 32.*one of 1$"):
        where.packed(("layers", "experts", "embed", "mlp"), packed, "down_proj")
    halves = mesh.preset("fsdp", mesh.make_mesh(dp=2, devices=jax.devices()[:2]))
    found = halves.packed(("layers", "experts", "embed", "mlp"), packed, "down_proj")
    assert found.words.spec[2] == ("dp", "ep")


def of_32_inputs(w):
    if not isinstance(w, QTensor) or w.format != "int4":
        return w
    return dataclasses.replace(w, scales=jnp.repeat(w.scales, 4, axis=-1), block=(1, 32))


def test_they_are_packed_only_where_kernels_read_them(monkeypatch):
    fits, ragged = (drawn(small(*size), "w4afp8") for size in ((256, 128), (256, 96)))
    assert hopper.pack_where_read(fits) is fits  # on a CPU
    for name in ("no_hopper", "whole_arrays_only"):
        monkeypatch.setattr(hopper, name, lambda: None)
    packed = hopper.pack_where_read(fits)
    assert isinstance(packed["moe_layers"]["mlp"]["experts"]["down_proj"], PackedInt4)
    assert hopper.pack_where_read(ragged) is ragged
    finer = jax.tree.map(of_32_inputs, fits, is_leaf=is_weight)
    assert hopper.pack_where_read(finer) is finer
    plain = drawn(small(256, 128))
    assert hopper.pack_where_read(plain) is plain


def test_what_cannot_be_packed_is_named():
    cfg = small(160, 96)
    with pytest.raises(ValueError, match="no routed experts in int4"):
        pack_experts(drawn(cfg))
    with pytest.raises(ValueError, match=r"experts\.\w+_proj: .*multiples of 64 outputs"):
        pack_experts(drawn(cfg, "w4afp8"))
