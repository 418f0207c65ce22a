"""From engines' steps and transfers that ended to metrics: once, and at the right engine."""

import functools

import numpy as np
import pytest

from dskjax.decode.rules import RuleOptions
from serve.coordinator import Coordinator, Mailbox
from serve.engine_api import Role
from serve.expert_balancer import Balance
from serve.lifecycle import Lifecycle
from serve.metrics import Metrics
from serve.observe import EngineObserver, TransferObserver
from serve.request import Request, StopOptions
from serve.transfer.faults import Fault, Faults, Rule
from serve.transfer.local import LocalTransport
from serve.transfer.states import TransferState
from tests.serve.engine_bench import EngineBench
from tests.serve.harness import long_answer, make_request, prompt
from tests.serve.pd_fakes import FORM, place
from tests.serve.pd_world import World
from tests.serve.pd_world import prompt as world_prompt
from tests.serve.test_coordinator_thread import Threaded, pump

SECONDS = 0.5
"""What a packet takes in these tests."""


class Seen:
    """Metrics of a world's engines, and every transfer that ended."""

    def __init__(self, prefill=1, decode=1, *, lifecycle=Lifecycle, **options):
        self.metrics, self.ends = Metrics("tiny"), []
        names = [f"p{i}" for i in range(prefill)] + [f"d{i}" for i in range(decode)]
        self.observer = TransferObserver({n: self.metrics.engine(n, "decode") for n in names})
        made = functools.partial(lifecycle, on_transfer=self.ended)
        self.world = World(prefill, decode, lifecycle=made, **options)
        self.world.transport._place = {name: self.move for name in names}

    def ended(self, end):
        self.ends.append(end)
        self.observer(end)

    def move(self, packets, ranks):
        self.world.now += SECONDS
        return place(packets, ranks)

    def value(self, name, engine="d0", **labels):
        labels = {"model_name": "tiny", "engine": engine, "role": "decode", **labels}
        found = self.metrics.registry.get_sample_value("dskjax:" + name, labels)
        assert found is not None, (name, labels)
        return found

    def modes(self, engine="d0"):
        kinds = ("layerwise", "whole", "merged")
        return tuple(self.value("transfer_mode_total", engine, mode=kind) for kind in kinds)

    def results(self):
        return [end.result for end in self.ends]


def test_experts_that_moved_are_counted_and_the_last_imbalance_stays():
    metrics = Metrics("tiny")
    observer = EngineObserver(metrics.engine("d0", "decode"), RuleOptions(name="strict"))
    observer.balanced(Balance(before=2.0, after=1.5, moves=3))
    observer.balanced(Balance(before=1.5, after=1.25, moves=2))

    def value(name, **labels):
        labels = {"model_name": "tiny", "engine": "d0", "role": "decode", **labels}
        return metrics.registry.get_sample_value("dskjax:" + name, labels)

    assert value("eplb_rebalances_total") == 2 and value("eplb_moved_experts_total") == 5
    assert [value("eplb_imbalance", when=when) for when in ("before", "after")] == [1.5, 1.25]


# ------------------------------------------------------------------ transfers


def test_a_whole_transfer_counts_at_the_engine_that_received_it():
    seen = Seen()
    seen.world.submit(world_prompt(9), 4)
    seen.world.drain()
    assert seen.results() == ["success"]
    assert seen.modes() == (0, 1, 0) and seen.modes("p0") == (0, 0, 0)
    assert seen.value("kv_transfer_bytes_total") == 3 * FORM.page_bytes
    assert seen.value("kv_transfer_latency_seconds_sum") == pytest.approx(SECONDS)
    assert seen.value("kv_transfer_latency_seconds_count") == 1
    assert seen.value("transfer_overlap_ratio") == 0
    assert seen.value("kv_transfer_failed_total") == 0


def test_a_layerwise_transfer_is_hidden_up_to_its_last_packet():
    seen = Seen()
    seen.world.submit(world_prompt(30), 4)
    seen.world.drain()
    packets = seen.world.transport.stats.packets
    assert packets > 2 and seen.modes() == (1, 0, 0)
    assert seen.value("kv_transfer_latency_seconds_sum") == pytest.approx(packets * SECONDS)
    assert seen.value("transfer_overlap_ratio") == pytest.approx(1 - 1 / packets)


@pytest.mark.parametrize(("length", "modes"), [(9, (0, 0, 2)), (30, (2, 0, 0))])
def test_small_transfers_that_share_a_packet_are_merged_and_layerwise_ones_stay(length, modes):
    seen = Seen(prefill=2, pages=40, chunk=100)
    ids = [seen.world.submit(world_prompt(length, i), 4) for i in range(2)]
    seen.world.moves = 0  # nothing leaves before both are there
    seen.world.until(lambda: all(seen.world.got[id] for id in ids))
    seen.world.moves = 100
    seen.world.drain()
    assert seen.world.transport.stats.merged >= 2
    assert seen.modes() == modes
    # Each has its share of the packets' time.
    spent = seen.world.transport.stats.packets * SECONDS
    assert seen.value("kv_transfer_latency_seconds_sum") == pytest.approx(spent)


def test_a_transfer_that_had_to_be_repeated_counts_as_failed_and_the_next_as_done():
    seen = Seen(faults=Faults([Rule(fault=Fault.CORRUPT)]))
    id = seen.world.submit(world_prompt(9), 4)
    seen.world.drain()
    assert seen.world.served(id) and seen.results() == ["failed", "success"]
    assert seen.value("kv_transfer_failed_total") == 1 and seen.modes() == (0, 1, 0)
    assert seen.value("kv_transfer_bytes_total") == 3 * FORM.page_bytes  # of the second


def test_a_prefill_that_comes_too_late_is_a_failed_transfer():
    seen = Seen()
    seen.world.submit(world_prompt(9), 4)
    seen.world.until(lambda: seen.world.by_name["p0"].inbox)
    seen.world.by_name["p0"].inbox.clear()  # the order is lost
    seen.world.drain()
    assert seen.results() == ["failed", "success"]


@pytest.mark.parametrize("when", ["prefill", "transfer", "first token"])
def test_what_nobody_wants_any_more_is_neither_done_nor_failed(when):
    seen = Seen()
    id = seen.world.submit(world_prompt(9), 1 if when == "first token" else 4)
    if when == "prefill":
        seen.world.until(lambda: seen.world.by_name["p0"].inbox)
        seen.world.end(id)
    elif when == "transfer":
        seen.world.moves = 0
        seen.world.until(lambda: seen.world.got[id])
        seen.world.end(id)
        seen.world.moves = 100
    seen.world.drain()
    assert seen.results() == ["cancelled"]
    assert seen.value("kv_transfer_failed_total") == 0 and seen.modes() == (0, 0, 0)


def soak(seed, lifecycle=Lifecycle):
    """Many requests under faults: every transfer that was opened ends once, with its numbers."""
    rates = {Fault.DROP: 0.1, Fault.CORRUPT: 0.1, Fault.DUPLICATE: 0.1, Fault.FAIL_PUSH: 0.1}
    faults = Faults(rates=rates, seed=seed, seconds=1.0)
    seen = Seen(2, 2, faults=faults, pages=12, slots=3, lifecycle=lifecycle)
    rng = np.random.default_rng(seed)
    for i in range(25):
        id = seen.world.submit(world_prompt(int(rng.integers(1, 20)), i % 4), 1 + i % 4)
        for _ in range(int(rng.integers(0, 6))):
            seen.world.round()
        if rng.random() < 0.2 and id not in seen.world.ends:
            seen.world.end(id)
    seen.world.drain()
    ids = [end.ticket.transfer_id for end in seen.ends]
    assert len(ids) == len(set(ids)) == sum(seen.world.transport.stats.opened.values())
    for end in seen.ends:
        assert end.progress.state.over and end.progress.quiescent
        if end.result == "success":
            assert end.progress.state is TransferState.SUCCESS
    done, failed = seen.results().count("success"), seen.results().count("failed")
    assert done > 5 and failed > 2
    assert sum(sum(seen.modes(name)) for name in ("d0", "d1")) == done
    assert sum(seen.value("kv_transfer_failed_total", name) for name in ("d0", "d1")) == failed
    return seen.results()


@pytest.mark.parametrize("seed", range(3))
def test_every_transfer_is_told_once(seed):
    soak(seed)


def test_the_soak_sees_transfers_that_are_not_told():
    class Forgetful(Lifecycle):
        def _free(self, attempt):
            told, self._on_transfer = self._on_transfer, lambda end: None
            super()._free(attempt)
            self._on_transfer = told

    with pytest.raises(AssertionError):
        soak(0, Forgetful)


def test_a_coordinator_tells_of_its_transfers():
    mailbox, ends = Mailbox(), []
    engines = [Threaded("p0", Role.PREFILL), Threaded("d0", Role.DECODE)]
    transport = LocalTransport({engine.name: place for engine in engines})
    for engine in engines:
        engine.transport = transport
        engine.attach(mailbox)
    coordinator = Coordinator(engines, mailbox, transport=transport, on_transfer=ends.append)
    coordinator.start(lambda events: None)
    try:
        coordinator.submit(Request("r", world_prompt(9), stop=StopOptions(max_tokens=4)))
        pump(engines, lambda: ends)
    finally:
        coordinator.stop()
    assert [(end.ticket.request_id, end.result) for end in ends] == [("r", "success")]


# ------------------------------------------------------------------ an engine's steps


class Observed(EngineBench):
    """An engine whose steps are counted."""

    def __init__(self, *, remaining=None, **changes):
        super().__init__(**changes)
        self.metrics, self.programs = Metrics("tiny"), 0
        self.engine._observer = self.observer = EngineObserver(
            self.metrics.engine("e", "both"),
            RuleOptions(name="rejection"),
            compiled=lambda: self.programs,
            remaining=remaining,
        )

    def look(self):
        """A turn that takes a snapshot."""
        self.engine._load_at = -1.0
        self.turn()

    def value(self, name, **labels):
        labels = {"model_name": "tiny", "engine": "e", "role": "both", **labels}
        found = self.metrics.registry.get_sample_value("dskjax:" + name, labels)
        assert found is not None, (name, labels)
        return found


def test_drafts_are_counted_under_the_rule_of_their_request():
    bench = Observed(drafts=3)
    rules = ["strict", None, "typical", None]
    requests = []
    for i, rule in enumerate(rules):
        accept = None if rule is None else RuleOptions(name=rule)
        request = make_request(f"r{i}", prompt(5, i), 30, accept=accept, ignore_eos=True)
        requests.append(request)
        bench.engine.submit(request)
        bench.turn(3)  # so that the batch grows
    bench.drain()
    bench.turn()  # an engine that goes idle tells at once
    drafted = sum(request.drafted for request in requests)
    accepted = sum(request.accepted for request in requests)
    assert 0 < accepted < drafted
    assert bench.value("spec_decode_num_draft_tokens_total") == drafted
    assert bench.value("spec_decode_num_accepted_tokens_total") == accepted
    tracker = bench.observer._metrics._places
    for name in ("strict", "rejection", "typical"):
        mine = [r for r, rule in zip(requests, rules, strict=True) if (rule or "rejection") == name]
        places = [place for (method, _), place in tracker.items() if method == name]
        assert sum(place._tested for place in places) == sum(r.drafted for r in mine) > 0
        assert sum(place._accepted for place in places) == sum(r.accepted for r in mine)
    assert bench.value("engine_step_seconds_count") == bench.runner.fetched
    assert bench.value("engine_host_seconds_count") == bench.runner.fetched


def test_snapshots_are_told_and_totals_are_not_counted_twice():
    bench = Observed(drafts=0, num_slots=2)
    tokens = long_answer(21, 12)
    for i in range(3):
        bench.engine.submit(make_request(f"r{i}", tokens, 12))
    bench.turn(4)
    bench.programs = 2
    bench.look()
    load = bench.engine.load()
    assert bench.value("num_requests_running") == load.running == 2
    assert bench.value("num_requests_waiting") == load.waiting == 1
    usage = 1 - load.free_pages / load.total_pages
    assert bench.value("kv_cache_usage_perc") == pytest.approx(usage) and usage > 0
    assert bench.value("compile_count_after_warmup_total") == 2
    bench.drain()
    bench.look()
    bench.look()
    stats = bench.scheduler.stats()
    assert stats.hit_tokens > 0
    assert bench.value("prefix_cache_hits_total") == stats.hit_tokens
    assert bench.value("prefix_cache_queries_total") == stats.queried_tokens
    assert bench.value("compile_count_after_warmup_total") == 2
    assert bench.value("kv_cache_usage_perc") == 0
    assert bench.value("mean_output_length") == 12


def test_preemptions_are_counted():
    bench = Observed(num_pages=20)
    for i in range(6):
        bench.engine.submit(make_request(f"r{i}", prompt(3 + 5 * i, i), 20))
    bench.drain()
    bench.look()
    assert bench.value("num_preemptions_total") == bench.scheduler.stats().preemptions > 0


def test_remaining_slots_stay_as_they_were_while_nobody_knows_them():
    answers = iter([7, None, None, 5])
    bench = Observed(remaining=lambda engine: next(answers))
    for expected in (7, 7, 7, 5):
        bench.look()
        assert bench.value("remaining_slots") == expected
