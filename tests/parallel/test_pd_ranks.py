"""Prefill there, decode on ranks with requests of their own: the tokens are those of one engine."""

import functools

import jax
import numpy as np
import pytest

from dskjax.cache import init_cache
from serve.build import Placement, build_engine
from serve.engine import Engine, Observer
from serve.engine_api import Role
from serve.transfer.checks import checksum
from serve.transfer.faults import Faults
from serve.transfer.local import LocalTransport
from serve.transfer.pages import PagePrograms
from serve.transfer.pools import Home, Pools
from serve.transfer.transport import Mode
from tests.serve.pd_stack import STRICT, asks, check_texts, requests_of, together
from tests.serve.stack import small, toy_model

pytestmark = pytest.mark.devices(8)

MODULES, PAGE, RANKS = 1, 16, 4
PAGES = 5
"""Of each rank: fewer than its two slots want, so that requests wait."""
WHERE = {
    "prefill": Placement("prefill0", Role.PREFILL, (0,)),
    "prefill ranks": Placement("prefill0", Role.PREFILL, (1, 2), 1, 2),
    "decode ranks": Placement("decode0", Role.DECODE, (4, 5, 6, 7), 2, 2),
}


@functools.cache
def compiled(name: str) -> tuple[Engine, Placement]:
    """An engine that nobody starts; its devices are indices in `WHERE`, made at the last moment."""
    placement = WHERE[name]
    placement = placement._replace(devices=tuple(jax.devices()[i] for i in placement.devices))
    config = small(
        max_model_len=48,
        page_size=PAGE,
        pages=RANKS * PAGES,
        chunk=8 if placement.role is Role.PREFILL else 4,
        drafts=2,
        layerwise_from=1,
        layer_group=1,
        redundant_experts=4,
        rebalance_every=3,
        **STRICT,
    )
    engine = build_engine(
        toy_model(MODULES),
        config,
        placement,
        post=lambda event: None,
        observer=told if placement.role is Role.DECODE else None,
        transport=LocalTransport({}, threads=False),
    )
    return engine, placement


def cluster(prefill: str = "prefill", **options):
    return together([compiled(prefill), compiled("decode ranks")], **options)


class Told(Observer):
    """Keeps what rebalances did."""

    def __init__(self):
        self.balances = []

    def balanced(self, balance):
        self.balances.append(balance)


told = Told()


def devices_of(tree) -> set:
    return {device for leaf in jax.tree.leaves(tree) for device in leaf.devices()}


@pytest.mark.parametrize(
    ("prefill", "mode"),
    [
        ("prefill", "whole"),
        ("prefill", "layerwise"),
        pytest.param("prefill ranks", "whole", marks=pytest.mark.full),
    ],
)
def test_tokens_are_those_of_one_engine(prefill, mode, request):
    """Every rank decodes, each part goes to its rank's device alone, and a full engine waits."""
    some = asks(24)
    with cluster(prefill, layerwise=mode == "layerwise") as pd:
        requests = requests_of(some, request.node.name)
        summaries = pd.serve(requests)
        assert check_texts(pd, some, requests, MODULES) == len(some)
        pd.assert_empty()
        where = compiled("decode ranks")[1].pools
    for ask, summary in zip(some, summaries, strict=True):
        assert summary.tokens_transferred == len(ask.prompt)  # nobody was served another way
        assert summary.mode is Mode(mode) and summary.failures == 0
    assert any(summary.attempts > 1 for summary in summaries), "nobody waited for room"
    counts = dict.fromkeys(range(RANKS), 0)
    for parts in pd.parts.values():
        counts[parts[0][0].target_rank] += 1
        for ticket, part in parts:
            assert devices_of(part.arrays) == where[ticket.target_rank].device_set
    assert sum(counts.values()) == len(some) and min(counts.values()) >= 2, counts
    for engine in pd.engines:
        for rank in getattr(engine.scheduler, "ranks", ()):
            assert rank.stats().queried_tokens, "a rank had no request"
    assert told.balances, "no expert moved"
    accepted = sum(asked.accepted for asked in requests)
    assert accepted > 0  # the module's rows and hidden states came along


def test_faults_at_random():
    """Transfers that fail leave nothing on any rank, and are tried again."""
    some = asks(24, seed=2)
    rates = "drop=0.05,delay=0.1,duplicate=0.05,corrupt=0.1,fail-push=0.05,lose-ack=0.03"
    faults = Faults.parse(f"{rates},seconds=0.1,seed=3")
    limits = dict(transfer_timeout=0.5, retries=4)
    with cluster(layerwise=True, faults=faults, **limits) as pd:
        requests = requests_of(some, "faults")
        summaries = pd.serve(requests)
        right = check_texts(pd, some, requests, MODULES)
        pd.assert_empty()
    assert right > len(some) // 2 and sum(summary.failures for summary in summaries), summaries
    assert len(faults.injected) > 2, faults.injected


def part_of(engine, pages, seed):
    """A part's arrays over all layers, in NumPy."""
    cfg, rng = engine._runner.cfg, np.random.default_rng(seed)
    _, tail, width = engine._runner.state.hidden_tail.shape
    cache = init_cache(cfg, num_pages=pages, page_size=PAGE, dtype=np.float32)
    draw = lambda shape: rng.normal(size=shape).astype(np.float32)  # noqa: E731
    return {
        "cache": jax.tree.map(lambda leaf: draw(leaf.shape), cache),
        "hidden": draw((tail, 1, width)),
    }


def test_a_part_is_installed_on_its_rank_and_changes_nothing_else():
    engine, placement = compiled("decode ranks")
    runner, programs = engine._runner, engine._link._programs
    sender = PagePrograms(Pools(runner.state, placement.pools), [3])
    sender.compile(sends=True, receives=False)
    runner.state = sender.warm_up(runner.state)
    slots, layers = runner.state.count // RANKS, (0, engine.compat.layers)
    for rank, pages, slot in ((2, [3, 1, 0], 1), (0, [4, 2, 1], 0), (3, [0, 2, 4], 1)):
        before, where = jax.device_get(runner.state), runner.state.cache.latent.sharding
        arrays = part_of(engine, len(pages), rank)
        [placed] = placement.mover()([arrays], [rank])
        home = Home(rank, slot, [9, *pages, 9])
        runner.state, installed = programs.install(
            runner.state, placed, home, (1, 4), layers, hidden=True
        )
        assert runner.state.cache.latent.sharding == where
        after = jax.device_get(runner.state)
        mine, own = [rank * PAGES + page for page in pages], rank * slots + slot
        leaves = map(jax.tree.leaves, (before.cache, after.cache, arrays["cache"]))
        for old, new, sent in zip(*leaves, strict=True):
            np.testing.assert_array_equal(new[:, mine], sent)
            np.testing.assert_array_equal(np.delete(new, mine, 1), np.delete(old, mine, 1))
        np.testing.assert_array_equal(after.hidden_tail[own], arrays["hidden"][:, 0])
        others = [np.delete(state.hidden_tail, own, 0) for state in (before, after)]
        np.testing.assert_array_equal(*others)
        found, taken = sender.extract(runner.state, home, (1, 4), layers, hidden=True)
        jax.tree.map(np.testing.assert_array_equal, jax.device_get(found), arrays)
        assert int(installed) == int(taken) == checksum(jax.tree.leaves(arrays))


def test_a_rank_of_several_devices_has_its_pool_whole_on_each():
    state = compiled("decode ranks")[0]._runner.state
    wide = Placement("decode0", Role.DECODE, tuple(jax.devices()[:4]), 1, 2)
    state = jax.device_put(state, wide.ranks.state(state))
    pools, before = Pools(state, wide.pools), jax.device_get(state)
    assert [sorted(d.id for d in where.device_set) for where in pools.where] == [[0, 1], [2, 3]]
    more = jax.jit(lambda pool: jax.tree.map(lambda x: x + 1, pool), donate_argnums=0)
    assert jax.tree.leaves(pools.read(state, 1))[0].shape == pools.shapes[1].cache.latent.shape
    state, said = pools.change(state, 1, lambda pool: (more(pool), "said"))
    half, after = RANKS * PAGES // 2, jax.device_get(state)
    assert said == "said" and state.cache.latent.sharding == wide.ranks.state(state).cache.latent
    np.testing.assert_array_equal(after.cache.latent[:, :half], before.cache.latent[:, :half])
    np.testing.assert_array_equal(after.cache.rope[:, half:], before.cache.rope[:, half:] + 1)
    for shard in state.cache.latent.addressable_shards:
        np.testing.assert_array_equal(shard.data, after.cache.latent[shard.index])
