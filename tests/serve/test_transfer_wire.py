"""Packets, times, injected faults and checksums of transfers."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.transfer.checks import PendingChecks, checksum
from serve.transfer.faults import Fault, Faults, Rule
from serve.transfer.states import (
    TransferState,
)
from serve.transfer.transport import Mode
from tests.serve.transfer_bench import Bench, part

S = TransferState


# --- packets and times ---------------------------------------------------------------------------


def test_small_parts_that_wait_together_are_merged():
    bench = Bench(seconds=1.0, merge_bytes=250)
    tickets = [bench.open(f"r{i}") for i in range(5)]
    for ticket in tickets[:4]:
        bench.push(ticket, nbytes=100)
    bench.push(tickets[4], nbytes=1000)
    for _ in range(5):
        assert bench.transport._step_source(bench.transport._sources["p"])
    bench.run()
    assert bench.packets == [2, 2, 1]
    assert (bench.transport.stats.packets, bench.transport.stats.parts) == (3, 5)
    assert bench.transport.stats.merged == 4
    assert bench.transport.stats.nbytes == 1400
    assert [ticket for ticket, _ in bench.delivered] == tickets


def test_parts_of_one_transfer_are_not_counted_as_merged():
    bench = Bench()
    ticket = bench.open()
    bench.push(ticket, 0, False, (0, 1))
    bench.push(ticket, 1, True, (1, 2))
    for _ in range(2):
        bench.transport._step_source(bench.transport._sources["p"])
    bench.run()
    assert bench.packets == [2] and bench.transport.stats.merged == 0


def test_outstanding_packets_are_bounded_and_nothing_is_refused():
    bench = Bench(merge_bytes=0, outstanding=3)
    most = 0
    tickets = [bench.open(f"r{i}") for i in range(20)]
    assert all(bench.push(ticket) for ticket in tickets)
    while bench.transport.step():
        most = max(most, len(bench.transport._targets["d"].flying))
    assert most == 3 and len(bench.delivered) == 20


@pytest.mark.parametrize(
    ("computes", "overlap"),
    [
        # Moving a part takes one second, each waits for the one before.
        ([0, 0, 0, 0], 0.0),  # all computed at once: 4 s of transfer after the end of compute
        ([0, 2, 4, 6], 0.75),  # only the last part's second is not hidden
        ([0, 1, 2, 3], 0.75),
    ],
)
def test_overlap_is_the_hidden_part_of_the_transfer(computes, overlap):
    bench = Bench(seconds=1.0, merge_bytes=0, outstanding=1)
    ticket = bench.open(tokens=8, mode=Mode.LAYERWISE)
    source, target = bench.transport._sources["p"], bench.transport._targets["d"]
    for i, when in enumerate(computes):
        bench.clock.now = max(bench.clock.now, float(when))
        last = i == len(computes) - 1
        bench.push(ticket, i, last, (i % 2, i % 2 + 1), (i // 2, i // 2 + 1))
        bench.transport._step_source(source)
        later = computes[i + 1] if not last else 1e9
        while bench.clock.now < later and bench.transport._step_target(target):
            pass
    bench.acknowledge()
    assert bench.state(ticket) is S.SUCCESS
    line = bench.transport.timeline("r#0")
    assert line.alone == 4.0 and line.computed == computes[-1]
    assert line.overlap == pytest.approx(overlap)
    stats = bench.transport.stats
    assert stats.overlap_sum / stats.overlap_count == pytest.approx(overlap)


def test_merged_parts_share_the_time_by_bytes():
    bench = Bench(seconds=1.0)
    small, large = bench.open("a"), bench.open("b")
    bench.push(small, nbytes=100)
    bench.push(large, nbytes=300)
    for _ in range(2):
        bench.transport._step_source(bench.transport._sources["p"])
    bench.run()
    assert bench.transport.timeline("a#0").alone == 0.25
    assert bench.transport.timeline("b#0").alone == 0.75
    assert bench.transport.stats.overlap_count == 0  # only of layerwise ones that succeeded


# --- faults --------------------------------------------------------------------------------------


def test_dropped_part_leaves_the_transfer_open_and_quiet():
    bench = Bench(rules=[Rule(fault=Fault.DROP)])
    ticket = bench.open()
    bench.push(ticket)
    bench.run()
    progress = bench.transport.poll("r#0")
    assert progress.state is S.TRANSFERRING and progress.quiescent and not bench.delivered


def test_duplicate_delays_success_until_it_has_landed():
    bench = Bench(rules=[Rule(fault=Fault.DUPLICATE, seconds=1.0)])
    ticket = bench.open()
    bench.push(ticket)
    bench.run()
    bench.acknowledge()
    assert bench.state(ticket) is S.TRANSFERRING, "the second copy would overwrite decoded rows"
    bench.clock.now = 1.0
    bench.run()
    assert bench.state(ticket) is S.TRANSFERRING
    bench.acknowledge()
    assert bench.state(ticket) is S.SUCCESS


@pytest.mark.parametrize("second", [True, False])
def test_reordered_part_comes_after_the_next_or_late(second):
    bench = Bench(rules=[Rule(fault=Fault.REORDER, part=0, seconds=3.0)], merge_bytes=0)
    ticket = bench.open()
    bench.push(ticket, 0, False, (0, 1))
    bench.run()
    assert not bench.delivered
    if second:
        bench.push(ticket, 1, True, (1, 2))
    else:
        bench.clock.now = 3.0
    bench.run()
    assert [part.index for _, part in bench.delivered] == ([1, 0] if second else [0])


def test_corrupt_part_differs_from_its_checksum():
    bench = Bench(rules=[Rule(fault=Fault.CORRUPT, part=1)], merge_bytes=0)
    ticket = bench.open()
    bench.push(ticket, 0, False, (0, 1))
    bench.push(ticket, 1, True, (1, 2))
    bench.run()
    agree = [checksum([part.arrays]) == part.checksum for _, part in bench.delivered]
    assert agree == [True, False]


@pytest.mark.parametrize("state", [s for s in S if s is not S.FAILED])
def test_failure_can_be_injected_at_each_state(state):
    bench = Bench(rules=[Rule(fault=Fault.FAIL_STATE, state=state)])
    ticket = bench.open()
    bench.push(ticket)
    bench.run()
    bench.acknowledge()
    progress = bench.transport.poll("r#0")
    assert progress.state is S.FAILED and state.name in progress.why


def test_failed_push_and_lost_acknowledgement():
    bench = Bench(rules=[Rule(fault=Fault.FAIL_PUSH, transfer="a#0"), Rule(fault=Fault.LOSE_ACK)])
    assert not bench.push(first := bench.open("a"))
    bench.push(second := bench.open("b"))
    bench.run()
    bench.acknowledge()
    assert bench.state(first) is S.FAILED and bench.state(second) is S.TRANSFERRING


def test_faults_are_deterministic_by_seed():
    def draws(seed):
        faults = Faults(rates={Fault.DROP: 0.3, Fault.DELAY: 0.5}, seed=seed)
        ticket = Bench().open()
        return [faults.fate(ticket, part(i)) for i in range(50)]

    assert draws(1) == draws(1) != draws(2)
    assert {len(fate.copies) for fate in draws(1)} == {0, 1}


def test_faults_are_read_from_text():
    faults = Faults.parse("drop=0.25,lose-ack=1,seconds=0.5,seed=3")
    assert faults._rates == {Fault.DROP: 0.25, Fault.LOSE_ACK: 1.0}
    assert faults._seconds == 0.5
    for text in ("drop=2", "nonsense=1"):
        with pytest.raises(ValueError, match=text):
            Faults.parse(text)


# --- checksums -----------------------------------------------------------------------------------


@given(st.data())
def test_checksum_sees_any_changed_element(data):
    dtype = data.draw(st.sampled_from(["u1", "f2", "i4", "f8"]))
    shape = data.draw(st.tuples(st.integers(1, 3), st.integers(1, 4), st.integers(1, 5)))
    count = int(np.prod(shape)) * np.dtype(dtype).itemsize
    raw = data.draw(st.binary(min_size=count, max_size=count))
    one = np.frombuffer(raw, dtype).reshape(shape)
    changed = bytearray(raw)
    at = data.draw(st.integers(0, count - 1))
    changed[at] ^= data.draw(st.integers(1, 255))
    other = np.frombuffer(bytes(changed), dtype).reshape(shape)
    assert checksum([one]) != checksum([other])


def test_checksum_sees_order_padding_and_lost_leaves():
    pages = np.arange(24, dtype=np.int32).reshape(2, 4, 3)
    swapped = pages[:, [1, 0, 2, 3]]
    assert checksum([pages]) != checksum([swapped])
    assert checksum([pages, pages + 1]) != checksum([pages + 1, pages])
    assert checksum([pages]) != checksum([pages, np.zeros((0, 0), np.int32)])
    padded = pages.copy()
    padded[:, 3] = -7
    assert checksum([pages]) != checksum([padded])
    assert checksum([pages], pages=3) == checksum([padded], pages=3)
    zeros = np.zeros((1, 2, 2), np.int32)
    assert checksum([zeros]) != checksum([np.zeros((1, 2, 3), np.int32)])


class Soon:
    """Like a scalar on a device: not ready at first, and equal to another by its value."""

    def __init__(self, value):
        self.value, self.ready = value, False

    def is_ready(self):
        return self.ready

    def __int__(self):
        return self.value

    def __eq__(self, other):
        return int(self) == int(other)

    __hash__ = None


def test_checks_wait_until_both_sides_are_ready():
    checks = PendingChecks()
    early, late = Soon(5), Soon(6)
    checks.add("a#0", 0, early, 5)
    checks.add("b#0", 1, 7, late)
    assert checks.poll() == [] and len(checks) == 2
    early.ready = True
    assert checks.poll() == [("a#0", 0, True)]
    late.ready = True
    assert checks.poll() == [("b#0", 1, False)]
    assert len(checks) == 0 and checks.poll() == []


def test_two_copies_of_a_part_are_two_even_if_one_is_ready_first():
    """Their scalars are equal; an acknowledgement that got lost would keep the transfer open."""
    checks = PendingChecks()
    early, late = Soon(5), Soon(5)
    for actual in (early, late):
        checks.add("a#0", 0, 5, actual)
    early.ready = True
    assert checks.poll() == [("a#0", 0, True)] and len(checks) == 1
    late.ready = True
    assert checks.poll() == [("a#0", 0, True)] and len(checks) == 0
