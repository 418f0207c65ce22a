"""Packed int4 weights of `grouped_matmul`: exactly what was packed, laid out as is promised."""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import QTensor
from pallas_kernels.grouped_matmul import packed_int4
from pallas_kernels.quant import pack_int4, unpack_int4

# As a loader would, and much faster.
pack = jax.jit(packed_int4.pack, static_argnames="full_range")
unpack = jax.jit(packed_int4.unpack)
ranges = pytest.mark.parametrize("full_range", [True, False])


def random(*shape, seed=0, lowest=-8):
    """Every value from `lowest` on, and scales from denormal to huge."""
    rng = np.random.default_rng(seed)
    values = pack_int4(jnp.asarray(rng.integers(lowest, 8, shape, np.int8)))
    scales = np.exp2(rng.uniform(-140, 120, (*shape[:-1], shape[-1] // 128))).astype(np.float32)
    return QTensor(jnp.asarray(values), jnp.asarray(scales), (1, 128), "int4")


def check(w, back):
    np.testing.assert_array_equal(back.values, w.values)
    np.testing.assert_array_equal(
        np.asarray(back.scales).view(np.uint32), np.asarray(w.scales).view(np.uint32)
    )
    assert (back.block, back.format, back.values.dtype) == (w.block, w.format, w.values.dtype)


@ranges
@pytest.mark.parametrize("shape", [(64, 128), (3, 2, 128, 256), (2, 192, 384)], ids=str)
def test_round_trip_is_exact(shape, full_range):
    w = random(*shape, lowest=-8 if full_range else -7)
    packed = pack(w, full_range=full_range)
    assert packed.full_range == packed[..., None].full_range == full_range
    assert (packed.shape, packed.ndim) == (shape, len(shape))
    assert packed.words.dtype == jnp.int32 and packed.scales.dtype == jnp.float32
    assert packed.words.nbytes == w.values.nbytes and packed.scales.nbytes == w.scales.nbytes
    check(w, unpack(packed))


@ranges
def test_a_tile_is_what_a_product_takes(full_range):
    """Words of a tile become 2^-9 of its weights, as e4m3: every value is exact."""
    w = random(2, 128, 256, lowest=-8 if full_range else -7)
    tile = pack(w, full_range=full_range).words[1, 1, 0]
    got = packed_int4.as_matrix(*packed_int4.as_e4m3(tile, full_range))
    want = unpack_int4(w.values)[1, 64:128, :128]
    assert got.dtype == jnp.float8_e4m3fn
    np.testing.assert_array_equal(got.astype(jnp.float32) / packed_int4.UNIT, want)


def test_the_lowest_weight_is_found():
    without = random(3, 64, 256, lowest=-7)
    assert not packed_int4.has_lowest(without)
    for column in (100, 101):
        values = unpack_int4(without.values).at[1, 5, column].set(-8)
        w = dataclasses.replace(without, values=pack_int4(values))
        assert packed_int4.has_lowest(w)
        with pytest.raises(AssertionError):
            check(w, unpack(pack(w, full_range=False)))


def test_check_sees_one_bit():
    w = random(64, 128)
    packed = pack(w)
    for row, column in ((0, 0), (7, 127)):
        words = packed.words.at[0, 0, row, column].set(packed.words[0, 0, row, column] ^ 1)
        with pytest.raises(AssertionError):
            check(w, unpack(dataclasses.replace(packed, words=words)))


def test_is_a_pytree_with_leading_axes():
    w = pack(random(3, 64, 128))
    second = jax.tree.map(lambda leaf: leaf[1], w)
    check(random(3, 64, 128)[1], unpack(second))


@pytest.mark.parametrize(
    ("w", "message"),
    [
        (random(32, 128), "not 32 and 128"),
        (dataclasses.replace(random(64, 128), block=(1, 64)), r"not int4 of \(1, 64\)"),
        (dataclasses.replace(random(64, 128), format="e4m3"), r"not e4m3 of \(1, 128\)"),
        (QTensor(jnp.zeros((64, 65), jnp.uint8), jnp.ones((64, 2)), (1, 128), "int4"), "and 130"),
    ],
)
def test_refuses_what_it_cannot_keep(w, message):
    with pytest.raises(ValueError, match=f"pack takes .*{message}"):
        pack(w)
