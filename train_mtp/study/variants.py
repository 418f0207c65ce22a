"""The table of a study: which heads are trained on the same trunk pass, and how each differs.

    {"baseline": "one layer",
     "variants": [{"name": "as shipped", "trained": false},
                  {"name": "one layer", "layers": 1, "weights": "shared", "seeds": [0, 1, 2]},
                  {"name": "independent 2", "layers": 2, "weights": "independent"},
                  {"name": "one layer, own text", "layers": 1, "weights": "shared",
                   "data": "on-policy"}]}

A variant names what it changes of the options that all share (`FIELDS`), and the data set that it
learns from if that is not the study's corpus. Everything else that the trunk pass or the batches
depend on is the same for all.
"""

import dataclasses
import itertools
import json
import re
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from train_mtp.heads.config import HeadsConfig

FIELDS = (
    *("layers", "weights", "init", "ce", "kl", "lk", "tv", "kl_decay", "depth_decay", "detach"),
    *("lr", "warmup", "min_lr_ratio", "weight_decay"),
)
"""Fields of `HeadsConfig` that a variant may set."""

CORPUS = "corpus"
"""Name of the data set of variants that name none."""

_BESIDE = ("name", "seeds", "trained", "data")  # what a row says beside FIELDS


@dataclasses.dataclass(frozen=True, kw_only=True)
class Variant:
    """One set of heads.

    Attributes:
        name: what the report calls it; several seeds of it share the name.
        config: the run of `train-mtp run` that would train the same heads.
        data: name of the data set whose files are `config.data`.
        trained: False is the checkpoint's own module as it came, recycled for every further draft.
    """

    name: str
    config: HeadsConfig
    data: str = CORPUS
    trained: bool = True

    @property
    def slug(self) -> str:
        """Name of its folder: "independent-2-seed0"."""
        return slug_of(self.name, self.config.seed)

    def drafts(self, drafts: int) -> bool:
        """Whether it can draft so many tokens: a chain has a module for each, one module any."""
        return self.config.weights == "shared" or drafts <= self.config.layers


def slug_of(name: str, seed: int) -> str:
    """What a variant of one seed is called in file names."""
    words = re.sub(r"[^a-z0-9]+", "-", name.lower()).strip("-")
    return f"{words}-seed{seed}"


@dataclasses.dataclass(frozen=True, kw_only=True)
class Table:
    """Variants, one for each name and seed, and the name of the one that the others are compared
    with.
    """

    baseline: str
    variants: tuple[Variant, ...]

    def groups(self) -> list[list[Variant]]:
        """Variants that learn from the same batches, those of one seed and data set: seed after
        seed, of each all data sets, both in the order of the table.
        """
        groups: dict[tuple[int, str], list[Variant]] = {}
        for seed, data in itertools.product(
            dict.fromkeys(variant.config.seed for variant in self.variants),
            dict.fromkeys(variant.data for variant in self.variants),
        ):
            groups[seed, data] = []
        for variant in self.variants:
            groups[variant.config.seed, variant.data].append(variant)
        return [group for group in groups.values() if group]


Sets = Mapping[str, Sequence[str | Path]]
"""Files and folders of data sets by name."""


def read_table(path: str | Path, shared: HeadsConfig, sets: Sets | None = None) -> Table:
    """Reads and checks a table.

    Args:
        path: JSON, as in this module's docstring.
        shared: what variants start from; its seed is that of variants without `seeds`, its data
            are the corpus.
        sets: further data sets, which variants name.

    Raises:
        ValueError: the table is not of this form, a variant cannot be trained, or a data set is
            empty or of no use to any variant; names both.
    """
    if CORPUS in (sets or {}):
        raise ValueError(f"no further data set can be called {CORPUS!r}: these are the data of all")
    known = {CORPUS: shared.data, **(sets or {})}
    if empty := [name for name, paths in known.items() if not paths]:
        raise ValueError(f"data set {empty[0]!r} is empty: give it at least one file or folder")
    try:
        given = json.loads(Path(path).read_text())
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: not JSON: {error}") from error
    if not isinstance(given, dict) or set(given) != {"baseline", "variants"}:
        raise ValueError(f'{path}: expected an object of "baseline" and "variants"')
    if not isinstance(given["variants"], list) or not given["variants"]:
        raise ValueError(f'{path}: "variants" must list at least one variant')
    variants, names = [], []
    for number, row in enumerate(given["variants"]):
        where = f"{path}: variant {number}"
        if not isinstance(row, dict) or not isinstance(row.get("name"), str):
            raise ValueError(f'{where}: expected an object with a "name", found {row!r}')
        names.append(row["name"])
        variants += _variants(row, shared, known, f"{where} ({row['name']!r})")
    folders = [variant.slug for variant in variants]
    if twice := sorted({slug for slug in folders if folders.count(slug) > 1}):
        raise ValueError(f"{path}: two variants would share the folder {twice[0]!r}; rename one")
    if given["baseline"] not in names:
        raise ValueError(f'{path}: "baseline": {given["baseline"]!r} is none of {names}')
    used = {variant.data for variant in variants if variant.trained}
    if unused := [name for name in known if name not in used and (used or name != CORPUS)]:
        raise ValueError(
            f"{path}: no variant learns from the data set {unused[0]!r}; leave it out, or name it "
            "as the data of a variant"
        )
    return Table(baseline=given["baseline"], variants=tuple(variants))


def _variants(row: Mapping[str, Any], shared: HeadsConfig, sets: Sets, where: str) -> list[Variant]:
    """The variants of one row of the table, one for each seed."""
    changes = {name: value for name, value in row.items() if name in FIELDS}
    if unknown := sorted(set(row) - set(FIELDS) - {*_BESIDE}):
        raise ValueError(
            f"{where}: {unknown[0]!r} cannot be set here; known: {', '.join((*_BESIDE, *FIELDS))}"
        )
    trained, seeds = row.get("trained", True), row.get("seeds", [shared.seed])
    data = row.get("data", CORPUS)
    if not isinstance(data, str) or data not in sets:
        raise ValueError(f"{where}: data={data!r} is none of the data sets: {', '.join(sets)}")
    if not isinstance(trained, bool):
        raise ValueError(f"{where}: trained={trained!r} must be true or false")
    if not _are_seeds(seeds):
        raise ValueError(f"{where}: seeds={seeds!r} must list different whole numbers from 0")
    if not trained:
        if extra := sorted(set(row) - {"name", "trained"}):
            raise ValueError(f"{where}: trained=false is the shipped module, without {extra}")
        changes = {"layers": 1, "weights": "shared", "init": "last"}
    for name, value in changes.items():
        kind = type(getattr(shared, name))
        if type(value) is not kind and (kind, type(value)) != (float, int):
            raise ValueError(f"{where}: {name}={value!r} must be of type {kind.__name__}")
    try:
        configs = [
            dataclasses.replace(shared, data=sets[data], seed=seed, **changes) for seed in seeds
        ]
    except ValueError as error:
        raise ValueError(f"{where}: {error}") from error
    return [
        Variant(name=row["name"], config=config, data=data, trained=trained) for config in configs
    ]


def _are_seeds(seeds: Any) -> bool:
    whole = isinstance(seeds, Sequence) and all(type(seed) is int and seed >= 0 for seed in seeds)
    return whole and len(seeds) == len(set(seeds)) > 0
