"""Slots in a step: who is touched by it, who is not, and that nothing else about it matters."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from dskjax.batch import RaggedBatch, plan_batch
from tests.decode.bench import CHUNK, COLUMNS, PAGE, ROWS, SLOTS, Bench, K
from tests.decode.plain import Ask, answer
from tests.decode.toy import PROMPTS

LONG, ONE, SHORT = PROMPTS
ASKS = (
    Ask(prompt=LONG, max_tokens=12),
    Ask(prompt=SHORT, max_tokens=12, temperature=1.0, seed=5),
    Ask(prompt=ONE, max_tokens=9, presence=0.7, frequency=0.3),
    Ask(prompt=SHORT[::-1], max_tokens=14),
)
ATOL = 1e-5  # two programs that add up the same products in another order; measured 1e-6


@functools.cache
def started(steps: int = 2):
    """Four slots in the middle of their answers: (bench, its state)."""
    bench = Bench()
    for slot, ask in enumerate(ASKS):
        bench.admit(slot, ask)
    for _ in range(steps):
        bench.step([0, 1, 2])
        bench.step([3])
    return bench, bench.snapshot


def resumed(steps: int = 2) -> Bench:
    """A bench of its own in that state."""
    bench, state = started(steps)
    own = Bench()
    own.state = jax.tree.map(jnp.asarray, state)
    own.asks, own.texts = dict(bench.asks), {slot: list(t) for slot, t in bench.texts.items()}
    return own


def of_slot(state, slot: int) -> dict[str, np.ndarray]:
    """Everything that belongs to a slot: its row of every array, and its pages."""
    pages = slice(slot * COLUMNS, (slot + 1) * COLUMNS)
    found = {}
    for path, leaf in jax.tree_util.tree_leaves_with_path(state):
        name = jax.tree_util.keystr(path)
        if name.startswith(".cache"):
            assert leaf.shape[1] == SLOTS * COLUMNS, name
            found[name] = leaf[:, pages]
        else:
            assert leaf.shape[0] == SLOTS, name
            found[name] = leaf[slot]
    return found


def assert_same(one, other, slots, *, atol: float = 0.0):
    """Slots are equal bit for bit; float arrays within `atol` if that is given."""
    for slot in slots:
        mine, theirs = of_slot(one, slot), of_slot(other, slot)
        assert mine.keys() == theirs.keys()
        for name, value in mine.items():
            if atol and value.dtype.kind == "f":
                np.testing.assert_allclose(value, theirs[name], atol=atol, err_msg=name)
            else:
                np.testing.assert_array_equal(value, theirs[name], err_msg=f"{name}, {slot=}")


# ------------------------------------------------------------------ who is touched


def test_a_step_of_some_slots_leaves_the_others_alone():
    bench = resumed()
    before = bench.snapshot
    bench.step([2, 0])
    after = bench.snapshot
    assert_same(before, after, [1, 3])
    for slot in (0, 2):
        assert after.length[slot] > before.length[slot]
        with pytest.raises(AssertionError):  # the comparison sees a slot that moved
            assert_same(before, after, [slot])


def test_prompt_rows_leave_other_slots_alone():
    bench = resumed()
    bench.admit(3, Ask(prompt=LONG), prefill=False)
    before = bench.snapshot
    bench.step([], {3: (0, 7)})
    after = bench.snapshot
    assert_same(before, after, [0, 1, 2])
    row, page = 6 % PAGE, 3 * COLUMNS + 6 // PAGE
    assert (before.cache.latent[:, page, row] != after.cache.latent[:, page, row]).any()
    # Not a row further, of the slot's own last page either.
    np.testing.assert_array_equal(
        before.cache.latent[:, page, row + 1 :], after.cache.latent[:, page, row + 1 :]
    )


@pytest.mark.parametrize("leaf", ["latent", "rope"])
def test_the_comparison_sees_one_changed_number(leaf):
    _, state = started()
    pages = np.array(getattr(state.cache, leaf))
    pages[-1, 2 * COLUMNS + 1, 2, 0] += 1
    broken = dataclasses.replace(state, cache=dataclasses.replace(state.cache, **{leaf: pages}))
    assert_same(state, broken, [0, 1, 3])
    with pytest.raises(AssertionError, match=leaf):
        assert_same(state, broken, [2])


def test_padding_touches_nothing():
    bench = resumed()
    before = bench.snapshot
    output = bench.run(bench.decode_rows([]), None)
    assert not output.active.any() and not output.count.any() and not output.finished.any()
    bench.run(None, bench.prefill_rows({}, garbage=4))
    bench.run(bench.decode_rows([]), bench.prefill_rows({}))
    assert_same(before, bench.snapshot, range(SLOTS))


def test_padding_within_prompt_rows_touches_nothing():
    """What ids stand there does not show in anything that is ever read."""
    states = []
    for garbage in (0, 3):
        bench = resumed()
        bench.admit(1, ASKS[1], prefill=False)
        bench.run(None, bench.prefill_rows({1: (0, 2)}, garbage=garbage))
        states.append(bench.snapshot)
        bench.finish([1])
        assert bench.texts[1] == answer(ASKS[1])
    trunk = bench.cfg.num_hidden_layers
    one, other = states
    np.testing.assert_array_equal(one.hidden_tail, other.hidden_tail)
    # The modules' rows may have seen ids beyond the prompt: the first steps compute them again.
    np.testing.assert_array_equal(one.cache.latent[:trunk], other.cache.latent[:trunk])


def test_finished_rows_idle():
    bench = resumed()
    bench.finish([2])
    before = bench.snapshot
    output = bench.step([2, 1])
    assert output.active.tolist()[:2] == [False, True]
    assert output.count[0] == 0 and not output.finished[0] and not output.offered[0]
    assert_same(before, bench.snapshot, [2])


# ------------------------------------------------------------------ what does not matter


@pytest.mark.parametrize("order", [(2, 0, 1), (1, 0, 2)])
def test_the_order_of_slots_does_not_matter(order):
    straight, turned = resumed(), resumed()
    one, other = straight.step([0, 1, 2]), turned.step(list(order))
    assert_same(straight.snapshot, turned.snapshot, range(SLOTS))
    for name in ("tokens", "count", "accepted", "offered", "overlap"):
        rows = getattr(one, name)[list(order)]
        np.testing.assert_array_equal(rows, getattr(other, name), err_msg=name)


def test_company_does_not_matter():
    """Alone beside padding, or beside others: the same slot, bit for bit."""
    alone, together = resumed(), resumed()
    alone.step([1])
    together.step([3, 1, 0])
    assert_same(alone.snapshot, together.snapshot, [1])


def test_decoding_and_prompt_rows_in_one_step_are_those_of_two():
    one, two = resumed(), resumed()
    for bench in (one, two):
        bench.admit(3, Ask(prompt=LONG), prefill=False)
    mixed = one.step([0, 1, 2], {3: (0, CHUNK)})
    plain = two.step([0, 1, 2])
    two.step([], {3: (0, CHUNK)})
    for name in ("tokens", "count", "accepted", "offered", "active", "finished"):
        np.testing.assert_array_equal(getattr(mixed, name), getattr(plain, name), err_msg=name)
    assert_same(one.snapshot, two.snapshot, range(SLOTS), atol=ATOL)
    one.step([0, 1, 2], {3: (CHUNK, len(LONG) - 1 - CHUNK)})
    for slots in ([0, 1, 2], [3]):
        one.finish(slots)
    assert [one.texts[slot] for slot in range(SLOTS)] == [
        *(answer(ask) for ask in ASKS[:3]),
        answer(Ask(prompt=LONG)),
    ]


def test_draft_limits_are_each_rows_own():
    bench = Bench()
    for slot, limit in enumerate((0, 1, K)):
        bench.admit(slot, ASKS[0], drafts=limit)
    outputs = bench.finish([0, 1, 2])
    offered = np.stack([out.offered for out in outputs])
    active = np.stack([out.active for out in outputs])
    assert not offered[0].any()  # a first step has nothing to verify
    for slot, limit in enumerate((0, 1, K)):
        assert (offered[1:, slot][active[1:, slot]] == limit).all()
        assert bench.texts[slot] == answer(ASKS[0])
    assert active[:, K - 1].sum() < active[:, 0].sum()  # drafts save steps


# ------------------------------------------------------------------ a slot's next life


@pytest.mark.parametrize(
    "ask", [Ask(prompt=SHORT), Ask(prompt=ONE)], ids=["prefilled", "one token"]
)
@pytest.mark.parametrize("rule", ["strict", "rejection"])
def test_admission_leaves_nothing_of_the_life_before(ask, rule):
    """Text, drafts and what became of them are those of an unused slot."""
    lives = []
    for bench in (resumed(), Bench()):
        sampled = dataclasses.replace(ask, temperature=0.9, seed=3)
        bench.admit(0, sampled, rule=rule)
        assert np.asarray(bench.state.drafts)[0].tolist() == [-1] * K
        assert not bench.snapshot.done[0] and bench.snapshot.said.counts[0].sum() == 0
        outputs = bench.finish([0])
        lives.append((bench.texts[0], [(int(o.offered[0]), int(o.accepted[0])) for o in outputs]))
    assert lives[0] == lives[1]
    if rule == "strict":
        assert lives[0][0] == answer(sampled)


def test_admission_writes_one_slot():
    bench = resumed()
    before = bench.snapshot
    bench.admit(1, Ask(prompt=LONG, frequency=1.0), prefill=False)
    after = bench.snapshot
    assert_same(before, after, [0, 2, 3])
    assert (after.length[1], after.last_token[1], after.remaining[1]) == (
        len(LONG) - 1,
        LONG[-1],
        16,
    )
    assert after.options.logits.frequency[1] == 1.0


# ------------------------------------------------------------------ rows of a ragged batch


def plan(token_ids, table, cached, lens):
    part = RaggedBatch.uniform(
        jnp.zeros(token_ids, jnp.int32),
        jnp.asarray(table),
        jnp.asarray(cached, jnp.int32),
        "expanded",
        None if lens is None else jnp.asarray(lens, jnp.int32),
    )
    return jax.tree.map(np.asarray, plan_batch(part, PAGE))


@given(st.lists(st.tuples(st.integers(0, CHUNK), st.integers(0, 20)), min_size=ROWS, max_size=ROWS))
def test_real_rows_of_a_padded_batch_are_the_newest_cached_ones(sizes):
    table = np.arange(ROWS * COLUMNS, dtype=np.int32).reshape(ROWS, COLUMNS)
    lens = [length for length, _ in sizes]
    cached = [length + before for length, before in sizes]
    found = plan((ROWS, CHUNK), table, cached, lens)
    for row, (length, before) in enumerate(sizes):
        at = slice(row * CHUNK, row * CHUNK + length)
        rest = slice(row * CHUNK + length, (row + 1) * CHUNK)
        positions = np.arange(before, before + length)
        assert found.positions[at].tolist() == positions.tolist()
        assert found.pages[at].tolist() == table[row, positions // PAGE].tolist()
        assert found.slots[at].tolist() == (positions % PAGE).tolist()
        assert (found.pages[rest] == -1).all() and (found.prefill.query_seq[rest] == -1).all()
        assert (found.decode.visible[rest] == 0).all()


def test_full_rows_need_no_lengths():
    table = np.arange(2 * COLUMNS, dtype=np.int32).reshape(2, COLUMNS)
    one, other = (plan((2, CHUNK), table, (9, CHUNK), lens) for lens in (None, (CHUNK, CHUNK)))
    for mine, theirs in zip(jax.tree.leaves(one), jax.tree.leaves(other), strict=True):
        np.testing.assert_array_equal(mine, theirs)
