"""A request's life across engines: right tokens, everything given back, no deadlock."""

import dataclasses

import pytest

from serve.engine_api import Role
from serve.lifecycle import Lifecycle
from serve.request import FinishReason, StopOptions
from serve.router import Router
from serve.transfer.faults import Fault, Faults, Rule
from serve.transfer.local import LocalTransport
from serve.transfer.states import TransferState
from serve.transfer.transport import IncompatibleError, Mode
from tests.serve.pd_fakes import FORM, FakeEngine, answer
from tests.serve.pd_world import CONFIG, World, prompt


@pytest.mark.parametrize("length", [1, 3, 4, 5, 9, 12, 17, 30])
def test_request_goes_through_both_engines(length):
    world = World()
    id = world.submit(prompt(length), 6)
    world.drain()
    summary = world.summary(id)
    assert world.served(id)
    assert summary.tokens_transferred == length > 0
    assert summary.mode is (Mode.LAYERWISE if length >= 12 else Mode.WHOLE)
    assert (summary.prefill, summary.decode, summary.failures) == ("p0", "d0", 0)


def test_target_is_sent_only_what_its_prefix_cache_lacks():
    world = World()
    world.submit(prompt(12), 4)
    world.drain()
    before = world.transport.stats.nbytes
    id = world.submit(prompt(12) + [5, 6], 4)
    world.drain()
    assert world.summary(id).tokens_transferred == 2
    assert world.transport.stats.nbytes - before == 1 * FORM.page_bytes
    assert world.requests[id].hit == 12


def test_one_token_needs_no_transfer():
    world = World()
    id = world.submit(prompt(5), 1)
    world.drain()
    assert world.got[id] == answer(prompt(5), StopOptions(max_tokens=1))
    assert world.summary(id).tokens_transferred == 0


def test_first_token_comes_before_the_transfer_ends():
    world = World(faults=Faults([Rule(fault=Fault.DELAY, seconds=1.0)]))
    id = world.submit(prompt(5), 4)
    world.until(lambda: world.got[id])
    assert len(world.got[id]) == 1 and id not in world.ends
    world.drain()


@pytest.mark.parametrize("state", TransferState)
def test_failure_at_every_state_is_retried(state):
    world = World(faults=Faults([Rule(fault=Fault.FAIL_STATE, state=state)]))
    id = world.submit(prompt(9), 5)
    world.drain()
    injected = world.faults.injected[Fault.FAIL_STATE]
    assert injected == (state is not TransferState.FAILED)
    assert world.summary(id).failures == injected
    assert world.served(id)


@pytest.mark.parametrize("fault", [f for f in Fault if f is not Fault.FAIL_STATE])
@pytest.mark.parametrize("length", [6, 30])
@pytest.mark.parametrize("part", [0, 1, None])
def test_every_fault_is_survived(fault, length, part):
    world = World(2, 2, faults=Faults([Rule(fault=fault, part=part, seconds=0.7)]))
    ids = [world.submit(prompt(length, seed), 5) for seed in range(3)]
    world.drain()
    assert world.served(*ids)
    if fault in (Fault.DROP, Fault.CORRUPT, Fault.FAIL_PUSH, Fault.LOSE_ACK):
        failures = sum(world.summary(id).failures for id in ids)
        assert failures == world.faults.injected[fault]


def test_retry_keeps_the_tokens_that_were_sent():
    world = World(faults=Faults([Rule(fault=Fault.CORRUPT)]))
    id = world.submit(prompt(6), 5)
    world.drain()
    summary = world.summary(id)
    # One token came from each prefill, so the second transfer moved one row more.
    assert (summary.failures, summary.tokens_transferred) == (1, 7)


def test_request_that_always_fails_ends_with_an_error():
    world = World(faults=Faults(rates={Fault.CORRUPT: 1.0}))
    id = world.submit(prompt(6), 9)
    world.drain()
    assert world.ends[id].finish is FinishReason.ERROR
    assert "checksum" in world.ends[id].message
    assert world.summary(id).failures == CONFIG.retries + 1


@pytest.mark.parametrize("rounds", range(12))
@pytest.mark.parametrize("reason", [FinishReason.ABORT, FinishReason.STOP])
def test_end_in_every_state_gives_everything_back(rounds, reason):
    faults = Faults([Rule(fault=Fault.DELAY, seconds=0.5, times=9)])
    world = World(faults=faults, chunk=4)
    id = world.submit(prompt(14), 8)
    other = world.submit(prompt(5, 2), 8)
    for _ in range(rounds):
        world.round()
    world.end(id, reason)
    world.drain()
    assert world.served(other)
    assert id not in world.ends


@pytest.mark.parametrize("victim", ["p0", "d0"])
@pytest.mark.parametrize("rounds", range(10))
def test_killed_engine_costs_no_request(victim, rounds):
    world = World(2, 2, chunk=4)
    ids = [world.submit(prompt(14, seed), 8) for seed in range(4)]
    for _ in range(rounds):
        world.round()
    world.by_name[victim].kill()
    world.drain()
    assert world.served(*ids)
    world.by_name[victim].revive()
    world.round()
    assert victim not in world.life.books.dead
    more = [world.submit(prompt(14, seed + 9), 8) for seed in range(4)]
    world.drain()
    used = {world.summary(id).prefill for id in more} | {world.summary(id).decode for id in more}
    assert victim in used


@pytest.mark.parametrize("call", range(6))
@pytest.mark.parametrize("victim", ["p0", "d0"])
def test_call_that_is_lost_ends_by_deadline(victim, call):
    """An engine that silently misses a call: nothing waits for ever."""
    world = World(2, 2)
    ids = [world.submit(prompt(6, seed), 4) for seed in range(3)]
    for _ in range(call):
        world.round()
    engine = world.by_name[victim]
    engine.lost = 1
    world.until(lambda: world.life.idle)
    engine.lost = 0
    assert world.served(*ids)


def test_tiny_pools_do_not_deadlock():
    world = World(pages=5, slots=2)
    ids = [world.submit(prompt(5 + i % 9, i), 4) for i in range(20)]
    world.drain()
    assert world.served(*ids)


def test_no_request_is_held_without_room_where_it_decodes():
    """Else two prefilled requests could each wait for the other's room."""
    world = World(pages=5, slots=4)
    for seed in range(2):
        world.submit(prompt(13, seed), 2)
    for _ in range(40):
        world.round()
        held = sum(run.held for run in world.by_name["p0"].runs.values())
        assert held <= len(world.by_name["d0"].runs) + 1
    world.drain()


def test_priority_comes_first_then_arrival():
    world = World(slots=1)
    ids = [
        world.submit(prompt(5, seed), 3, priority=priority)
        for seed, priority in enumerate([1, 1, 0, 2, 0])
    ]
    world.drain()
    order = sorted(ids[1:], key=lambda id: list(world.ends).index(id))
    assert order == [ids[2], ids[4], ids[1], ids[3]]


@pytest.mark.parametrize("slots", [0, 1])
def test_decoding_engine_prefills_short_prompts_when_prefill_queues(slots):
    config = dataclasses.replace(
        CONFIG, local_prefill_tokens=6, local_prefill_queue=20, local_prefill_slots=slots
    )
    world = World(config=config, pages=64, slots=8)
    long = [world.submit(prompt(30, seed), 3) for seed in range(2)]
    short = world.submit(prompt(5), 3)
    world.drain()
    assert [world.summary(id).prefill for id in long] == ["p0", "p0"]
    # By the mean answer, not one more such request fits: one slot is not left over.
    assert world.summary(short).prefill == ("p0" if slots else "")
    assert world.summary(short).tokens_transferred == (5 if slots else 0)


def test_prefill_queue_is_bounded():
    config = dataclasses.replace(CONFIG, prefill_queue_tokens=20)
    world = World(config=config, pages=64, slots=8)
    for seed in range(5):
        world.submit(prompt(9, seed), 3)
    assert len(world.life.books.attempts) == 2
    world.submit(prompt(40), 3)  # longer than the bound: goes when nothing else is queued
    world.drain()


def test_in_flight_batching_needs_no_transport():
    world = World(prefill=0, decode=2)
    ids = [world.submit(prompt(9, seed), 5) for seed in range(6)]
    for _ in range(3):
        world.round()
    world.by_name["e0"].kill()
    world.drain()
    assert world.served(*ids)


def test_unhealthy_transport_starts_nothing():
    world = World()
    world.transport._quarantine.budget = 0
    world.transport._quarantine.add("somebody", 1, world.now)
    id = world.submit(prompt(5), 3)
    for _ in range(20):
        world.round()
    assert not world.got[id] and not world.life.able
    world.transport._quarantine.acknowledge("somebody")
    world.drain()
    assert world.served(id)


def test_request_that_finds_no_room_in_time_ends_with_an_error():
    world = World(config=dataclasses.replace(CONFIG, queue_timeout=1.0))
    world.by_name["p0"].kill()
    world.round()
    id = world.submit(prompt(5), 3)
    world.drain()
    assert world.ends[id].finish is FinishReason.ERROR and "no engine" in world.ends[id].message


def test_engines_of_different_forms_are_refused_by_name():
    other = dataclasses.replace(FORM, kv_dtype="fp8", layers=9)
    engines = [FakeEngine("left", Role.PREFILL), FakeEngine("right", Role.DECODE, compat=other)]
    transport = LocalTransport({}, threads=False)
    with pytest.raises(IncompatibleError, match="left.*right.*kv_dtype: 'int64' != 'fp8'; layers"):
        Lifecycle(engines, transport, Router(), CONFIG, lambda events: None)


@pytest.mark.parametrize(
    "roles", [[], [Role.PREFILL], [Role.DECODE], [Role.IFB, Role.PREFILL, Role.DECODE]]
)
def test_roles_must_make_a_server(roles):
    engines = [FakeEngine(f"e{i}", role) for i, role in enumerate(roles)]
    with pytest.raises(ValueError, match="use ifb alone"):
        Lifecycle(engines, LocalTransport({}, threads=False), Router(), CONFIG, print)
