"""Every layout of a mesh gives what one device gives: whole sequences, and decoding with drafts on
ranks that have more, less or nothing to do.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest

from dskjax.axes import Sharding
from dskjax.decode.generate import Generation, generate
from dskjax.decode.rules import RuleOptions
from dskjax.decode.sampling import SamplingParams
from dskjax.mesh import make_mesh, preset
from dskjax.model import param_specs, trunk
from dskjax.params import Params
from pallas_kernels.testing import assert_close
from tests.model.common import Tiny, tiny
from tests.parallel.common import needs_8
from tests.tolerances import MODEL

# (rules, dp, ep, tp); the first ones in every run.
WHOLE = [
    ("decode", 2, 4, 1),
    ("prefill", 1, 4, 2),
    ("prefill_rows", 1, 2, 2),
    ("train", 2, 2, 2),  # the step that trains runs on it every time
    ("decode", 1, 8, 1),
    ("decode", 8, 1, 1),
    ("prefill", 1, 8, 1),
    ("prefill_rows", 1, 1, 8),
    ("prefill", 2, 2, 2),
    ("train", 1, 8, 1),
    ("train", 1, 2, 4),
]
DECODE = [
    (1, 8, 1),
    (2, 2, 2),
    (8, 1, 1),
    (2, 4, 1),
    (4, 2, 1),
    (1, 4, 2),
    (1, 2, 4),
    (4, 1, 2),
    (1, 2, 1),
]


def table(layouts: list, always: int) -> list:
    return [
        pytest.param(*one, marks=[] if at < always else [pytest.mark.full])
        for at, one in enumerate(layouts)
    ]


def sharding(rules: str, dp: int, ep: int, tp: int) -> Sharding:
    return preset(rules, make_mesh(dp=dp, ep=ep, tp=tp, devices=jax.devices()[: dp * ep * tp]))


def placed(params: Params, t: Tiny, where: Sharding) -> Params:
    return jax.device_put(
        jax.tree.map(np.asarray, params), where.params(param_specs(t.cfg), params)
    )


@functools.cache
def whole_of(cfg, where: Sharding | None):
    return jax.jit(functools.partial(trunk, cfg=cfg, sharding=where))


@needs_8
@pytest.mark.parametrize(("rules", "dp", "ep", "tp"), table(WHOLE, 3))
def test_whole_sequences(rules, dp, ep, tp):
    t, where = tiny(), sharding(rules, dp, ep, tp)
    rows = 3 if rules == "prefill" else 8  # 51 and 136 flat rows: the former does not divide
    tokens = np.resize(t.tokens, (rows, 17))
    segments = np.where(np.arange(17) < np.arange(5, 5 + rows)[:, None], 1, 0).astype(np.int32)
    want = whole_of(t.cfg, None)(t.params, tokens, segment_ids=segments)
    got = whole_of(t.cfg, where)(placed(t.params, t, where), tokens, segment_ids=segments)
    real = segments > 0
    assert_close(np.asarray(got.hidden)[real], np.asarray(want.hidden)[real], MODEL)
    for found, wanted in zip(np.asarray(got.experts), np.asarray(want.experts), strict=True):
        np.testing.assert_array_equal(np.sort(found[real]), np.sort(wanted[real]))
        assert (found[~real] == -1).all(), "padding chose experts"


# ------------------------------------------------------------------ ranks with work of their own

PROMPTS = [[5, 6, 7, 8, 9, 3], [11], [4] * 13, [9, 8, 7, 6, 5, 4, 3, 2, 1], [3, 1]]


def run(t: Tiny, modules: int, where: Sharding | None, params: Params, rule: str) -> Generation:
    """Five prompts of different lengths; on eight ranks three have nothing to do."""
    heat = 0.0 if rule == "strict" else 0.8
    return generate(
        params,
        t.cfg,
        PROMPTS,
        max_tokens=9,
        sampling=SamplingParams.make(len(PROMPTS), temperature=heat, seed=[1, 2, 3, 4, 5]),
        accept=RuleOptions(name=rule),
        drafts=modules,
        page_size=4,
        chunk=8,
        sharding=where,
    )


@functools.cache
def alone(modules: int, rule: str) -> Generation:
    t = tiny()
    return run(t, modules, None, t.params, rule)


def assert_same(got: Generation, want: Generation) -> None:
    assert got.tokens == want.tokens
    assert got.finish_reasons == want.finish_reasons
    assert [dataclasses.astuple(s) for s in got.per_prompt] == [
        dataclasses.astuple(s) for s in want.per_prompt
    ], "drafts were accepted otherwise"


@needs_8
@pytest.mark.parametrize(("dp", "ep", "tp"), table(DECODE, 2))
def test_decode_and_verify(dp, ep, tp):
    t, where = tiny(), sharding("decode", dp, ep, tp)
    params = placed(t.params, t, where)
    assert_same(run(t, 2, where, params, "strict"), alone(2, "strict"))


@needs_8
@pytest.mark.full
@pytest.mark.parametrize("rule", ["rejection", "block"])
def test_sampled_drafts(rule):
    t, where = tiny(), sharding("decode", 2, 4, 1)
    params = placed(t.params, t, where)
    assert_same(run(t, 2, where, params, rule), alone(2, rule))


@needs_8
def test_experts_without_tokens():
    """All rows choose among the four experts of two ranks; what arrives there still fits."""
    t, where = tiny(), sharding("decode", 1, 8, 1)
    bias = t.params["moe_layers"]["mlp"]["gate"]["e_score_correction_bias"]
    pushed = bias.at[:, :4].add(1e3)
    gate = {**t.params["moe_layers"]["mlp"]["gate"], "e_score_correction_bias": pushed}
    layers = t.params["moe_layers"]
    params = {**t.params, "moe_layers": {**layers, "mlp": {**layers["mlp"], "gate": gate}}}
    want = run(t, 2, None, params, "strict")
    assert_same(run(t, 2, where, placed(params, t, where), "strict"), want)


@needs_8
def test_a_rank_more_or_less_changes_nothing(monkeypatch):
    """What an idle rank holds cannot be seen: its pages and slots are filled with NaN and junk."""
    from dskjax.decode.ranks import Ranks

    t, where = tiny(), sharding("decode", 1, 8, 1)
    right = Ranks.place

    def place(self, rows):
        if hasattr(rows, "cache"):
            size = rows.cache.latent.shape[1] // 8
            idle = np.arange(rows.cache.latent.shape[1]) >= 5 * size
            spoil = lambda x: np.where(idle[None, :, None, None], np.nan, x)  # noqa: E731
            cache = jax.tree.map(spoil, rows.cache)
            last = np.where(np.arange(8) >= 5, 7, rows.last_token).astype(np.int32)
            rows = dataclasses.replace(rows, cache=cache, last_token=last)
        return right(self, rows)

    monkeypatch.setattr(Ranks, "place", place)
    params = placed(t.params, t, where)
    assert_same(run(t, 2, where, params, "strict"), alone(2, "strict"))
