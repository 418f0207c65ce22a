"""States, life, cancellation, leases and ends of transfers."""

import dataclasses
import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.transfer.states import (
    LEGAL,
    CancelResult,
    IllegalTransitionError,
    TransferState,
    advance,
    agree,
)
from serve.transfer.transport import Endpoint, IncompatibleError, KVForm
from tests.serve.transfer_bench import FORM, Bench

S = TransferState


# --- states --------------------------------------------------------------------------------------


@pytest.mark.parametrize(("old", "new"), list(itertools.product(S, S)))
def test_only_listed_transitions_are_legal(old, new):
    listed = {
        (S.BOOTSTRAPPING, S.WAITING_FOR_INPUT),
        (S.WAITING_FOR_INPUT, S.TRANSFERRING),
        (S.TRANSFERRING, S.SUCCESS),
    }
    fails = new is S.FAILED and not old.over
    if (old, new) in listed or fails:
        assert advance(old, new) is new
    else:
        with pytest.raises(IllegalTransitionError, match=f"{old.name} to {new.name}"):
            advance(old, new)
    assert set(LEGAL) == set(S)


def test_ranks_agree_on_the_minimum():
    assert agree([S.SUCCESS, S.TRANSFERRING, S.SUCCESS]) is S.TRANSFERRING
    assert agree([S.SUCCESS, S.FAILED]) is S.FAILED
    with pytest.raises(ValueError):
        agree([])


def test_cancel_results_say_who_may_free():
    free = {result for result in CancelResult if result.may_free}
    assert free == {
        CancelResult.NOT_FOUND,
        CancelResult.ALREADY_COMPLETE,
        CancelResult.CANCELLED_BEFORE_ADVERTISE,
    }


# --- plain data ----------------------------------------------------------------------------------


@pytest.mark.parametrize("field", [f.name for f in dataclasses.fields(KVForm)])
def test_every_field_of_the_form_counts(field):
    value = getattr(FORM, field)
    other = dataclasses.replace(FORM, **{field: value + (1 if isinstance(value, int) else "x")})
    assert other.digest != FORM.digest
    with pytest.raises(IncompatibleError, match=f"engines a .* and b .*{field}: "):
        Endpoint("a", FORM).check(Endpoint("b", other))
    Endpoint("a", FORM).check(Endpoint("b", dataclasses.replace(FORM)))


def test_mismatch_is_refused_before_any_byte_moves():
    bench = Bench()
    bench.transport.register(
        Endpoint("d", dataclasses.replace(FORM, page_size=8)), lambda *part: None
    )
    with pytest.raises(IncompatibleError, match="page_size: 4 != 8"):
        bench.open()
    bench.run()
    assert not bench.packets


@pytest.mark.parametrize(
    ("tokens", "skip", "pages"), [(1, 0, (0, 1)), (4, 0, (0, 1)), (5, 4, (1, 2)), (12, 8, (2, 3))]
)
def test_ticket_counts_pages(tokens, skip, pages):
    ticket = Bench().open(tokens=tokens, skip=skip)
    assert ticket.pages == pages
    assert ticket.nbytes == (pages[1] - pages[0]) * 320
    assert ticket.transfer_id == "r#0"


@pytest.mark.parametrize(("tokens", "skip"), [(0, 0), (4, 8), (8, 2), (8, -4)])
def test_ticket_refuses_bad_counts(tokens, skip):
    with pytest.raises(ValueError, match="must be"):
        Bench().open(tokens=tokens, skip=skip)


# --- the life of a transfer ----------------------------------------------------------------------


def test_transfer_from_open_to_success():
    bench = Bench()
    ticket = bench.open()
    assert bench.state(ticket) is S.WAITING_FOR_INPUT
    assert bench.push(ticket)
    assert bench.state(ticket) is S.TRANSFERRING
    assert not bench.transport.poll("r#0").quiescent
    assert bench.transport.backlog("p") == 100
    bench.run()
    assert bench.transport.backlog("p") == 0
    assert bench.state(ticket) is S.TRANSFERRING  # delivered, not acknowledged
    bench.acknowledge()
    progress = bench.transport.poll("r#0")
    assert progress == (S.SUCCESS, True, 1, 1, 1, 100, "")
    assert "r#0" in bench.changed
    bench.transport.close("r#0")
    assert bench.transport.poll("r#0").state is S.FAILED
    assert bench.transport.stats.transfers == {"success": 1}


@given(order=st.permutations(range(4)), late=st.permutations(range(4)))
def test_parts_in_any_order_of_acknowledgement(order, late):
    bench = Bench()
    ticket = bench.open(tokens=8)
    for i in order:
        if i != 3:
            bench.push(ticket, i, False, (i % 2, i % 2 + 1), (i // 2, i // 2 + 1))
    bench.push(ticket, 3, True, (1, 2), (1, 2))
    bench.run()
    for i in late:
        assert bench.state(ticket) is S.TRANSFERRING
        bench.transport.acknowledge("r#0", i, True)
    assert bench.state(ticket) is S.SUCCESS


def test_transfer_that_leaves_a_hole_never_succeeds():
    bench = Bench()
    ticket = bench.open(tokens=8)
    bench.push(ticket, 0, False, (0, 2), (0, 1))
    bench.push(ticket, 1, True, (0, 1), (1, 2))  # the second layer of the second page is missing
    bench.run()
    bench.acknowledge()
    assert bench.state(ticket) is S.TRANSFERRING


def test_missing_index_never_succeeds():
    bench = Bench()
    ticket = bench.open(tokens=8)
    bench.push(ticket, 1, True)
    bench.run()
    bench.acknowledge()
    assert bench.state(ticket) is S.TRANSFERRING


@pytest.mark.parametrize("index", [0, 2])
def test_part_pushed_twice_or_after_the_last_fails(index):
    bench = Bench()
    ticket = bench.open(tokens=8)
    bench.push(ticket, 0, False, (0, 1))
    bench.push(ticket, 1, True, (1, 2))
    assert not bench.push(ticket, index, False)
    assert bench.state(ticket) is S.FAILED


def test_disagreeing_checksum_fails():
    bench = Bench()
    ticket = bench.open()
    bench.push(ticket)
    bench.run()
    bench.acknowledge(ok=False)
    progress = bench.transport.poll("r#0")
    assert progress.state is S.FAILED and "checksum of part 0" in progress.why
    bench.transport.acknowledge("r#0", 0, True)
    assert bench.state(ticket) is S.FAILED


def test_generations_are_different_transfers():
    bench = Bench()
    old = bench.open()
    bench.push(old)
    bench.transport.cancel("r#0")
    new = bench.open(generation=1)
    bench.run()
    bench.transport.acknowledge("r#0", 0, True)
    assert bench.state(new) is S.WAITING_FOR_INPUT
    with pytest.raises(ValueError, match="generation"):
        bench.open(generation=1)


def test_close_before_the_end_raises():
    bench = Bench()
    ticket = bench.open()
    bench.push(ticket)
    with pytest.raises(RuntimeError, match="cancel it"):
        bench.transport.close("r#0")
    bench.transport.cancel("r#0")
    with pytest.raises(RuntimeError):
        bench.transport.close("r#0")
    bench.run()
    bench.transport.close("r#0")
    bench.transport.close("r#0")
