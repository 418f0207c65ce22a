"""A study: every variant of a table trained on one trunk in one process, and measured.

out/study.json              what was measured so far; a killed study leaves its finished variants
out/VARIANT/metrics.jsonl   losses and figures of its training
out/VARIANT/model/          trunk and heads, if asked for
"""

import functools
import shlex
import sys
import time
from collections.abc import Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from dskjax.checkpoint import hub
from dskjax.config import ModelConfig
from dskjax.documents import list_files
from dskjax.params import Params
from dskjax.tokenizer import Tokenizer
from train_mtp import runs
from train_mtp.data import PackedDataset
from train_mtp.heads.config import HeadsConfig
from train_mtp.heads.recipe import MODULES
from train_mtp.heads.run import check_fit, first_state, load_trunk, recipe_of, ship
from train_mtp.study.evaluate import Ahead, Evaluation, evaluate_together
from train_mtp.study.result import Result, head_of
from train_mtp.study.train import Steps, Trainee, train_together
from train_mtp.study.variants import CORPUS, Sets, Table, Variant, read_table
from train_mtp.token_store import TokenStore, build_store

TRAINING_SHARE = 2 / 3
"""Of the time left when a group begins, what its training may take; the rest is for measuring."""


def run_study(
    config: HeadsConfig,
    table: str | Path,
    evaluation: Evaluation,
    *,
    sets: Sets | None = None,
    keep: bool = False,
    command: str | None = None,
) -> Path:
    """Trains and measures every variant, seed after seed and data set after data set.

    Args:
        config: what all variants share; `out` is the study's folder. With `max_minutes` no further
            group of one seed and data set begins that, going by the one before it, would end too
            late, and a group's training ends after `TRAINING_SHARE` of the time left.
        table: JSON (`train_mtp.study.variants`).
        evaluation: how acceptance is measured.
        sets: data sets beside the corpus (`config.data`), which variants name.
        keep: also export each variant's model.
        command: how the study was started, for the record; this process's arguments when None.

    Returns:
        `out/study.json`.

    Raises:
        ValueError: something does not fit together.
    """
    clock = _Clock(config.max_minutes)
    variants = read_table(table, config, sets)
    _check_drafts(variants, evaluation)
    files = {name: list_files(part) for name, part in {CORPUS: config.data, **(sets or {})}.items()}
    folder = hub.find(config.trunk, progress=config.progress)
    params, trunk = load_trunk(config, folder, None)
    tokenizer = Tokenizer.load(folder)
    check_fit(config, trunk, tokenizer)
    prompts = evaluation.read(tokenizer)
    out = Path(config.out)
    out.mkdir(parents=True, exist_ok=True)
    texts = _texts(files, tokenizer, config)
    command = command or shlex.join(sys.argv)
    head = head_of(config, variants, evaluation, prompts, folder, params, command)
    result = Result(out, {**head, "data_sets": {name: text.facts for name, text in texts.items()}})
    frozen = {name: group for name, group in params.items() if name != MODULES}
    steps, ahead = Steps(), Ahead(frozen, prompts, evaluation)
    for group in variants.groups():
        if not clock.fits(group):
            result.skip(group)
            continue
        dataset = runs.dataset_of(
            texts[group[0].data].store,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            seed=group[0].config.seed,
            answers_only=config.answers_only,
        )
        begin = functools.partial(_begin, params=params, trunk=trunk)
        with ThreadPoolExecutor() as pool:  # each compiles its first weights
            trainees = list(pool.map(begin, group))
        with ahead.running(trainees):
            compiling = _train(trainees, frozen, dataset, steps, config, clock)
        sound = [trainee for trainee in trainees if not trainee.diverged]
        for trainee in trainees:
            if trainee.diverged:
                result.add(trainee, [], 0.0)
        evaluate_together(sound, frozen, prompts, evaluation, result.add)
        if keep:
            for trainee in sound:
                place = out / trainee.variant.slug / "model"
                record = {"variant": trainee.variant.name, "steps": trainee.steps}
                ship(place, trainee.heads, frozen, trainee.recipe, folder, record)
        clock.note(group, compiling)
    return result.path


class _Text(NamedTuple):
    """A data set: its tokens, and what the record says of it."""

    store: TokenStore
    facts: dict[str, Any]


def _texts(
    files: Mapping[str, list[Path]], tokenizer: Tokenizer, config: HeadsConfig
) -> dict[str, _Text]:
    """The data sets, tokenised."""
    texts = {}
    for name, paths in files.items():
        cache = config.cache_dir or Path(config.out) / "tokens"
        store = build_store(paths, tokenizer, cache, progress=config.progress)
        unscored = int(store.answers.sum()) if config.answers_only else 0
        facts = {
            "files": [path.name for path in paths],
            "documents": store.n_documents,
            "tokens": store.n_tokens,
            "scored": store.n_tokens - unscored,
        }
        texts[name] = _Text(store, facts)
    return texts


def _begin(variant: Variant, params: Params, trunk: ModelConfig) -> Trainee:
    recipe = recipe_of(variant.config, trunk, None)
    state = first_state(variant.config, recipe, params, trunk)
    return Trainee(variant=variant, recipe=recipe, state=state)


def _train(
    trainees: list[Trainee],
    frozen: Params,
    dataset: PackedDataset,
    steps: Steps,
    config: HeadsConfig,
    clock: "_Clock",
) -> float:
    """Trains those that are to be; returns seconds of compilation."""
    learning = [trainee for trainee in trainees if trainee.variant.trained]
    if not learning:
        return 0.0
    first = learning[0].variant
    what = f"{len(learning)} variants of seed {first.config.seed} on {first.data}"
    progress = runs.progress_of(config, dataset, 0, what)
    place = Path(config.out)
    return train_together(
        learning, frozen, dataset, steps, out=place, progress=progress, deadline=clock.deadline()
    )


def _check_drafts(table: Table, evaluation: Evaluation) -> None:
    """Raises ValueError for a variant that can serve none of the numbers of drafts."""
    for variant in table.variants:
        if not any(map(variant.drafts, evaluation.drafts)):
            raise ValueError(
                f"variant {variant.name!r} has {variant.config.layers} independent modules and "
                f"cannot draft any of drafts={evaluation.drafts}; add a lower number of drafts"
            )


class _Clock:
    """What is left of a study's time, and how long its groups of variants take."""

    def __init__(self, minutes: float | None):
        self._end = None if minutes is None else time.monotonic() + 60 * minutes
        self._last = time.monotonic()
        self._per_depth = 0.0

    def fits(self, group: list[Variant]) -> bool:
        """Whether a group would end in time, going by the one before it; the first always."""
        self._last = time.monotonic()
        if self._end is None or not self._per_depth:
            return True
        return self._last + self._per_depth * _depths(group) <= self._end

    def deadline(self) -> float | None:
        """When the training of the group that just began must end."""
        return self._end and self._last + TRAINING_SHARE * (self._end - self._last)

    def note(self, group: list[Variant], compiling: float) -> None:
        """The group that began last has ended; what compiling took will not be needed again."""
        spent = time.monotonic() - self._last - compiling
        self._per_depth = spent / _depths(group)


def _depths(group: list[Variant]) -> int:
    """Depths that are trained or, of the shipped module, drafted: what time goes by."""
    return sum(variant.config.layers for variant in group)
