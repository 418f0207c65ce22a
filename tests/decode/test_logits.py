"""Penalties, biases, forbidden stops and log-probabilities, against plain loops over ids."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from dskjax.decode import logits as ours
from dskjax.decode.logits import Said
from tests.decode.bench import ROWS, Bench, logit_rows
from tests.decode.plain import Ask, adjusted, answer, logprobs
from tests.decode.toy import PROMPTS

VOCAB, DRAFTS = 13, 3
ATOL = 1e-5  # a few operations in fp32 on values below 30: measured 2e-6

ASKS = (
    Ask(prompt=(1, 2, 3), presence=0.5, frequency=0.25, repetition=1.3),
    Ask(prompt=(5, 5), bias={0: 3.0, 12: -100.0}),
    Ask(prompt=(4,), stop_ids=(2, 7), min_tokens=5),
    Ask(prompt=(6, 1), repetition=0.7, bias={1: 1.5}, stop_ids=(1,), min_tokens=4),
    Ask(prompt=(8,)),
)
ANSWERS = ((3, 3, 9), (1,), (0, 1, 2), (6, 6), (2,))


def said_of(asks, answers):
    """Slots in the opposite order of the rows."""
    counts, in_prompt = np.zeros((len(asks), VOCAB), np.int32), np.zeros((len(asks), VOCAB), bool)
    for slot, (ask, said) in enumerate(zip(asks[::-1], answers[::-1], strict=True)):
        np.add.at(counts[slot], list(said), 1)
        in_prompt[slot, list(ask.prompt)] = True
    return Said(jnp.asarray(counts), jnp.asarray(in_prompt))


def slots_of(asks):
    return jnp.arange(len(asks), dtype=jnp.int32)[::-1]


def check(adjust, asks=ASKS, answers=ANSWERS, seed=0):
    """`adjust` gives row i of a step what the answer, had the drafts before it been said, gets."""
    rng = np.random.default_rng(seed)
    raw = rng.normal(0, 3, (len(asks), 1 + DRAFTS, VOCAB)).astype(np.float32)
    drafts = rng.integers(0, VOCAB, (len(asks), DRAFTS))
    drafts[0] = (3, 3, 11)  # said before; twice in one step; new
    tokens = np.concatenate([[[said[-1]] for said in answers], drafts], axis=1)
    lengths = [len(ask.prompt) + len(said) for ask, said in zip(asks, answers, strict=True)]
    stops = [(*ask.stop_ids, *(-1,) * (2 - len(ask.stop_ids))) for ask in asks]
    found = adjust(
        jnp.asarray(raw),
        logit_rows(asks),
        said_of(asks, answers),
        slots_of(asks),
        jnp.asarray(tokens, jnp.int32),
        jnp.asarray(lengths, jnp.int32),
        jnp.asarray(stops, jnp.int32),
    )
    wanted = np.array(
        [
            [adjusted(raw[b, i], ask, [*said, *drafts[b, :i]]) for i in range(1 + DRAFTS)]
            for b, (ask, said) in enumerate(zip(asks, answers, strict=True))
        ]
    )
    np.testing.assert_allclose(np.asarray(found), wanted, atol=ATOL)
    for row, ask in enumerate(asks):
        if ask == Ask(prompt=ask.prompt):
            np.testing.assert_array_equal(np.asarray(found)[row], raw[row])


@pytest.mark.parametrize("seed", range(5))
def test_each_row_is_adjusted_as_if_its_drafts_had_been_said(seed):
    check(jax.jit(ours.adjust), seed=seed)


@pytest.mark.parametrize("row", range(len(ASKS)))
def test_each_feature_alone(row):
    """With nobody else in the batch that wants a part, the part of the program does not run."""
    check(jax.jit(ours.adjust), ASKS[row : row + 1], ANSWERS[row : row + 1])


@pytest.mark.parametrize(
    "bug",
    [
        lambda args: args | {"tokens": args["tokens"].at[:, 1:].set(-1)},  # drafts do not count
        lambda args: args | {"tokens": jnp.roll(args["tokens"], 1, axis=1)},  # a row too early
        lambda args: args | {"slots": args["slots"][::-1]},  # another slot's counts
        lambda args: args | {"position": args["position"] + 1},  # a stop is allowed too early
        lambda args: args | {"stop_ids": jnp.maximum(args["stop_ids"], 0)},  # padding forbids 0
    ],
)
def test_a_planted_bug_is_seen(bug):
    names = ("logits", "rows", "said", "slots", "tokens", "position", "stop_ids")

    def broken(*args):
        return ours.adjust(**bug(dict(zip(names, args, strict=True))))

    with pytest.raises(AssertionError):
        check(jax.jit(broken))


def test_counts_take_in_what_was_emitted():
    asks, answers = ASKS[:3], ANSWERS[:3]  # the second and third have no penalties
    said = said_of(asks, answers)
    tokens = jnp.asarray([[3, 4, 4, 9], [1, 1, 1, 1], [2, 2, 2, 2]], jnp.int32)
    count = jnp.asarray([3, 4, 0], jnp.int32)
    slots = slots_of(asks).at[2].set(len(asks))  # an idle row
    new = jax.jit(ours.count_said)(said, logit_rows(asks), slots, tokens, count)
    wanted = np.array(said.counts)
    wanted[2, 3] += 1
    wanted[2, 4] += 2
    np.testing.assert_array_equal(np.asarray(new.counts), wanted)
    np.testing.assert_array_equal(np.asarray(new.in_prompt), np.asarray(said.in_prompt))


def test_logprobs_are_those_of_the_raw_logits():
    rng = np.random.default_rng(1)
    raw = rng.normal(0, 3, (2, 3, 40)).astype(np.float32)
    tokens = rng.integers(0, 40, (2, 3))
    run = jax.jit(ours.logprobs)
    found = run(jnp.asarray(raw), jnp.asarray(tokens, jnp.int32), jnp.asarray([True, False]))
    exact = raw - np.log(np.exp(raw.astype(np.float64)).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        found.chosen, np.take_along_axis(exact, tokens[..., None], 2)[..., 0], atol=ATOL
    )
    order = np.argsort(-exact, axis=-1, kind="stable")[..., : ours.TOP_LOGPROBS]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(exact, order, 2), atol=ATOL)
    nobody = run(jnp.asarray(raw), jnp.asarray(tokens, jnp.int32), jnp.zeros(2, bool))
    assert not any(np.asarray(leaf).any() for leaf in nobody)


def score(hidden, weight, tokens):
    return ours.prompt_logprobs(hidden, tokens, lambda x: x @ weight.T)


@pytest.mark.parametrize("shape", [(1, 5), (1, 128), (2, 100), (3, 128)])
def test_prompt_rows_are_scored_in_blocks_of_any_number(shape):
    rng = np.random.default_rng(2)
    hidden = rng.normal(0, 1, (*shape, 8)).astype(np.float32)
    weight = rng.normal(0, 1, (40, 8)).astype(np.float32)
    tokens = rng.integers(0, 40, shape)
    found = jax.jit(score)(hidden, weight, jnp.asarray(tokens, jnp.int32))
    raw = hidden.astype(np.float64) @ weight.T
    exact = raw - np.log(np.exp(raw).sum(-1, keepdims=True))
    np.testing.assert_allclose(
        found.chosen, np.take_along_axis(exact, tokens[..., None], 2)[..., 0], atol=ATOL
    )
    order = np.argsort(-exact, axis=-1)[..., : ours.TOP_LOGPROBS]
    np.testing.assert_array_equal(found.top_ids, order)
    np.testing.assert_allclose(found.top, np.take_along_axis(exact, order, 2), atol=ATOL)


def test_the_logits_of_a_chunk_are_never_there_at_once(monkeypatch):
    rows, vocab = 2048, 4096
    shapes = (jax.ShapeDtypeStruct((1, rows, 8), jnp.float32),)
    shapes += (jax.ShapeDtypeStruct((vocab, 8), jnp.float32),)
    shapes += (jax.ShapeDtypeStruct((1, rows), jnp.int32),)

    def temporary():
        # A new function: a compiled one would be taken again.
        program = jax.jit(lambda *args: score(*args)).lower(*shapes).compile()
        return program.memory_analysis().temp_size_in_bytes

    assert temporary() < 4 * rows * vocab / 4
    monkeypatch.setattr(ours, "SCORED_ROWS", rows)
    assert temporary() > 4 * rows * vocab  # otherwise this measures nothing


def test_a_small_vocabulary_has_fewer_alternatives():
    tokens = jnp.zeros((1, 1), jnp.int32)
    found = ours.logprobs(jnp.zeros((1, 1, 5)), tokens, jnp.ones(1, bool))
    assert found.top.shape == (1, 1, 5)


# ------------------------------------------------------------------ in the step

FEATURES = {
    "penalties": dict(presence=0.8, frequency=0.6),
    "repetition": dict(repetition=4.0),
    "bias": dict(bias={2: -4.0, 1: 1.5}, frequency=0.3),
    "stops": dict(stop_ids=(2, 4), min_tokens=7),
}
SAMPLED = dict(temperature=1.2, top_p=0.95, seed=7)


@functools.cache
def texts(drafts: int, sampled: bool) -> tuple[list[Ask], list[list[int]], int]:
    """Asks with features beside one without, their texts, and how many drafts were accepted."""
    asks = [
        Ask(prompt=PROMPTS[n % 3], **options, **(SAMPLED if sampled else {}))
        for n, options in enumerate([*FEATURES.values(), {}])
    ]
    bench, found, accepted = Bench(), [], 0
    for first in range(0, len(asks), ROWS):
        slots = range(len(asks[first : first + ROWS]))
        for slot in slots:
            bench.admit(slot, asks[first + slot], drafts=drafts)
        accepted += sum(int(out.accepted.sum()) for out in bench.finish(slots))
        found += [bench.texts[slot] for slot in slots]
    return asks, found, accepted


@pytest.mark.parametrize("sampled", [False, True], ids=["greedy", "strict"])
@pytest.mark.parametrize("drafts", [0, 3])
def test_text_under_penalties_is_that_of_one_token_at_a_time(drafts, sampled):
    asks, found, accepted = texts(drafts, sampled)
    assert found == [answer(ask) for ask in asks]
    assert (accepted > 0) == (drafts > 0)  # otherwise no later row was ever looked at


def test_features_change_the_text():
    """Otherwise the test above sees nothing."""
    for sampled in (False, True):
        asks, found, _ = texts(3, sampled)
        for ask, text in zip(asks[:-1], found[:-1], strict=True):
            options = SAMPLED if sampled else {}
            bare = Ask(prompt=ask.prompt, stop_ids=ask.stop_ids, **options)
            assert text != answer(bare), ask


def test_rows_without_features_are_not_touched_by_those_with():
    """Bit for bit: the same row beside rows with every feature and beside rows with none."""
    bare = Ask(prompt=PROMPTS[0], max_tokens=8)
    full = Ask(
        prompt=PROMPTS[2], presence=1.0, repetition=2.0, bias={3: 5.0}, stop_ids=(1,), min_tokens=9
    )
    states, text = [], []
    for beside in (full, dataclasses.replace(bare, prompt=PROMPTS[2])):
        bench = Bench()
        for slot, ask in enumerate((beside, bare, beside)):
            bench.admit(slot, ask, drafts=3 if slot == 1 else 0)
        bench.finish([0, 1, 2])
        states.append(bench.snapshot)
        text.append(bench.texts)
    assert text[0][1] == text[1][1] == answer(bare) and text[0][0] != text[1][0]
    for name in ("length", "drafts", "draft_probs", "hidden_tail"):
        one, other = (getattr(state, name)[1] for state in states)
        np.testing.assert_array_equal(one, other, err_msg=name)


@pytest.mark.parametrize("drafts", [0, 3])
def test_a_step_reports_the_models_own_logprobs(drafts):
    """Before penalties and temperature, for every token that a step brings."""
    ask = Ask(prompt=PROMPTS[0], presence=1.5, frequency=0.7, logprobs=True, **SAMPLED)
    bench = Bench()
    bench.admit(1, ask, drafts=drafts)
    chosen, top, ids = [], [], []
    for out in bench.finish([1]):
        new = int(out.count[0])
        chosen += out.logprobs.chosen[0, :new].tolist()
        top += out.logprobs.top[0, :new].tolist()
        ids += out.logprobs.top_ids[0, :new].tolist()
    text = bench.texts[1]
    exact = logprobs(ask, text)
    np.testing.assert_allclose(chosen, exact[np.arange(len(text)), text], atol=1e-4)
    np.testing.assert_allclose(top, -np.sort(-exact, axis=1), atol=1e-4)
    np.testing.assert_array_equal(ids, np.argsort(-exact, axis=1))
