"""Rows per expert, as a decode step counts them: real rows, once each, wherever they ran."""

import functools
import json
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.batch import RaggedBatch
from dskjax.cache import init_cache
from dskjax.decode.draft import DraftSpec, extend
from dskjax.decode.generate import generate
from dskjax.layers.moe import Moe
from dskjax.mesh import make_mesh, preset
from dskjax.model import mtp_chain, param_specs, trunk
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
    np.testing.assert_array_equal(flat.mtp_expert_loads, found.mtp_expert_loads)


def test_modules_count_their_rows():
    """Of a prompt's rows those that have a token to look at, in both modules."""
    t, spec = tiny(), DraftSpec.make(tiny().cfg, 2, sampled=False)
    tokens, depths = t.tokens[:1], 2
    rows = tokens.shape[1] - depths
    out = jax.jit(functools.partial(trunk, cfg=t.cfg))(t.params, tokens)
    chain = jax.jit(functools.partial(mtp_chain, cfg=t.cfg, depths=depths))
    chosen = chain(t.params, tokens, out.hidden).experts
    experts = t.cfg.moe.n_routed_experts
    want = [np.bincount(np.ravel(x[0, :rows]), minlength=experts) for x in chosen]

    cache = init_cache(t.cfg, num_pages=8, page_size=4, dtype=jnp.float32)
    table, lens = jnp.arange(8, dtype=jnp.int32)[None], jnp.array([rows], jnp.int32)
    padded = jnp.pad(tokens[:, :rows], ((0, 0), (0, 3)))  # padding is not counted
    batch = RaggedBatch.uniform(padded, table, lens, "expanded", lens)
    following = jnp.stack(
        [jnp.pad(tokens[0, k : k + rows], (0, 3)) for k in range(1, depths + 1)], axis=1
    )
    hidden = jnp.pad(out.hidden[0, :rows], ((0, 3), (0, 0)))
    before = jnp.ones((depths, experts), jnp.int32)
    run = functools.partial(extend, cfg=t.cfg, spec=spec, impl="auto")
    _, loads = jax.jit(run)(t.params, cache, batch, following, hidden, loads=before)
    np.testing.assert_array_equal(loads - before, want)


def test_a_plan_for_modules_from_what_generate_wrote(dskjax, tmp_path):
    model = Path(__file__).parents[2] / "examples" / "tiny-deepseek"
    np.save(tmp_path / "ids.npy", np.arange(8, 20).reshape(3, 4))
    options = ["generate", model, "--ids", tmp_path / "ids.npy", "--max-tokens", 4]
    loads = ["--mtp-expert-loads", tmp_path / "mtp.npy"]
    code, _, told = dskjax(*options, *loads)
    assert code and "needs --speculate" in told
    assert dskjax(*options, *loads, "--speculate", 2)[0] == 0
    found = np.load(tmp_path / "mtp.npy")
    modules, experts = found.shape
    assert modules == 1 and (found.sum(axis=1) > 0).all()
    sizes = ["--replicas", experts + 4, "--gpus", 2]
    code, *_ = dskjax("eplb", "--load", tmp_path / "mtp.npy", *sizes, "--out", tmp_path / "p.json")
    assert code == 0
    assert np.shape(json.loads((tmp_path / "p.json").read_text())["phy2log"]) == (1, experts + 4)


@needs_8
def test_ranks_count_together_and_idle_ones_count_nothing():
    where = preset("decode", make_mesh(dp=2, ep=4, devices=jax.devices()[:8]))
    placed = where.params(param_specs(tiny().cfg))
    params = jax.device_put(jax.tree.map(np.asarray, tiny().params), placed)
    each = ((params, where), (tiny().params, None))
    found, want = (run(w, count_experts=True, drafts=2, sharding=s) for w, s in each)
    assert found.tokens == alone().tokens
    np.testing.assert_array_equal(found.expert_loads, want.expert_loads)
    np.testing.assert_array_equal(found.mtp_expert_loads, want.mtp_expert_loads)
    assert alone().mtp_expert_loads is None


def test_padding_that_chooses_experts_is_seen(monkeypatch):
    right, module = Moe.__call__, sys.modules["dskjax.decode.generate"]
    monkeypatch.setattr(Moe, "__call__", lambda self, x, real=None, **how: right(self, x, **how))
    monkeypatch.setattr(module, "program", module.program.__wrapped__)  # trace again
    want = alone().expert_loads
    with pytest.raises(AssertionError):
        np.testing.assert_array_equal(run(tiny().params, count_experts=True).expert_loads, want)
