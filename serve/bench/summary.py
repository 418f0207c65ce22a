"""Figures of many answers: percentiles, throughput, goodput, drafts. Pure.

Percentiles are nearest-rank: the p-th is the smallest value that p% of the answers do not exceed.
A failed request counts as one that met no objective.
"""

import collections
import dataclasses
import math
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np

from serve.bench.answer import Answer

PERCENTILES = (50, 90, 99)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Objectives:
    """What a request is to keep.

    Attributes:
        ttft: seconds to the first piece.
        tpot: mean seconds per token after it.
        percentile: share of the requests that must keep each of the two, in percent.

    Raises:
        ValueError: a value is out of range.
    """

    ttft: float = 2.0
    tpot: float = 0.05
    percentile: float = 90.0

    def __post_init__(self):
        if not (self.ttft > 0 and self.tpot > 0):
            raise ValueError(f"{self.ttft=} and {self.tpot=} must be positive (seconds)")
        if not 0 < self.percentile <= 100:
            raise ValueError(f"{self.percentile=} must be above 0 and at most 100")

    def good(self, answer: Answer) -> bool:
        """The request kept both."""
        return self._ttft(answer) and self._tpot(answer)

    def met(self, answers: Sequence[Answer]) -> bool:
        """Enough of the requests kept each of the two."""
        needed = math.ceil(len(answers) * self.percentile / 100 - 1e-9)
        kept = (sum(map(check, answers)) for check in (self._ttft, self._tpot))
        return bool(answers) and all(count >= needed for count in kept)

    def _ttft(self, answer: Answer) -> bool:
        return answer.ok and answer.ttft <= self.ttft

    def _tpot(self, answer: Answer) -> bool:
        return answer.ok and (answer.tpot is None or answer.tpot <= self.tpot)


def percentile(values: Sequence[float | int], percent: float | int) -> float | None:
    """Nearest-rank; None of no values."""
    if not values:
        return None
    return float(np.percentile(values, percent, method="inverted_cdf"))


def summarize(
    answers: Sequence[Answer],
    objectives: Objectives,
    counters: Mapping[str, float] | None = None,
) -> dict[str, Any]:
    """The figures of a run, for JSON; seconds and tokens.

    `seconds` runs from the first request to the last answer, ramp and tail included.

    Args:
        answers: at least one.
        objectives: for the goodput.
        counters: how much the server's own counters rose meanwhile. Steps cannot be seen from
            outside, so the mean accepted length is theirs: 1 + accepted drafts per verified draft.

    Raises:
        ValueError: no answers.
    """
    if not answers:
        raise ValueError("no answers to summarize")
    good = [answer for answer in answers if answer.ok]
    ends = [answer.pieces[-1] for answer in good] or [max(answer.sent for answer in answers)]
    seconds = max(max(ends) - min(answer.due for answer in answers), 1e-9)
    tokens_in = sum(answer.prompt_tokens for answer in good)
    cached = sum(answer.cached_tokens for answer in good)
    tokens_out = sum(answer.completion_tokens for answer in good)
    kept = sum(map(objectives.good, answers))
    errors = collections.Counter(answer.error for answer in answers if answer.error is not None)
    return {
        "requests": len(answers),
        "completed": len(good),
        "errors": dict(sorted(errors.items())),
        "seconds": seconds,
        "requests_per_s": len(good) / seconds,
        "qpm": 60 * len(good) / seconds,
        "tokens_per_s": {
            "input": tokens_in / seconds,
            "input_cached": cached / seconds,
            "output": tokens_out / seconds,
            "total": (tokens_in + tokens_out) / seconds,
        },
        "input_tokens": _spread([answer.prompt_tokens for answer in good]),
        "output_tokens": _spread([answer.completion_tokens for answer in good]),
        "ttft_s": _spread([answer.ttft for answer in good]),
        "tpot_s": _spread([a.tpot for a in good if a.tpot is not None]),
        "itl_s": _spread([gap for answer in good for gap in answer.gaps]),
        "e2e_s": _spread([answer.e2e for answer in good]),
        "goodput": {
            "requests_per_s": kept / seconds,
            "share": kept / len(answers),
            "objectives_met": objectives.met(answers),
        },
        "speculation": _speculation(good, counters),
        "client_lag_s": max(answer.sent - answer.due for answer in answers),
    }


def _spread(values: Sequence[float | int]) -> dict[str, float | None]:
    found = {f"p{p}": percentile(values, p) for p in PERCENTILES}
    return {"mean": float(np.mean(values)) if values else None, **found}


def _speculation(
    answers: Sequence[Answer], counters: Mapping[str, float] | None
) -> dict[str, Any] | None:
    """None if neither answers nor counters tell of drafts."""
    told = [answer for answer in answers if answer.drafted is not None]
    rows = (counters or {}).get("spec_decode_num_drafts")
    if told:
        drafted = sum(answer.drafted or 0 for answer in told)
        accepted = sum(answer.accepted or 0 for answer in told)
    elif counters is not None and rows is not None:
        drafted = round(counters.get("spec_decode_num_draft_tokens", 0))
        accepted = round(counters.get("spec_decode_num_accepted_tokens", 0))
    else:
        return None
    length = None
    if counters is not None and rows:
        length = 1 + counters.get("spec_decode_num_accepted_tokens", 0.0) / rows
    return {
        "drafted": drafted,
        "accepted": accepted,
        "accepted_per_drafted": accepted / drafted if drafted else None,
        "mean_accepted_length": length,
        "lossless": all(answer.lossless for answer in told) if told else None,
    }
