"""What steps put out, added up for all prompts at once, is what each prompt's own count gives."""

import numpy as np
import pytest

from dskjax.decode.generate import _Tally
from dskjax.decode.rows import StepOutput
from dskjax.decode.stats import AcceptanceStats

PROMPTS, IDLE, STOP = 20, 2, 3


def outputs(drafts: int, steps: int) -> list[StepOutput]:
    """Random steps: some rows idle, some without drafts, some cut short at their end."""
    rng = np.random.default_rng(drafts)
    rows, found = PROMPTS + IDLE, []
    over = np.arange(rows) >= PROMPTS
    for number in range(steps):
        active = ~over & (rng.random(rows) < 0.9)
        offered = np.where(active, rng.integers(0, drafts + 1, rows), 0)
        accepted = rng.integers(0, offered + 1)
        count = np.where(active, rng.integers(1, accepted + 2), 0)
        finished = active & ((rng.random(rows) < 0.2) | (number == steps - 1))
        found.append(
            StepOutput(
                tokens=rng.integers(2, 5, (rows, drafts + 1)).astype(np.int32),
                count=count.astype(np.int32),
                accepted=accepted.astype(np.int32),
                offered=offered.astype(np.int32),
                active=active,
                finished=finished,
                ties=rng.integers(0, 2, rows).astype(np.int32),
                overlap=np.zeros((rows, drafts), np.float32),
                logprobs=None,
            )
        )
        over = over | finished
    return found


@pytest.mark.parametrize("drafts", [0, 1, 3])
def test_tally_is_what_each_prompt_counts(drafts):
    steps = outputs(drafts, 12)
    tally, streamed = _Tally(PROMPTS, drafts, (STOP,)), [[] for _ in range(PROMPTS)]
    for out in steps:
        tally.add(out, lambda prompt, ids: streamed[prompt].extend(ids))
    assert tally.tokens() == streamed and any(streamed)
    assert tally.ties == sum(int(out.ties.sum()) for out in steps)
    assert tally.running == PROMPTS - sum(int(out.finished.sum()) for out in steps)
    reasons = tally.finish_reasons()
    assert {"stop", "length"} == set(reasons)
    for row, found in enumerate(tally.per_prompt()):
        stats, reason, ids = AcceptanceStats(), "length", []
        for out in (out for out in steps if out.active[row]):
            new = out.tokens[row, : out.count[row]].tolist()
            stats.update(out.accepted[row] + 1, drafted=out.offered[row], emitted=out.count[row])
            ids += new
            if out.finished[row] and new[-1] == STOP:
                reason = "stop"
        assert (found, reasons[row], tally.tokens()[row]) == (stats, reason, ids)


def test_tally_of_no_step_is_empty():
    tally = _Tally(2, 1, ())
    assert tally.tokens() == [[], []] and tally.per_prompt() == [AcceptanceStats()] * 2
