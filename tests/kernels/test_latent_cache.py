"""`LatentCache`: rows land where they should, and nowhere else."""

import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import LatentCache, dequantise, quant, quantise
from pallas_kernels.latent_cache import gather_rows, write_rows
from pallas_kernels.testing import assert_equal, jit

LAYERS, PAGES, PAGE, C, P = 2, 3, 4, 160, 6
WRITE = jit(write_rows)


def make_cache(fp8=False):
    rng = np.random.default_rng(0)
    latent = jnp.asarray(rng.standard_normal((LAYERS, PAGES, PAGE, C)), jnp.float32)
    rope = jnp.asarray(rng.standard_normal((LAYERS, PAGES, PAGE, P)), jnp.float32)
    if not fp8:
        return LatentCache(latent, rope)
    q = quantise(latent, quant.FP8_TILE)
    return LatentCache(q.values, rope, q.scales)


def rows(count):
    rng = np.random.default_rng(1)
    return (jnp.asarray(rng.standard_normal((count, n)), jnp.float32) for n in (C, P))


def i32(*values):
    return jnp.asarray(values, jnp.int32)


def check_write(write, cache, pages, slots):
    """Exactly the rows with a page of the pool change; negative ids do not count from the end."""
    latent, rope = rows(len(pages))
    got = write(cache, 1, latent, rope, i32(*pages), i32(*slots))
    new = quantise(latent, quant.FP8_TILE) if cache.scale is not None else None
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


@pytest.mark.parametrize("fp8", [False, True])
def test_write_rows(fp8):
    check_write(WRITE, make_cache(fp8), (2, -1, 0, 3, 2147480000, -3, 1), (3, 0, 1, 2, 0, 1, 0))


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


@pytest.mark.parametrize("fp8", [False, True])
def test_gather_rows_follows_the_table(fp8):
    cache = make_cache(fp8)
    table = i32(2, 0, 1, 2147480000, -5, 1).reshape(2, 3)
    latent, rope = gather_rows(cache, 1, table)
    real = cache.latent
    if cache.scale is not None:
        real = dequantise(quant.QTensor(cache.latent, cache.scale, (1, 128), "e4m3"))
    for row, ids in enumerate([(2, 0, 1), (2, 0, 1)]):  # ids outside the pool are clamped
        assert_equal(latent[row], np.concatenate([real[1, i] for i in ids]))
        assert_equal(rope[row], np.concatenate([cache.rope[1, i] for i in ids]))


def test_sizes():
    cache = make_cache()
    assert (cache.page_size, cache.num_pages) == (PAGE, PAGES)
