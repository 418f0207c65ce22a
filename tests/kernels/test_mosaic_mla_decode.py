"""The Hopper kernel of `mla_decode`: bugs the suite sees, lowering for CUDA, and runs on a GPU.

`test_mla_decode.py` interprets it on the same cases as every other implementation.
"""

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from pallas_kernels import plan_mla_decode
from pallas_kernels.mla_decode import api, cases, mosaic_sm90, mosaic_sm90_fp8, scores, values
from pallas_kernels.mla_decode.plan import with_work
from pallas_kernels.mla_decode.tiles import Tiles
from pallas_kernels.select import H100_SMS, choose
from pallas_kernels.testing import assert_close, call
from pallas_kernels.testing.interpret import RaceError
from tests.kernels.mla_decode_suite import CASES, SMS, check, interpreted, run
from tests.tolerances import OP

on_cpu = pytest.mark.skipif(jax.default_backend() != "cpu", reason="interprets on a CPU")

SMALL = cases.Case(
    name="hopper small",
    lens=(70, 0, 130),
    queries=(2,) * 3,
    uniform=True,
    heads=32,
    latent=128,
    rope=64,
    page_size=64,
    dtype="bfloat16",
    sharpness=3.0,
)
SMALL_FP8 = dataclasses.replace(SMALL, name="hopper small fp8", kv="fp8")


def replanned(change):
    """A plan whose rows see what `change` makes of what they should see."""

    def apply(plan):
        return dataclasses.replace(plan, visible=jnp.asarray(change(np.asarray(plan.visible))))

    return lambda case: interpreted(before=apply)


def patched(module, name, replacement):
    def bug(case, monkeypatch):
        monkeypatch.setattr(module, name, replacement)
        return interpreted()

    return bug


def _keep(b, even, out):
    values.plgpu.barrier_wait(b.signal("alpha", even))
    return out


def _ones(block, half, load):
    return [scores.row_values(1.0)]


BUGS = {
    "last page dropped": (SMALL, "visible", lambda seen: np.where(seen > 64, seen - 64, seen)),
    "sees one row ahead": (SMALL, "visible", lambda seen: seen + (seen > 0)),
    "not causal among new rows": (SMALL, "visible", lambda seen: seen.reshape(-1, 2).max(1).repeat(2)),
    "no rescale": (SMALL, values, "_shrink", _keep),
    "hidden rows keep NaN": (SMALL, values, "_clear_hidden", lambda *_: None),
    "hidden columns not masked": (SMALL, scores, "_mask", lambda scores, *_: scores),
    "partial results left alone": (
        CASES["hopper 128 heads"],
        mosaic_sm90,
        "combine",
        lambda g, out, lse, *_: (out, lse),
    ),
    "no scales": (SMALL_FP8, mosaic_sm90_fp8.Fp8Block, "_scales", _ones),
}
