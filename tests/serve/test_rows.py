"""Requests as arrays: what a step and an admission are handed, padding included."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskjax.decode.rules import RULE_NAMES, RuleOptions, ThinkIds
from serve.buckets import Variant
from serve.plan import Chunk
from serve.request import MAX_STOP_TOKENS
from serve.rows import (
    ADMIT_ROWS,
    admission,
    decode_rows,
    is_thinking,
    needs,
    option_row,
    prefill_rows,
    row_options,
    token_counts,
)
from tests.serve.stack import make_request

SLOTS, WIDTH = 6, 5
TABLE = np.arange(SLOTS * WIDTH, dtype=np.int32).reshape(SLOTS, WIDTH)
STRICT = RuleOptions.parse("strict")


def placed(id, prompt, slot, said=(), **options):
    request = make_request(id, prompt, **options)
    request.slot = slot
    request.tokens += said
    return request


def options(request, drafts=3, eos_ids=()):
    return option_row(request, accept=STRICT, drafts=drafts, eos_ids=eos_ids)


@given(st.permutations(range(SLOTS)), st.integers(0, 4), st.integers(1, WIDTH))
def test_decoding_rows_are_padded_with_a_slot_that_does_not_exist(order, count, columns):
    slots = np.array(order[:count], np.int32)
    found = decode_rows(slots, TABLE, 4, columns, np.ones(3, np.float32))
    assert found.slots.dtype == found.page_table.dtype == np.int32
    assert found.slots.tolist() == [*slots, *[SLOTS] * (4 - count)]
    np.testing.assert_array_equal(found.page_table[:count], TABLE[slots, :columns])
    assert (found.page_table[count:] == -1).all()


def test_rows_do_not_share_memory_with_the_scheduler():
    """Its page table changes while the step still waits for the device."""
    table, slots = TABLE.copy(), np.array([2, 1], np.int32)
    decode = decode_rows(slots, table, 2, WIDTH, np.ones(3, np.float32))
    prefill = prefill_rows([Chunk(placed("a", [1, 2, 3], 4), 0, 2)], table, (1, 2), WIDTH, 1)
    table[:] = -7
    slots[:] = -7
    for array in (decode.slots, decode.page_table, prefill.page_table):
        assert (np.asarray(array) >= 0).all()


def test_prompt_rows_and_the_tokens_that_follow_them():
    prompt = list(range(10, 20))
    chunks = [Chunk(placed("a", prompt, 4), 3, 4), Chunk(placed("b", [7, 8], 1), 0, 1)]
    found = prefill_rows(chunks, TABLE, (3, 5), 4, 2)
    assert found.slots.tolist() == [4, 1, SLOTS]
    assert found.token_ids.tolist()[0][:4] == [13, 14, 15, 16] and found.token_ids[1, 0] == 7
    assert found.following[0, :4].tolist() == [[14, 15], [15, 16], [16, 17], [17, 18]]
    assert found.following[1, 0].tolist() == [8, 0]  # beyond what is known anything will do
    assert found.cached_lens.tolist() == [7, 1, 0] and found.query_lens.tolist() == [4, 1, 0]
    np.testing.assert_array_equal(found.page_table[:2], TABLE[[4, 1], :4])
    assert (found.page_table[2] == -1).all()
    assert prefill_rows(chunks, TABLE, (3, 5), 4, 0).following.shape == (3, 5, 0)
    assert found.targets is None


@pytest.mark.parametrize("depths", [0, 1, 3])
def test_the_target_of_a_row_is_the_token_after_it(depths):
    """At the end of a chunk too, where it is the first of the next one."""
    prompt = list(range(10, 20))
    chunks = [Chunk(placed("a", prompt, 4), 3, 4), Chunk(placed("b", prompt, 1), 4, 5)]
    targets = prefill_rows(chunks, TABLE, (3, 5), 4, depths, True).targets
    assert targets is not None and targets.shape == (3, 5) and targets.dtype == np.int32
    assert targets[0, :4].tolist() == [14, 15, 16, 17]
    assert targets[1].tolist() == [15, 16, 17, 18, 19]


def test_options_of_a_request():
    request = make_request(
        "a",
        [1, 2],
        temperature=0.5,
        top_p=0.9,
        top_k=7,
        min_p=0.1,
        seed=2**32 - 1,
        presence_penalty=0.25,
        frequency_penalty=0.5,
        repetition_penalty=1.5,
        logit_bias=((3, 2.0), (9, -1.0)),
        logprobs=0,
        min_tokens=4,
        stop_token_ids=(8,),
        drafts=1,
        rule="typical:eps=0.2",
    )
    row = options(request, eos_ids=(5, 8))
    assert row["rest"]["stop_ids"].tolist() == [5, 8, *[-1] * (MAX_STOP_TOKENS - 2)]
    assert row["rest"]["draft_limit"] == 1
    assert row["rules"]["rule"] == RULE_NAMES.index("typical")
    assert row["rules"]["typical_eps"] == np.float32(0.2)
    assert row["sampling"]["seed"] == 2**32 - 1 and row["sampling"]["top_k"] == 7
    logits = row["logits"]
    assert logits["bias_ids"][:3].tolist() == [3, 9, -1] and logits["bias"][1] == -1
    assert logits["min_length"] == 2 + 4 and logits["logprobs"]
    table = row_options([row, options(make_request("b", [1]))], 3)
    assert table.sampling.temperature.tolist() == [0.5, 0.0, 0.5]  # padding repeats the first
    assert table.rules.rule.tolist() == [RULE_NAMES.index("typical"), 0, 3]
    assert table.logits.repetition.tolist() == [1.5, 1.0, 1.5]
    assert table.draft_limit.tolist() == [1, 3, 1]


def test_limits_of_drafts_and_stops():
    assert options(make_request("a", [1], drafts=9))["rest"]["draft_limit"] == 3
    assert options(make_request("a", [1], drafts=0))["rest"]["draft_limit"] == 0
    deaf = options(make_request("a", [1], ignore_eos=True), eos_ids=(5,))
    assert (deaf["rest"]["stop_ids"] == -1).all()
    many = make_request("a", [1], stop_token_ids=tuple(range(MAX_STOP_TOKENS)))
    options(many)
    with pytest.raises(ValueError, match=r"9 ids end the request .*\[20\].*at most 8"):
        options(many, eos_ids=(20,))


def test_an_admission_begins_where_the_request_stands():
    first = placed("a", [1, 2, 3], 4, said=[9, 8], max_tokens=6)
    second = placed("b", [7], 0)
    rows = [options(first), options(second)]
    new = admission([first, second], rows, [4, 0], total_slots=SLOTS, tail=3, think=ThinkIds())
    assert new.slots.tolist() == [4, 0, *[SLOTS] * (ADMIT_ROWS - 2)]
    assert new.length[:2].tolist() == [4, 0] and new.last_token[:2].tolist() == [8, 7]
    assert new.remaining[:2].tolist() == [4, 12]
    assert new.token_tail[:2].tolist() == [[3, 9, 8], [0, 0, 7]]
    assert not new.thinking.any()
    # A request that starts over still counts from its own prompt.
    assert new.options.logits.min_length[0] == 3
    bare = admission([second], rows[1:], [0], total_slots=SLOTS, tail=0, think=ThinkIds())
    assert bare.token_tail.size == 0


@pytest.mark.parametrize(
    ("thinking", "said", "expected"),
    [
        (False, [], False),
        (True, [], True),
        (True, [5, 41], False),
        (False, [5, 40, 5], True),
        (False, [40, 41, 5], False),
        (True, [41, 40], True),
    ],
)
def test_the_phase_a_request_goes_on_in(thinking, said, expected):
    request = placed("a", [40, 41], 0, said=said, thinking=thinking)
    assert is_thinking(request, ThinkIds(40, 41)) == expected
    assert is_thinking(request, ThinkIds()) == thinking


def test_counts_tell_prompt_from_answer():
    counts, in_prompt = token_counts(placed("a", [1, 1, 4], 0, said=[2, 2, 1]), 6)
    assert counts.tolist() == [0, 1, 2, 0, 0, 0] and counts.dtype == np.int32
    assert np.flatnonzero(in_prompt).tolist() == [1, 4]


@pytest.mark.parametrize(
    ("asked", "variant"),
    [
        (dict(), Variant.PLAIN),
        (dict(temperature=1.0, min_p=0.1, seed=3, stop_token_ids=(1,), drafts=0), Variant.PLAIN),
        (dict(temperature=1.0, top_p=0.9), Variant.TRUNCATED),
        (dict(temperature=1.0, top_k=3), Variant.TRUNCATED),
        (dict(top_k=3), Variant.PLAIN),  # greedy: nothing to truncate
        (dict(min_tokens=1), Variant.FULL),
        (dict(logprobs=0), Variant.FULL),
        (dict(logit_bias=((1, 1.0),)), Variant.FULL),
        (dict(presence_penalty=0.1), Variant.FULL),
        (dict(frequency_penalty=0.1), Variant.FULL),
        (dict(repetition_penalty=1.1), Variant.FULL),
    ],
)
def test_the_program_that_a_request_needs(asked, variant):
    request = make_request("a", [1], **asked)
    assert needs(request, True) is variant
    assert needs(request, False) is Variant.FULL
