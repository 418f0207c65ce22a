"""`norm_rope_cache`: norms, rotation and the write against a float64 oracle, whatever stands in the
pool; bugs the suite sees, lowering for CUDA, and runs on a GPU.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import Phase, given, settings
from hypothesis import strategies as st

from pallas_kernels import LatentCache, norm_rope_cache
from pallas_kernels.norm_rope_cache import api, cases, triton
from pallas_kernels.select import choose, no_ada
from pallas_kernels.testing import assert_close, assert_equal, call
from pallas_kernels.testing.lower import lower_for_h100
from tests.oracles import formats
from tests.tolerances import E4M3_STORED, OP

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")
CASES = {case.name: case for case in cases.CASES}
HALF = [case for case in cases.CI if case.dtype == "bfloat16"]
SMALL = CASES["bfloat16"]


def run(impl):
    return lambda **args: call(norm_rope_cache, args | {"impl": impl})


def interpreted(**args):
    return call(triton.norm_rope_cache, args | {"interpret": True})


def norm(x, weight, eps, dtype):
    """Rounded to `dtype` before it is scaled."""
    x, weight = np.float64(x), np.float64(weight)
    normed = x / np.sqrt((x**2).mean(axis=-1, keepdims=True) + eps)
    return weight * np.float64(jnp.asarray(normed, dtype))


def oracle(q, q_weight, kv, kv_weight, tables, eps, **_):
    """Queries or None, latents, rope keys, not yet rounded to the dtype of the cache."""
    latents = kv_weight.shape[0]
    first, second = np.split(np.float64(kv)[:, latents:], 2, axis=1)
    cos, sin = np.float64(tables[0]), np.float64(tables[1])
    rope = np.concatenate([first * cos - second * sin, second * cos + first * sin], axis=1)
    queries = None if q is None else norm(q, q_weight, eps, q.dtype)
    return queries, norm(np.float64(kv)[:, :latents], kv_weight, eps, kv.dtype), rope


@functools.cache
def expected(case):
    args = case.make(0, poison=True)
    return args, oracle(**args)


def stored(cache: LatentCache, where):
    """float64 latents and rope keys of rows."""
    layer = where[0]
    latent, rope = (np.asarray(x)[where] for x in (cache.latent, cache.rope))
    if cache.format == "auto":
        return np.float64(latent), np.float64(rope)
    real = formats.from_e4m3(latent.view(np.uint8))
    assert cache.scale is not None
    scale = np.asarray(cache.scale)
    if cache.format == "fp8":
        return real * scale[where].repeat(128, axis=-1)[:, : real.shape[1]], np.float64(rope)
    return real * scale[layer], formats.from_e4m3(rope.view(np.uint8)) * scale[layer]


def check(op, case):
    """Queries and rows are right, rows without a place change nothing, and nothing else changes."""
    args, (queries, latents, ropes) = expected(case)
    before = args["cache"]
    normed, after = op(**args)
    if queries is None:
        assert normed is None
    else:
        assert normed.dtype == case.dtype
        assert_close(normed, queries, OP[case.dtype], "queries")
    pages, slots = np.asarray(args["pages"]), np.asarray(args["slots"])
    there = (0 <= pages) & (pages < before.num_pages)
    where = (args["layer"], pages[there], slots[there])
    got_latent, got_rope = stored(after, where)
    exact, e4m3 = OP[case.dtype], E4M3_STORED
    assert_close(got_latent, latents[there], exact if case.kv == "auto" else e4m3, "latents")
    assert_close(got_rope, ropes[there], e4m3 if case.kv == "fp8_tensor" else exact, "rope keys")
    others = np.ones((before.latent.shape[0], before.num_pages, before.page_size), bool)
    others[where] = False
    for name in ("latent", "rope", "scale"):
        old, new = getattr(before, name), getattr(after, name)
        if old is None:
            assert new is None
        elif old.ndim == 4:
            assert_equal(np.asarray(new)[others], np.asarray(old)[others], name)
        else:
            assert_equal(new, old, name)


@pytest.mark.parametrize("case", cases.CI, ids=str)
def test_matches_oracle(case):
    check(run("xla"), case)


@on_cpu
@pytest.mark.parametrize("case", HALF, ids=str)
def test_kernel_matches_oracle(case):
    check(interpreted, case)


@on_cpu
@settings(max_examples=4, phases=[Phase.explicit, Phase.generate])  # each is compiled: not shrunk
@given(
    rows=st.integers(1, 20),
    queries=st.integers(1, 300),
    latent=st.integers(1, 300),
    half=st.integers(1, 40),
    kv=st.sampled_from(["auto", "fp8", "fp8_tensor"]),
)
def test_any_shape(rows, queries, latent, half, kv):
    sizes = {"rows": rows, "queries": queries, "latent": latent, "rope": 2 * half, "kv": kv}
    check(interpreted, dataclasses.replace(SMALL, name=str(sizes), **sizes))


@on_cpu
def test_the_layer_may_be_traced():
    args = CASES["fp8"].make(0)
    layer = args.pop("layer")
    _, want = interpreted(**args, layer=layer)
    _, got = interpreted(**args, layer=jnp.int32(layer))
    jax.tree.map(assert_equal, got, want)


# ------------------------------------------------------------------ planted bugs


def _with(**changes):
    def op(**args):
        return interpreted(**args | {name: change(args[name]) for name, change in changes.items()})

    return op


def _cut(x):
    return x.at[:, -1].set(0)


BUGS = {
    "the slot after": ("bfloat16", _with(slots=lambda s: (s + 1) % 8)),
    "another layer": ("bfloat16", _with(layer=lambda layer: layer - 1)),
    "the first page for rows without one": ("no place", _with(pages=lambda p: jnp.maximum(p, 0))),
    "the last page for rows past the pool": ("no place", _with(pages=lambda p: p.clip(-1, 4))),
    "turned the other way": ("bfloat16", _with(tables=lambda t: (t[0], -t[1]))),
    "no weight of the norm": ("bfloat16", _with(kv_weight=jnp.ones_like)),
    "the last channel left out": ("ragged", _with(kv=_cut)),
    "the last query left out": ("ragged", _with(q=_cut)),
    "too large an epsilon": ("bfloat16", _with(eps=lambda eps: eps + 0.1)),
    "a scale of another layer": (
        "fp8_tensor",
        _with(cache=lambda c: dataclasses.replace(c, scale=c.scale[::-1])),
    ),
}


@on_cpu
@pytest.mark.parametrize("bug", BUGS)
def test_suite_sees(bug):
    name, op = BUGS[bug]
    with pytest.raises(AssertionError):
        check(op, CASES[name])


@on_cpu
def test_suite_sees_scales_of_other_tiles(monkeypatch):
    quantise_tiles = triton.quantise_tiles

    def changed(*args):
        values, scales = quantise_tiles(*args)
        return values, scales[::-1]

    monkeypatch.setattr(triton, "quantise_tiles", changed)
    with pytest.raises(AssertionError):
        check(functools.partial(triton.norm_rope_cache, interpret=True), CASES["fp8"])


# ------------------------------------------------------------------ arguments and choices


def refusal(case, **changes):
    refusals = []
    args = case.abstract() | changes
    layer, eps = args.pop("layer"), args.pop("eps")
    order = list(args)

    def ask(*arrays):
        given = dict(zip(order, arrays, strict=True)) | {"layer": layer, "eps": eps}
        refusals.append(api.triton_refusal(*(given[name] for name in case.abstract())))

    jax.eval_shape(ask, *args.values())
    return refusals[0]


def test_refusals_name_what_is_needed():
    assert all(refusal(case) is None for case in [*HALF, *cases.BENCH])
    for changes, reason in (
        ({"dtype": "float32"}, "needs bfloat16 rows and weights, not float32"),
        ({"queries": 20000}, "needs at most 16384 channels, not 20000"),
        ({"rows": 0}, "needs at least one row"),
        (
            {"kv": "fp8", "latent": 512, "pages": 2**18},
            "needs a pool of less than 2 or more than 4 GiB, not 3221225472 bytes",
        ),
    ):
        assert refusal(dataclasses.replace(SMALL, **changes)) == reason
    whole = SMALL.abstract()["cache"]
    wide = dataclasses.replace(whole, rope=jax.ShapeDtypeStruct(whole.rope.shape, jnp.float32))
    assert refusal(SMALL, cache=wide) == "needs a cache in bfloat16 or e4m3, not in float32"


@on_cpu
def test_a_cpu_never_runs_it():
    args = SMALL.make(0)
    with pytest.raises(NotImplementedError, match="norm_rope_cache.*triton.*needs an NVIDIA GPU"):
        norm_rope_cache(**args, impl="triton")
    known = api.IMPLEMENTATIONS
    assert choose("norm_rope_cache", "auto", known, *args.values()) is known[1].run


# ------------------------------------------------------------------ lowering for CUDA


LARGE = [
    dataclasses.replace(case, name=f"{case} large", pages=4096, layers=61)
    for case in cases.BENCH[3:6]
]
"""Pools of more than 4 GiB, whose offsets need 64 bits."""


@pytest.mark.parametrize("case", [*cases.BENCH, *LARGE], ids=str)
def test_lowers_for_cuda(case):
    args = case.abstract()
    static = {name: args.pop(name) for name in ("layer", "eps")}
    text = lower_for_h100(lambda **arrays: triton.norm_rope_cache(**arrays, **static), **args)
    [kernel] = [line for line in text.splitlines() if "xla.gpu.triton" in line]
    assert kernel.count("operand_index") == len(jax.tree.leaves(args["cache"])) - (
        case.kv == "fp8_tensor"
    )


# ------------------------------------------------------------------ on a GPU


@pytest.mark.gpu
@pytest.mark.parametrize("case", HALF, ids=str)
def test_matches_oracle_on_a_gpu(case):
    if reason := no_ada():
        pytest.skip(reason)
    check(run("triton"), case)


@pytest.mark.gpu
def test_a_pool_of_more_than_4_gib_on_a_gpu():
    """Offsets of 32 bits would write to another row."""
    if reason := no_ada():
        pytest.skip(reason)
    pages = 2**17
    args = dataclasses.replace(SMALL, latent=512, page=64, absent=0.0).make(0)
    pool = [jnp.zeros((1, pages, 64, size), jnp.bfloat16) for size in (512, 16)]
    assert pool[0].nbytes > 2**32
    args |= {"cache": LatentCache(*pool), "layer": 0, "pages": args["pages"] % 5 + pages - 5}
    _, latents, _ = oracle(**args)
    static = {"layer": args.pop("layer"), "eps": args.pop("eps"), "impl": "triton"}
    cache = args.pop("cache")
    write = lambda cache, rest: norm_rope_cache(**rest, **static, cache=cache)  # noqa: E731
    _, after = jax.jit(write, donate_argnums=0)(cache, args)
    got = after.latent[0, args["pages"], args["slots"]]
    assert_close(got, latents, OP["bfloat16"])
    assert float(jnp.count_nonzero(after.latent[0, : pages - 5])) == 0
