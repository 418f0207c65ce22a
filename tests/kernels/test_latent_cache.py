"""`LatentCache`: rows land where they should, and nowhere else."""

import dataclasses
import typing

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import LatentCache, dequantise, quant, quantise
from pallas_kernels.latent_cache import Format, gather_rows, write_rows
from pallas_kernels.testing import assert_equal, jit
from tests.oracles import formats

FORMATS = typing.get_args(Format)
LAYERS, PAGES, PAGE, C, P = 2, 3, 4, 160, 6
WRITE = jit(write_rows)


SCALE = 2.0**-8
"""Of the layer that is written: the largest value e4m3 then holds is 1.75, so some are cut."""


def make_cache(kv="auto"):
    rng = np.random.default_rng(0)
    latent = jnp.asarray(rng.standard_normal((LAYERS, PAGES, PAGE, C)), jnp.float32)
    rope = jnp.asarray(rng.standard_normal((LAYERS, PAGES, PAGE, P)), jnp.float32)
    if kv == "auto":
        return LatentCache(latent, rope)
    if kv == "fp8_tensor":
        scale = jnp.asarray([1.0, SCALE], jnp.float32)
        return LatentCache(*(jnp.asarray(to_e4m3(x, 1.0)) for x in (latent, rope)), scale)
    q = quantise(latent, quant.FP8_TILE)
    return LatentCache(q.values, rope, q.scales)


def rows(count):
    rng = np.random.default_rng(1)
    return (jnp.asarray(rng.standard_normal((count, n)), jnp.float32) for n in (C, P))


def to_e4m3(x, scale):
    """By the oracle, which saturates."""
    return formats.to_e4m3(np.asarray(x) / scale).view(jnp.float8_e4m3fn)


def i32(*values):
    return jnp.asarray(values, jnp.int32)


def check_write(write, cache, pages, slots):
    """Exactly the rows with a page of the pool change; negative ids do not count from the end."""
    latent, rope = rows(len(pages))
    got = write(cache, 1, latent, rope, i32(*pages), i32(*slots))
    if cache.format == "fp8_tensor":
        latent, rope = (to_e4m3(x, SCALE) for x in (latent, rope))
    new = quantise(latent, quant.FP8_TILE) if cache.format == "fp8" else None
    want = {
        "latent": (cache.latent, latent if new is None else new.values),
        "rope": (cache.rope, rope),
    }
    if new is not None:
        want["scale"] = (cache.scale, new.scales)
    for name, (old, value) in want.items():
        expected = np.array(old)
        for i, (page, slot) in enumerate(zip(pages, slots, strict=True)):
            if 0 <= page < PAGES:
                expected[1, page, slot] = value[i]
        assert_equal(getattr(got, name), expected, name)


@pytest.mark.parametrize("kv", FORMATS)
def test_write_rows(kv):
    check_write(WRITE, make_cache(kv), (2, -1, 0, 3, 2147480000, -3, 1), (3, 0, 1, 2, 0, 1, 0))


def test_suite_sees_values_that_are_not_cut():
    def overflowing(cache, layer, latent, rope, pages, slots):
        got = WRITE(cache, layer, latent, rope, pages, slots)
        raw = (latent / cache.scale[layer]).astype(jnp.float8_e4m3fn)
        return dataclasses.replace(got, latent=got.latent.at[layer, pages, slots].set(raw))

    with pytest.raises(AssertionError, match="latent"):
        check_write(overflowing, make_cache("fp8_tensor"), (2, 0), (1, 3))


def test_suite_sees_negative_pages_wrap():
    def wrapping(cache, layer, latent, rope, pages, slots):
        at = (layer, pages, slots)
        return LatentCache(
            cache.latent.at[at].set(latent, mode="drop"), cache.rope.at[at].set(rope, mode="drop")
        )

    check_write(wrapping, make_cache(), (2, 0), (1, 3))
    with pytest.raises(AssertionError):
        check_write(wrapping, make_cache(), (2, -1), (1, 3))


def test_writes_happen_in_place_under_donation():
    cache = make_cache()
    before = cache.latent.unsafe_buffer_pointer()
    latent, rope = rows(1)
    after = jit(write_rows, donate_argnums=0)(cache, 1, latent, rope, i32(0), i32(0))
    assert cache.latent.is_deleted() and after.latent.unsafe_buffer_pointer() == before


@pytest.mark.parametrize("kv", FORMATS)
def test_gather_rows_follows_the_table(kv):
    cache = make_cache(kv)
    table = i32(2, 0, 1, 2147480000, -5, 1).reshape(2, 3)
    latent, rope = gather_rows(cache, 1, table)
    real, keys = cache.latent, cache.rope
    if cache.format == "fp8_tensor":
        real, keys = (
            (formats.from_e4m3(np.asarray(x).view(np.uint8)) * SCALE).astype(np.float32)
            for x in (cache.latent, cache.rope)
        )
    elif cache.scale is not None:
        real = dequantise(quant.QTensor(cache.latent, cache.scale, (1, 128), "e4m3"))
    for row, ids in enumerate([(2, 0, 1), (2, 0, 1)]):  # ids outside the pool are clamped
        assert_equal(latent[row], np.concatenate([real[1, i] for i in ids]))
        assert_equal(rope[row], np.concatenate([keys[1, i] for i in ids]))


@pytest.mark.parametrize(
    ("kv", "token"), [("auto", 4 * (C + P)), ("fp8", C + 4 * 2 + 4 * P), ("fp8_tensor", C + P)]
)
def test_sizes(kv, token):
    cache = make_cache(kv)
    assert cache.format == kv
    assert (cache.page_size, cache.num_pages) == (PAGE, PAGES)
    assert cache.page_bytes == LAYERS * PAGE * token
