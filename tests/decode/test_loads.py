"""Rows per expert, as a decode step counts them: real rows, once each, wherever they ran."""

import functools
import sys

import jax
import numpy as np
import pytest

from dskjax.decode.generate import generate
from dskjax.layers.moe import Moe
from dskjax.mesh import make_mesh, preset
from dskjax.model import param_specs, trunk
from dskjax.params import unstack
from tests.model.common import tiny
from tests.parallel.common import needs_8

PROMPTS = [[5, 6, 7, 8, 9, 3], [11], [4] * 13]


def run(params, **options):
    return generate(
        params, tiny().cfg, PROMPTS, max_tokens=6, ignore_eos=True, page_size=4, chunk=8, **options
    )


@functools.cache
def alone():
    return run(tiny().params, count_experts=True)


def definition(rows: list[list[int]]) -> np.ndarray:
    """Choices of the trunk over whole sequences; the last token is never run."""
    t = tiny()
    total = np.zeros((t.cfg.num_moe_layers, t.cfg.moe.n_routed_experts), np.int64)
    longest = max(map(len, rows))
    tokens = np.array([[*row, *[0] * (longest - len(row))] for row in rows], np.int32)
    real = np.arange(longest) < np.array([len(row) for row in rows])[:, None]
    out = jax.jit(functools.partial(trunk, cfg=t.cfg))(
        t.params, tokens, segment_ids=real.astype(np.int32)
    )
    for layer, chosen in enumerate(np.asarray(out.experts)):
        np.add.at(total[layer], chosen[real], 1)
    return total


def test_every_row_that_ran_counts_once():
    found = alone()
    rows = [[*prompt, *new[:-1]] for prompt, new in zip(PROMPTS, found.tokens, strict=True)]
    np.testing.assert_array_equal(found.expert_loads, definition(rows))


def test_verified_drafts_count_and_unrolled_layers_count_alike():
    t = tiny()
    found = run(t.params, count_experts=True, drafts=2)
    assert found.tokens == alone().tokens
    more = found.expert_loads.sum(axis=1) - alone().expert_loads.sum(axis=1)
    rejected = sum(stats.drafted - stats.accepted for stats in found.per_prompt)
    assert (more >= rejected * t.cfg.moe.num_experts_per_tok).all()
    flat = run(unstack(t.params), count_experts=True, drafts=2)
    np.testing.assert_array_equal(flat.expert_loads, found.expert_loads)


@needs_8
def test_ranks_count_together_and_idle_ones_count_nothing():
    where = preset("decode", make_mesh(dp=2, ep=4, devices=jax.devices()[:8]))
    placed = where.params(param_specs(tiny().cfg))
    params = jax.device_put(jax.tree.map(np.asarray, tiny().params), placed)
    found = run(params, count_experts=True, sharding=where)
    assert found.tokens == alone().tokens
    np.testing.assert_array_equal(found.expert_loads, alone().expert_loads)


def test_nothing_is_counted_unless_asked_for():
    assert run(tiny().params).expert_loads is None


def test_padding_that_chooses_experts_is_seen(monkeypatch):
    right, module = Moe.__call__, sys.modules["dskjax.decode.generate"]
    monkeypatch.setattr(Moe, "__call__", lambda self, x, real=None, **how: right(self, x, **how))
    monkeypatch.setattr(module, "program", module.program.__wrapped__)  # trace again
    want = alone().expert_loads
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(run(tiny().params, count_experts=True).expert_loads, want)
