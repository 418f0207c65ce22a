"""Results of a study read again: seeds joined, and variants compared on the same prompts.

Counts of several seeds are added up prompt by prompt. Two variants are compared on the seeds that
both have, and the interval of their difference draws the same prompts for both: what makes a prompt
easy for one makes it easy for the other. Such an interval tells the chance of the prompts; that of
the training is seen in how far seeds lie apart.
"""

import dataclasses
import functools
import itertools
import json
import math
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from dskjax.evaluation.intervals import RESAMPLES, bootstrap
from train_mtp.study.variants import CORPUS, FIELDS, slug_of

Row = Mapping[str, Any]

OBJECTIVE = ("ce", "kl", "lk", "tv")
"""Fields of a row with the weights of its losses."""

_SAME = ("trunk", "baseline", "settings", "evaluation")  # what results that are joined share


@dataclasses.dataclass(frozen=True, kw_only=True, order=True)
class Setting:
    """How was drafted: tokens a step, and the temperature of target and drafts."""

    drafts: int
    temperature: float

    def __str__(self) -> str:
        return f"{self.drafts} drafts, T = {self.temperature:g}"

    def length(self, rate: Any) -> Any:
        """Mean accepted length of accepted / drafted, as a step drafts all its tokens or none."""
        return 1 + self.drafts * rate


@dataclasses.dataclass(frozen=True, kw_only=True)
class Score:
    """Acceptance of a variant, its seeds joined.

    Attributes:
        rate: accepted / drafted.
        ci95: of it, over prompts.
        length: mean accepted length.
        seeds: rate of each seed.
        per_position: P(at least i drafts accepted), mean over seeds.
        conditional: P(draft i accepted, given all before it), mean over seeds.
    """

    rate: float
    ci95: Sequence[float]
    length: float
    seeds: Sequence[float]
    per_position: Sequence[float]
    conditional: Sequence[float]

    @property
    def spread(self) -> float | None:
        """Standard deviation over seeds; None of one seed."""
        return float(np.std(self.seeds, ddof=1)) if len(self.seeds) > 1 else None


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """A difference and its 95% interval."""

    value: float
    low: float
    high: float

    @property
    def sign(self) -> int:
        """1 or -1 if the interval is clear of 0, else 0."""
        return int(self.low > 0) - int(self.high < 0)

    def against(self, target: float) -> str:
        """Whether a target is reached, as far as the interval can tell."""
        if self.low >= target:
            return "reached"
        return "not reached" if self.high < target else "within the interval"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gain:
    """What a variant has over another.

    Attributes:
        absolute: difference of accepted / drafted.
        relative: the same as a part of the other's.
        length: difference of the mean accepted length, as a part of the other's.
        seeds: `relative` of each seed that both have.
    """

    absolute: Change
    relative: Change
    length: Change
    seeds: Sequence[float]


class Study:
    """One or several results of the same study.

    Args:
        results: contents of `study.json` files; what a later one measured is no longer skipped.

    Raises:
        ValueError: they are not of the same study, a variant is there twice, or the baseline was
            not measured.

    Attributes:
        rows: what was measured of each variant and seed.
        sets: data sets by name, as far as the results say.
    """

    def __init__(self, results: Sequence[Mapping[str, Any]]):
        if not results:
            raise ValueError("no results: give at least one study.json")
        self.parts, first = results, results[0]
        for part, name in itertools.product(results[1:], _SAME):
            if part[name] != first[name]:
                raise ValueError(
                    f"results differ in {name!r}: {first[name]!r} and {part[name]!r}; join only "
                    "results on the same trunk, with the same settings and prompts"
                )
        self.trunk: Mapping[str, Any] = first["trunk"]
        self.options: Mapping[str, Any] = first["settings"]
        self.evaluation: Mapping[str, Any] = first["evaluation"]
        self.baseline: str = first["baseline"]
        # A result that was written before there were several data sets names none.
        self.rows: list[Row] = [{"data": CORPUS, **row} for part in results for row in part["rows"]]
        self.sets = _joined([part.get("data_sets", {}) for part in results])
        seen = [(row["variant"], row["seed"]) for row in self.rows]
        if twice := sorted({one for one in seen if seen.count(one) > 1}):
            raise ValueError(f"results hold variant {twice[0][0]!r} of seed {twice[0][1]} twice")
        found = {slug_of(*one) for one in seen}
        skipped = dict.fromkeys(slug for part in results for slug in part["skipped"])
        self.skipped = [slug for slug in skipped if slug not in found]
        records = [record for row in self.rows for record in row["acceptance"]]
        self.settings = sorted({_setting(record) for record in records})
        self._check(records)

    @classmethod
    def read(cls, paths: Sequence[str | Path]) -> "Study":
        """Reads results, joined.

        Raises:
            ValueError: a file is no result of a study, or they do not fit together.
        """
        results = []
        for path in paths:
            try:
                result = json.loads(Path(path).read_text())
            except json.JSONDecodeError as error:
                raise ValueError(f"{path}: not JSON: {error}") from error
            wanted = (*_SAME, "rows", "skipped", "command", "commit", "device", "versions")
            lacking = [name for name in wanted if name not in result]
            if lacking:
                raise ValueError(f"{path}: no result of `train-mtp study`: lacks {lacking[0]!r}")
            results.append(result)
        return cls(results)

    @property
    def kinds(self) -> list[str]:
        """Kinds of text."""
        return list(self.evaluation["prompts"])

    @property
    def names(self) -> list[str]:
        """Variants that were measured: what is not trained, the baseline, then its rivals by data,
        objective, weights and depths.
        """
        usual = self.of(self.baseline)

        def place(row: Row) -> tuple[Any, ...]:
            strange = any(row[field] != usual[field] for field in OBJECTIVE)
            other = [row[field] != usual[field] for field in ("data", "weights")]
            first = row["variant"] != self.baseline
            return row["trained"], first, other[0], strange, other[1], row["layers"]

        rows = sorted((row for row in self.rows if row["acceptance"]), key=place)
        return list(dict.fromkeys(row["variant"] for row in rows))

    @property
    def learnt(self) -> list[str]:
        """Data sets that variants learnt from, the baseline's first."""
        found = dict.fromkeys(row["data"] for row in self.rows if row["trained"])
        return sorted(found, key=lambda name: name != self.of(self.baseline)["data"])

    @property
    def untrained(self) -> str | None:
        """The checkpoint's own module as it came, if it was measured."""
        return next((name for name in self.names if not self.of(name)["trained"]), None)

    def of(self, name: str) -> Row:
        """The first row of a variant: its seeds differ in what they measured, not in what it is."""
        return next(row for row in self.rows if row["variant"] == name)

    def score(self, name: str, setting: Setting, kind: str | None = None) -> Score | None:
        """Acceptance on all prompts or those of a kind; None if it was not measured there."""
        records = self._records(name, setting)
        if not records:
            return None
        counts = np.stack([_counts(record, kind) for record in records.values()])
        accepted, drafted = counts.sum(axis=0)
        rate = float(accepted.sum() / max(drafted.sum(), 1))
        here = [record["kinds"][kind] if kind else record for record in records.values()]
        at = {
            figure: np.mean([np.array(record[figure], float) for record in here], axis=0).tolist()
            for figure in ("per_position", "conditional")
        }
        sums = counts.sum(axis=-1)
        seeds = (sums[:, 0] / np.maximum(sums[:, 1], 1)).tolist()
        interval, length = bootstrap(accepted, drafted), setting.length(rate)
        return Score(rate=rate, ci95=interval, length=length, seeds=seeds, **at)

    def gain(self, name: str, over: str, setting: Setting, kind: str | None = None) -> Gain | None:
        """What `name` has over `over` on the seeds that both have; None if there are none. What is
        not trained is the same for all seeds.
        """
        ours, theirs = (self._records(one, setting) for one in (name, over))
        if not self.of(name)["trained"]:
            ours = dict.fromkeys(theirs, *ours.values())
        if not self.of(over)["trained"]:
            theirs = dict.fromkeys(ours, *theirs.values())
        common = [seed for seed in ours if seed in theirs]
        if not common:
            return None
        counts = np.stack(
            [[_counts(side[seed], kind) for side in (ours, theirs)] for seed in common]
        )  # [seed, side, accepted and drafted, prompt]
        plain = counts.sum(axis=0)
        drawn = np.tensordot(_draws(counts.shape[-1]), plain, axes=(1, 2))  # [resample, side, ..]
        both = np.concatenate([plain.sum(axis=-1)[None], drawn])
        rates = _rates(both)
        return Gain(
            absolute=_change(rates[0] - rates[1]),
            relative=_change(_part(*rates)),
            length=_change(_part(*map(setting.length, rates))),
            seeds=_part(*_rates(counts.sum(axis=-1))).tolist(),
        )

    def rivals(self, fields: Sequence[str]) -> list[list[str]]:
        """Groups of trained variants that differ in `fields` alone ("data" may be one of them), the
        baseline's choice first.
        """
        groups: dict[tuple[Any, ...], list[str]] = {}
        for name in self.names:
            row = self.of(name)
            if row["trained"]:
                rest = tuple(row[field] for field in (*FIELDS, "data") if field not in fields)
                groups.setdefault(rest, []).append(name)
        usual = {field: self.of(self.baseline)[field] for field in fields}
        for group in groups.values():
            group.sort(key=lambda name: any(self.of(name)[f] != usual[f] for f in fields))
        return [group for group in groups.values() if len(group) > 1]

    def _records(self, name: str, setting: Setting) -> dict[int, Mapping[str, Any]]:
        """What was measured of a variant, by seed."""
        return {
            row["seed"]: record
            for row in self.rows
            if row["variant"] == name
            for record in row["acceptance"]
            if _setting(record) == setting
        }

    def _check(self, records: Sequence[Mapping[str, Any]]) -> None:
        measured = {row["variant"] for row in self.rows if row["acceptance"]}
        if self.baseline not in measured:
            raise ValueError(f"the baseline {self.baseline!r} was not measured; add its result")
        for record in records:
            setting, said = _setting(record), record["mean_accepted_length"]
            if not math.isclose(said, setting.length(record["accepted_per_drafted"])):
                raise ValueError(
                    f"a record of {setting} says mean_accepted_length={said}, but all its drafts "
                    f"make {setting.length(record['accepted_per_drafted'])}: steps that draft less "
                    "than all tokens cannot be compared here"
                )


def _joined(parts: Sequence[Mapping[str, Any]]) -> dict[str, Mapping[str, Any]]:
    """Data sets of several results by name; raises ValueError if two call different ones so."""
    joined: dict[str, Mapping[str, Any]] = {}
    for name, facts in itertools.chain.from_iterable(part.items() for part in parts):
        if joined.setdefault(name, facts) != facts:
            raise ValueError(
                f"results differ in the data set {name!r}: {joined[name]!r} and {facts!r}; join "
                "only results on the same data"
            )
    return joined


def _setting(record: Mapping[str, Any]) -> Setting:
    return Setting(drafts=record["drafts"], temperature=record["temperature"])


def _counts(record: Mapping[str, Any], kind: str | None) -> np.ndarray:
    """[2, prompt]: accepted and drafted."""
    kinds = [record["kinds"][kind]] if kind else record["kinds"].values()
    return np.array([[n for k in kinds for n in k[name]] for name in ("accepted", "drafted")])


@functools.cache
def _draws(prompts: int) -> np.ndarray:
    """[resample, prompt]: how often each prompt is drawn, the draws those of `bootstrap`."""
    picks = np.random.default_rng(0).integers(0, prompts, (RESAMPLES, prompts))
    return np.stack([np.bincount(row, minlength=prompts) for row in picks]).astype(float)


def _rates(counts: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """Accepted / drafted of both sides, from [.., side, accepted and drafted]."""
    rates = counts[..., 0] / np.maximum(counts[..., 1], 1)
    return rates[..., 0], rates[..., 1]


def _part(ours: np.ndarray, theirs: np.ndarray) -> np.ndarray:
    return (ours - theirs) / np.maximum(theirs, 1e-9)


def _change(values: np.ndarray) -> Change:
    """From what was measured, and after it the same of every resample."""
    low, high = np.quantile(values[1:], [0.025, 0.975])
    return Change(value=float(values[0]), low=float(low), high=float(high))
