"""Heads of a two-layer model that have learnt by heart what it says draft nearly all of it."""

import numpy as np
import pytest

from dskjax.decode import generate
from tests.train_mtp.heads.toy import TRUNK, frozen, recipe, state, taught
from tests.train_mtp.toy import quick_compiler
from train_mtp.data import Batch
from train_mtp.heads.run import shipped
from train_mtp.heads.step import head_step
from train_mtp.optim import AdamW

PROMPT, LENGTH, STEPS = [5, 17, 42, 8], 44, 150


@pytest.fixture(scope="module", autouse=True)
def _quick():
    with quick_compiler():
        yield


def in_rows(tokens: list[int], rows: int = 2) -> Batch:
    """The same document in every row."""
    ids = np.tile(np.asarray(tokens, np.int32), (rows, 1))
    places = np.tile(np.arange(len(tokens), dtype=np.int32), (rows, 1))
    ones = np.ones_like(ids)
    return Batch(tokens=ids, segment_ids=ones, positions=places, scored=ones)


@pytest.mark.parametrize("weights", ["shared", pytest.param("independent", marks=pytest.mark.full)])
def test_third_drafts_of_what_was_learnt_by_heart_are_accepted(weights):
    options = {"max_tokens": LENGTH, "ignore_eos": True}
    plain = generate(frozen(), TRUNK, [PROMPT], **options)
    rows = in_rows(PROMPT + plain.tokens[0])
    of = recipe(weights, depths=3, optimizer=AdamW(lr=1e-2, warmup=5, steps=STEPS))
    heads, lesson = state(of), taught(of, rows)

    def third_drafts() -> float:
        params = {**frozen(), **shipped(heads.params, of, frozen())}
        drafted = generate(params, of.cfg, [PROMPT], drafts=3, accept="strict", **options)
        assert drafted.tokens == plain.tokens
        return drafted.stats.per_position[2]

    assert third_drafts() < 0.5
    for _ in range(STEPS):
        heads, _ = head_step(heads, frozen(), rows, lesson, recipe=of)
    assert third_drafts() > 0.95
