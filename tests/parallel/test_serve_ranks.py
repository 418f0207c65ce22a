"""An engine whose ranks have requests, slots and pages of their own says what one device says."""

import threading

import jax
import numpy as np
import pytest

from dskjax.expert_parallel.rebalance import check
from serve.build import build_engine, place
from serve.config import RoleConfig
from serve.engine import Observer
from serve.engine_api import Role
from serve.metrics import Metrics
from serve.observe import EngineObserver
from serve.programs import CompileCounter
from tests.serve.stack import Answers, build, make_request, small, toy_model, until

# What the rule "rejection" says depends on which drafts were there: that request never gives way.
WISHES = [
    dict(prompt=[1, 2, 3, 4, 0, 1, 2, 2, 2, 3, 3, 3, 4], max_tokens=16),
    dict(prompt=[3], max_tokens=12, temperature=0.9, seed=7),
    dict(prompt=[2, 1, 4], max_tokens=20, temperature=0.8, seed=5, rule="rejection", priority=-1),
    dict(prompt=[4] * 21, max_tokens=9, ignore_eos=True),
    dict(prompt=[0, 2, 0, 2, 4], max_tokens=50, temperature=1.1, top_k=3, seed=9, ignore_eos=True),
    dict(prompt=[2, 2], max_tokens=50, drafts=1, ignore_eos=True),
    dict(prompt=[3, 4, 2, 0, 3, 4, 2, 0, 2], max_tokens=50, ignore_eos=True),
    dict(prompt=[4, 3], max_tokens=10, temperature=0.7, frequency_penalty=0.5, seed=3),
    dict(prompt=[2, 3, 0, 0, 3, 2], max_tokens=1),
    dict(prompt=[0] * 30, max_tokens=30, ignore_eos=True, temperature=0.5, seed=1),
]


def on_ranks(model, config, answers, *, observer=None):
    role = RoleConfig(role=Role.IFB, dp=2, ep=2)
    where = place((role,), jax.devices())[0]
    return build_engine(model, config, where, post=answers.post, observer=observer)


def serve(engine, answers, wishes, abort=()):
    engine.start()
    try:
        for i, wish in enumerate(wishes):
            engine.submit(make_request(f"r{i}", **wish))
        for i in abort:
            engine.abort(f"r{i}")
        kept = [i for i in range(len(wishes)) if i not in abort]
        answers.wait([f"r{i}" for i in kept])
        until(lambda: engine.scheduler.idle, 20.0)
    finally:
        engine.stop()
    return {i: (answers.text(f"r{i}"), answers.ends[f"r{i}"].finish) for i in kept}


@pytest.fixture(scope="module")
def alone():
    """What one device says to each wish when nothing else is there."""
    answers = Answers()
    engine = build(toy_model(2), small(drafts=2, chunk=8), answers)
    engine.start()
    try:
        for i, wish in enumerate(WISHES):
            engine.submit(make_request(f"r{i}", **wish))
            answers.wait([f"r{i}"])
    finally:
        engine.stop()
    return {i: (answers.text(f"r{i}"), answers.ends[f"r{i}"].finish) for i in range(len(WISHES))}


@pytest.mark.devices(4)
@pytest.mark.parametrize(
    "options",
    [
        {"mixed": True, "chunk": 8},  # one shape of prompt rows
        pytest.param({"unroll": True, "chunk": 16}, marks=pytest.mark.full),  # two
    ],
    ids=["mixed", "unrolled"],
)
def test_tokens_are_those_of_one_device(alone, options):
    """Sampling with seeds, penalties, drafts, aborts, and so few pages that requests give way."""
    answers, seen = Answers(), CompileCounter()
    engine = on_ranks(toy_model(2), small(drafts=2, slots=16, pages=4 * 16, **options), answers)
    tripled = [*WISHES, *WISHES, *WISHES]
    seen.restart()
    found = serve(engine, answers, tripled, abort=(3, 16))
    assert seen.count == 0, "compiled after the warm-up"
    for i, (tokens, finish) in found.items():
        assert (tokens, finish) == alone[i % len(WISHES)], i
    each = [rank.stats() for rank in engine.scheduler.ranks]
    assert all(stats[:5] == (0,) * 5 and stats.free_pages == 16 for stats in each), each
    # Everything that could have gone wrong did happen:
    assert all(stats.queried_tokens for stats in each), "a rank had no request"
    assert sum(stats.preemptions for stats in each) and sum(stats.hit_tokens for stats in each)
    assert sum(end.request.accepted for end in answers.ends.values())


# ------------------------------------------------------------------ experts that move


class Told(Observer):
    """Keeps what rebalances did."""

    def __init__(self):
        self.balances = []

    def balanced(self, balance):
        self.balances.append(balance)


def loads_of(engine):
    """int64 [L, E]: rows that chose each expert."""
    return np.asarray(engine._runner.state.loads).sum(axis=0, dtype=np.int64)


GREEDY = [dict(prompt=[i % 5] * (1 + 3 * i), max_tokens=24, ignore_eos=True) for i in range(8)]


@pytest.fixture(scope="module")
def greedy_alone():
    answers = Answers()
    engine = build(toy_model(0), small(drafts=0, chunk=8), answers)
    return serve(engine, answers, GREEDY)


@pytest.mark.devices(4)
def test_text_is_the_same_while_experts_move(greedy_alone):
    """Copies are dealt out again and again; only rows of requests are counted, on every rank."""
    answers, told, seen = Answers(), Told(), CompileCounter()
    model = toy_model(0)
    moe = model.cfg.moe
    config = small(drafts=0, chunk=8, slots=8, pages=8 * 16, redundant_experts=4, rebalance_every=3)
    engine = on_ranks(model, config, answers, observer=told)
    runner = engine._runner
    assert not loads_of(engine).any(), "the warm-up was counted"
    before = runner.balancer._rebalancer.placement("moe_layers").phy2log.copy()
    seen.restart()
    found = serve(engine, answers, GREEDY)
    assert seen.count == 0, "compiled after the warm-up"
    assert found == greedy_alone
    moved = [balance for balance in told.balances if balance.moves]
    assert len(told.balances) > 1 and moved, told.balances
    assert all(b.after <= b.before for b in moved) and any(b.after < b.before for b in moved)
    now = runner.balancer._rebalancer.placement("moe_layers").phy2log
    assert (now != before).any()
    check(
        runner.params, runner.cfg, runner.programs._ranks.sharding
    )  # copies are equal, bit by bit
    until(lambda: not any("expert-planner" in t.name for t in threading.enumerate()), 20.0)
    rows = sum(len(wish["prompt"]) - 1 + len(found[i][0]) for i, wish in enumerate(GREEDY))
    assert (loads_of(engine).sum(axis=1) == rows * moe.num_experts_per_tok).all()


@pytest.mark.devices(4)
def test_one_request_on_four_ranks_is_counted_once():
    """Three ranks run padding, which writes nothing, draws nothing and chooses no expert."""
    answers, metrics = Answers(), Metrics("toy")
    model, numbers = toy_model(0), metrics.engine("ifb0")
    config = small(drafts=0, chunk=8, slots=8, pages=8 * 16, redundant_experts=4, rebalance_every=0)
    observer = EngineObserver(numbers, config.accept)
    engine = on_ranks(model, config, answers, observer=observer)
    idle = [np.asarray(x)[2:] for x in jax.tree.leaves(engine._runner.state) if x.shape[0] == 8]
    [(tokens, _)] = serve(engine, answers, GREEDY[3:4]).values()
    rows = len(GREEDY[3]["prompt"]) - 1 + len(tokens)
    assert (loads_of(engine).sum(axis=1) == rows * model.cfg.moe.num_experts_per_tok).all()
    after = [np.asarray(x)[2:] for x in jax.tree.leaves(engine._runner.state) if x.shape[0] == 8]
    for old, new in zip(idle, after, strict=True):
        np.testing.assert_array_equal(old, new)
    cache = np.asarray(engine._runner.state.cache.latent)
    assert cache[:, :32].any() and not cache[:, 32:].any(), "padding wrote into the cache"
    value = metrics.registry.get_sample_value
    labels = dict(model_name="toy", engine="ifb0", role="both")
    steps = value("dskjax:engine_step_seconds_count", labels)
    assert value("dskjax:dummy_steps_total", labels) == 3 * steps > 0
