"""Which program a step takes, and what is compiled for it."""

import math

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from serve.buckets import Bucket, Buckets, Variant
from serve.plan import Chunk, StepPlan
from serve.programs import launches
from tests.serve.stack import make_request

SIZES = st.fixed_dictionaries(
    {
        "slots": st.integers(1, 200),
        "columns": st.integers(1, 100),
        "chunk": st.integers(1, 100),
        "drafts": st.sets(st.integers(0, 4), min_size=1).map(tuple),
        "mixed": st.booleans(),
        "few": st.booleans(),
        "extras": st.booleans(),
        "scored": st.booleans(),
    }
)


@given(SIZES, st.data())
def test_the_smallest_sizes_that_fit_are_taken(sizes, data):
    buckets = Buckets.make(**sizes)
    rows = data.draw(st.integers(1, buckets.batches[-1]))
    columns = data.draw(st.integers(1, buckets.columns[-1]))
    batch, width = buckets.fit_batch(rows), buckets.fit_columns(columns)
    assert batch in buckets.batches and width in buckets.columns
    assert batch >= rows and all(size < rows for size in buckets.batches if size < batch)
    assert width >= columns and all(size < columns for size in buckets.columns if size < width)


@given(SIZES, st.data())
def test_every_chunk_is_launched_once_in_a_shape_that_holds_it(sizes, data):
    buckets = Buckets.make(**sizes)
    lengths = data.draw(st.lists(st.integers(1, buckets.chunk), max_size=12))
    groups = buckets.group(lengths)
    assert sorted(i for _, members in groups for i in members) == list(range(len(lengths)))
    for (count, length), members in groups:
        assert (count, length) in buckets.chunk_shapes
        assert 0 < len(members) <= count and max(lengths[i] for i in members) <= length
    assert len(groups) <= len(lengths)
    longest = [max(lengths[i] for i in members) for _, members in groups]
    assert longest == sorted(longest, reverse=True)


def test_short_chunks_share_a_launch_and_long_ones_do_not():
    buckets = Buckets.make(slots=8, columns=16, chunk=32, drafts=(0,))
    assert buckets.chunk_shapes == ((1, 32), (4, 8))
    assert buckets.group([8, 3, 32, 5]) == [((1, 32), [2]), ((4, 8), [0, 3, 1])]
    assert buckets.group([9]) == [((1, 32), [0])]
    assert buckets.group([]) == []


@given(SIZES, st.data())
def test_whatever_a_step_launches_was_compiled(sizes, data):
    buckets = Buckets.make(**sizes)
    compiled = set(buckets.all())
    rows = data.draw(st.integers(0, buckets.batches[-1]))
    lengths = data.draw(st.lists(st.integers(1, buckets.chunk), min_size=rows == 0, max_size=6))
    wishes = st.sampled_from((None, 3) if buckets.scored else (None,))
    requests = [
        make_request(str(i), [1] * 200, prompt_logprobs=data.draw(wishes))
        for i in range(rows + len(lengths))
    ]
    chunks = [
        Chunk(request, 0, length) for request, length in zip(requests[rows:], lengths, strict=True)
    ]
    plan = StepPlan(
        number=0,
        admit=[],
        requests=requests[:rows],
        slots=np.arange(rows, dtype=np.int32),
        drafts=data.draw(st.sampled_from(buckets.drafts)),
        chunks=chunks,
        columns=data.draw(st.integers(1, buckets.columns[-1])),
    )
    needed = data.draw(st.sampled_from(range(buckets.variants[-1] + 1)).map(Variant))
    found = list(launches(plan, chunks, needed, buckets))
    assert {bucket for bucket, _, _ in found} <= compiled
    assert sorted(i for _, _, members in found for i in members) == list(range(len(chunks)))
    assert [decodes for _, decodes, _ in found].count(True) == (rows > 0)
    for bucket, decodes, members in found:
        assert decodes == (bucket.batch > 0) and bool(members) == (bucket.chunks > 0)
        assert bucket.variant >= needed or not decodes
        assert bucket.batch >= rows * decodes and bucket.columns >= plan.columns
        assert bucket.scored == any(chunks[i].request.scored for i in members)


@pytest.mark.parametrize("mixed", [False, True])
@pytest.mark.parametrize("rows", [0, 2])
def test_a_launch_is_scored_if_one_of_its_chunks_is(rows, mixed):
    sizes = dict(slots=8, columns=8, chunk=32, drafts=(0,))
    buckets = Buckets.make(**sizes, mixed=mixed, scored=True)
    wishes = [None] * rows + [None, 3, None]  # the longest chunk, and two that share a launch
    requests = [make_request(str(n), [1] * 60, prompt_logprobs=k) for n, k in enumerate(wishes)]
    lengths = (30, 5, 6)
    chunks = [Chunk(r, 0, n) for r, n in zip(requests[rows:], lengths, strict=True)]
    slots = np.arange(rows, dtype=np.int32)
    plan = StepPlan(0, [], requests[:rows], slots, 0, chunks, 8)
    found = list(launches(plan, chunks, Variant.PLAIN, buckets))
    assert {bucket for bucket, _, _ in found} <= set(buckets.all())
    scored = {i: bucket.scored for bucket, _, members in found for i in members}
    assert scored == {0: False, 1: True, 2: True}
    assert buckets.fit_variant(Variant.PLAIN, scored=True) is Variant.FULL


@given(SIZES)
def test_all_lists_each_program_once_the_heaviest_first(sizes):
    buckets = Buckets.make(**sizes)
    found = buckets.all()
    assert len(set(found)) == len(found)
    weights = [bucket.tokens * bucket.columns for bucket in found]
    assert weights == sorted(weights, reverse=True)
    both = sum(1 for bucket in found if bucket.batch and bucket.chunks)
    widths, shapes = len(buckets.columns), len(buckets.chunk_shapes)
    programs = widths * shapes * len(buckets.drafts) * (len(buckets.variants) + buckets.scored)
    assert both == (programs if buckets.mixed else 0)
    alone = sum(1 for bucket in found if not bucket.batch)
    assert alone == widths * shapes * (1 + buckets.scored)


def test_variants_are_those_that_may_be_asked_for():
    sizes = dict(slots=8, columns=16, chunk=8, drafts=(3,))
    plain, truncated, full = Variant
    assert Buckets.make(**sizes).variants == (plain, truncated, full)
    assert Buckets.make(**sizes, few=True).variants == (full,)
    assert Buckets.make(**sizes, few=True, extras=False).variants == (plain, truncated)
    assert Buckets.make(**sizes, few=True).fit_variant(plain) is full
    for variant in Variant:
        assert Buckets.make(**sizes).fit_variant(variant) is variant


@given(st.integers(1, 500), st.integers(1, 300))
def test_a_ladder_falls_by_fours(slots, columns):
    buckets = Buckets.make(slots=slots, columns=columns, chunk=64, drafts=(3,))
    assert buckets.batches[-1] == slots and buckets.columns[-1] == columns
    for low, high in zip(buckets.batches, buckets.batches[1:], strict=False):
        assert low == math.ceil(high / 4) and low >= 4
    few = Buckets.make(slots=slots, columns=columns, chunk=64, drafts=(3,), few=True)
    assert few.batches == (slots,) and few.columns == (columns,)


def test_a_bucket_says_what_it_is():
    assert str(Bucket(8, 0, 0, 3, 16)) == "decode 8x4, 16 pages, full"
    assert str(Bucket(8, 2, 32, 0, 4)) == "decode 8x1 + prefill 2x32, 4 pages, full"
    assert str(Bucket(0, 2, 32, 0, 4)) == "prefill 2x32, 4 pages"
    assert str(Bucket(0, 2, 32, 0, 4, scored=True)) == "scored prefill 2x32, 4 pages"
    assert Bucket(8, 2, 32, 3, 4).tokens == 8 * 4 + 2 * 32


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batches": ()}, "batches="),
        ({"batches": (4, 2)}, "batches="),
        ({"batches": (0, 2)}, "batches="),
        ({"drafts": (-1,)}, "drafts="),
        ({"columns": (2, 2)}, "columns="),
        ({"chunk_shapes": ()}, "chunk_shapes="),
        ({"chunk_shapes": ((1, 0),)}, "chunk_shapes="),
    ],
)
def test_bad_sizes_are_refused(change, message):
    sizes = dict(batches=(2, 4), chunk_shapes=((1, 8),), drafts=(0, 3), columns=(4,))
    Buckets(**sizes)
    with pytest.raises(ValueError, match=message):
        Buckets(**{**sizes, **change})
