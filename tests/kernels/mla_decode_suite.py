"""What the tests of `mla_decode` share: the float64 oracle's answer to each case, the comparison,
and every implementation as a function of the op's arguments, the Hopper kernel interpreted.
"""

import dataclasses
import functools
from unittest import mock

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import mla_decode, plan_mla_decode
from pallas_kernels.mla_decode import api, cases, work
from pallas_kernels.mla_decode.plan import with_work
from pallas_kernels.testing import assert_close, call, distinct, jit
from pallas_kernels.testing.interpret import PARAMETERS, interpret
from tests.oracles import attention, formats
from tests.tolerances import FP8_LATENTS_IN_BF16, OP

IMPLS = distinct(api.IMPLEMENTATIONS)
CASES = {case.name: case for case in cases.CASES}
SMS = 5
"""Of the interpreted GPU: few, so that workers have several items and groups are split."""


def run(impl):
    if impl == "mosaic_sm90" and jax.default_backend() == "cpu":
        return interpreted()

    def op(**args):
        if impl == "mosaic_sm90":
            skip_unsupported(args)
        return call(mla_decode, args | {"impl": impl})

    return op


def skip_unsupported(args):
    names = ("q_latent", "q_rope", "cache")
    if reason := api.hopper_refusal(*(args[name] for name in names)):
        pytest.skip(reason)


def interpreted(sms=SMS, see=None, **options):
    """The Hopper kernel in the interpreter. `see` edits what the rows see, for planted bugs."""
    from pallas_kernels.mla_decode import mosaic_sm90

    def op(*, plan, cached_lens, query_starts, scale, **args):
        skip_unsupported(args)
        q_latent, table = args["q_latent"], args["page_table"]
        plan = plan or plan_mla_decode(cached_lens, query_starts, q_latent.shape[0])
        if see is not None:
            plan = dataclasses.replace(plan, visible=jnp.asarray(see(np.asarray(plan.visible))))
        plan = _with_work(plan, table, q_latent.shape[1], sms)
        keywords = args | options | {"plan": plan, "scale": scale, "interpret": PARAMETERS}
        return interpret(mosaic_sm90.mla_decode, **keywords)

    return op


@functools.partial(jit, static_argnums=(2, 3))
def _with_work(plan, table, heads, sms):
    """Split as if that cost nothing: at its price no case that small has partial results."""
    with mock.patch.multiple(work, ITEM_COST=0, SPLIT_COST=0, PIECE_COST=0, MIN_COST=1):
        return with_work(plan, table, heads, sms)


def partial_results(case, sms=SMS):
    """How many each split sequence has when the Hopper kernel is interpreted."""
    args = case.make(0)
    rows, heads = args["q_latent"].shape[:2]
    plan = args["plan"] or plan_mla_decode(args["cached_lens"], args["query_starts"], rows)
    group, _, count = np.asarray(_with_work(plan, args["page_table"], heads, sms).work.splits).T
    return count[group >= 0].tolist()


@functools.cache
def expected(case, seed=0):
    """(arguments with poison, out, lse of the oracle)."""
    args = case.make(seed, poison=True)
    cache, layer = args["cache"], args["layer"]
    latent, rope = np.asarray(cache.latent[layer]), np.asarray(cache.rope[layer])
    if cache.format == "fp8_tensor":
        scale = np.float64(cache.scale[layer])
        latent, rope = (formats.from_e4m3(x.view(np.uint8)) * scale for x in (latent, rope))
    elif cache.scale is not None:
        latent = formats.dequantise(latent, np.asarray(cache.scale[layer]), (1, 128), "e4m3")
    arrays = (np.asarray(args[k]) for k in ("page_table", "cached_lens", "query_starts"))
    q = (np.asarray(args[k]) for k in ("q_latent", "q_rope"))
    return args, *attention.decode(*q, latent, rope, *arrays, args["scale"])


@functools.cache
def answer(impl, case, seed=0):
    """(out, lse) of an implementation for the poisoned arguments."""
    return run(impl)(**expected(case, seed)[0])


def recipe(impl, case):
    """The tolerance of an implementation: plain JAX makes bf16 of fp8 latents, the kernel fp16."""
    plain = impl != "mosaic_sm90" and case.kv == "fp8" and case.dtype == "bfloat16"
    return FP8_LATENTS_IN_BF16 if plain else OP[case.dtype]


def check(op, case, seed=0, tolerance=None):
    args, want_out, want_lse = expected(case, seed)
    out, lse = op(**args)
    assert out.dtype == args["q_latent"].dtype and lse.dtype == jnp.float32
    assert_close(out, want_out, tolerance or OP[case.dtype], "out")
    assert_close(lse, want_lse, tolerance or OP[case.dtype], "lse")
