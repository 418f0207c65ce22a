"""How transfers end early: cancellation, leases, engines that go away."""

import pytest

from serve.transfer.faults import Fault, Rule
from serve.transfer.states import (
    CancelResult,
    TransferState,
)
from serve.transfer.transport import Endpoint, Quarantine
from tests.serve.transfer_bench import FORM, Bench

S = TransferState


# --- cancellation --------------------------------------------------------------------------------


def test_cancel_tells_whether_memory_may_be_reused():
    bench = Bench(rules=[Rule(fault=Fault.DELAY, seconds=2.0)])
    cancel = bench.transport.cancel
    assert cancel("r#0") is CancelResult.NOT_FOUND
    ticket = bench.open()
    assert cancel("r#0") is CancelResult.CANCELLED_BEFORE_ADVERTISE
    assert not bench.push(ticket)
    ticket = bench.open(generation=1)
    bench.push(ticket)
    bench.run()  # on the wire for two seconds
    assert cancel("r#1") is CancelResult.CANCEL_REQUESTED_IN_FLIGHT
    assert bench.transport._quarantine.nbytes == ticket.nbytes
    bench.clock.now = 1.9
    bench.run()
    assert not bench.transport.poll("r#1").quiescent
    bench.clock.now = 2.0
    bench.changed.clear()
    bench.run()
    assert bench.transport.poll("r#1").quiescent and bench.changed == ["r#1"]
    assert len(bench.delivered) == 1, "what is on the wire arrives"
    assert cancel("r#1") is CancelResult.ALREADY_COMPLETE
    assert bench.transport._quarantine.nbytes == 0


def test_part_that_was_not_sent_is_recalled():
    bench = Bench()
    ticket = bench.open()
    bench.push(ticket)
    bench.transport.cancel("r#0")
    bench.run()
    assert not bench.packets and bench.transport.poll("r#0").quiescent
    assert bench.transport.backlog("p") == 0
    assert bench.transport.stats.transfers == {"cancelled": 1}


def test_quarantine_over_its_budget_is_unhealthy():
    rules = [Rule(fault=Fault.DELAY, seconds=9.0, times=2)]
    bench = Bench(rules=rules, quarantine=Quarantine(1000, 60.0))
    for generation in range(2):
        bench.push(bench.open(generation=generation))
    bench.run()
    assert bench.transport.cancel("r#0") is CancelResult.CANCEL_REQUESTED_IN_FLIGHT
    assert bench.transport.healthy
    assert bench.transport.cancel("r#1") is CancelResult.BACKEND_UNHEALTHY
    assert not bench.transport.healthy
    bench.clock.now = 9.0
    bench.run()
    assert bench.transport.healthy


def test_quarantine_does_not_wait_for_ever():
    quarantine = Quarantine(1000, 60.0)
    quarantine.add("a", 10, 0.0)
    quarantine.add("a", 10, 50.0)
    assert quarantine.nbytes == 10
    assert quarantine.healthy(60.0) and not quarantine.healthy(60.1)
    quarantine.acknowledge("a")
    assert quarantine.healthy(99.0)


# --- leases --------------------------------------------------------------------------------------


def test_lease_runs_from_the_last_part_and_is_extended():
    bench = Bench()
    ticket = bench.open()
    bench.clock.now = 100.0
    assert bench.transport.expired("p") == []  # nothing was finished
    bench.push(ticket)
    bench.clock.now = 129.0
    bench.run()  # activity: until 149
    bench.clock.now = 148.0
    assert bench.transport.expired("p") == []
    bench.transport.heartbeat(["r#0", "unknown"])  # until 168
    bench.clock.now = 167.0
    assert bench.transport.expired("p") == []
    bench.clock.now = 168.0
    assert bench.transport.expired("d") == []
    assert bench.transport.expired("p") == ["r#0"]
    assert bench.transport.expired("p") == []
    progress = bench.transport.poll("r#0")
    assert progress.state is S.FAILED and "lease" in progress.why
    assert bench.transport.stats.expired == 1


def test_heartbeat_never_shortens_a_lease():
    bench = Bench()
    bench.push(bench.open())
    bench.transport.heartbeat(["r#0"])  # two thirds from now are less than what is left
    bench.clock.now = 29.0
    assert bench.transport.expired("p") == []


def test_expired_pages_are_named_when_nothing_reads_them():
    bench = Bench(rules=[Rule(fault=Fault.DELAY, seconds=99.0)])
    bench.push(bench.open())
    bench.run()
    bench.clock.now = 50.0
    assert bench.transport.expired("p") == []
    bench.clock.now = 99.0
    bench.run()
    bench.clock.now = 150.0
    assert bench.transport.expired("p") == ["r#0"]


# --- engines come and go -------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["p", "d"])
@pytest.mark.parametrize("again", [False, True])
def test_transfers_of_an_engine_that_went_fail(name, again):
    bench = Bench()
    ticket = bench.open()
    bench.push(ticket)
    if again:
        bench.transport.register(Endpoint(name, FORM), lambda *part: bench.delivered.append(part))
    else:
        bench.transport.unregister(name)
    bench.run()
    progress = bench.transport.poll("r#0")
    assert progress.state is S.FAILED and name in progress.why
    assert progress.quiescent and not bench.delivered
    if again:
        fresh = bench.open(generation=1)
        bench.push(fresh)
        bench.run()
        assert bench.transport.poll("r#1").delivered == 1
    else:
        with pytest.raises(KeyError):
            bench.open(generation=1)


def test_late_part_is_not_given_to_the_next_incarnation():
    bench = Bench(rules=[Rule(fault=Fault.DELAY, seconds=1.0)])
    bench.push(bench.open())
    bench.run()
    bench.transport.register(Endpoint("d", FORM), lambda *part: bench.delivered.append(part))
    bench.clock.now = 2.0
    bench.run()
    assert not bench.delivered and bench.transport.poll("r#0").quiescent


def test_failing_device_fails_only_its_transfers(caplog):
    bench = Bench(merge_bytes=0)
    broken, sound = bench.open("a"), bench.open("b")

    def place(packet, ranks):
        if not bench.packets:
            bench.packets.append(1)
            raise RuntimeError("no memory")
        return packet

    bench.transport._place["d"] = place
    bench.push(broken)
    bench.push(sound)
    bench.run()
    bench.acknowledge()
    assert "no memory" in bench.transport.poll("a#0").why
    assert bench.transport.poll("a#0").quiescent
    assert bench.state(sound) is S.SUCCESS
    assert "was lost" in caplog.text


def test_engine_that_refuses_a_part_fails_the_transfer(caplog):
    bench = Bench()

    def deliver(ticket, part):
        raise RuntimeError("broken engine")

    bench.transport.register(Endpoint("d", FORM), deliver)
    bench.push(bench.open())
    bench.run()
    progress = bench.transport.poll("r#0")
    assert progress.state is S.FAILED and "broken engine" in progress.why and progress.quiescent
    assert "did not take" in caplog.text
