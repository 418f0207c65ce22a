"""Acceptance of every variant of a study, by real speculative decoding on the same prompts.

Variants that draft in the same way and as many tokens share one compiled step: a chain is cut to
the modules that draft, since what later modules would say is never asked. Steps that differ are
compiled and run side by side.
"""

import contextlib
import dataclasses
import itertools
import threading
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from dskjax.config import ModelConfig
from dskjax.decode import AcceptanceStats, RuleOptions
from dskjax.evaluation import documents_by_kind
from dskjax.params import Params
from dskjax.tokenizer import Tokenizer
from train_mtp.acceptance import decode, prompts_of, record
from train_mtp.heads.recipe import MODULES
from train_mtp.heads.run import shipped
from train_mtp.study.train import Trainee

Prompts = Mapping[str, Sequence[Sequence[int]]]
"""Token ids by kind of text."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Evaluation:
    """How acceptance is measured.

    Attributes:
        text: held-out files, "KIND=PATH" or plain.
        drafts: numbers of drafts a step.
        temperatures: of target and drafts.
        rule: acceptance rule; one that serves all temperatures shares its compiled step.
        prompts: most prompts of each kind.
        prompt_tokens: tokens of each.
        stride: tokens between two prompts of one document.
        max_tokens: new tokens a prompt.
        seed: of the sampling.
    """

    text: Sequence[str | Path]
    drafts: tuple[int, ...] = (2, 3)
    temperatures: tuple[float, ...] = (0.0, 1.0)
    rule: str = "rejection"
    prompts: int = 64
    prompt_tokens: int = 64
    stride: int = 512
    max_tokens: int = 64
    seed: int = 0

    def __post_init__(self):
        RuleOptions.parse(self.rule)
        if not self.text or isinstance(self.text, str):
            raise ValueError(f"text={self.text!r} must list at least one held-out file")
        for name in ("prompts", "prompt_tokens", "stride", "max_tokens"):
            if getattr(self, name) < 1:
                raise ValueError(f"{name}={getattr(self, name)} must be at least 1")
        for name, least in (("drafts", 1), ("temperatures", 0)):
            values = getattr(self, name)
            if not values or min(values) < least:
                raise ValueError(f"{name}={values} must be at least {least}, and one of them")

    def read(self, tokenizer: Tokenizer) -> Prompts:
        """The prompts, by kind of text."""
        kinds = documents_by_kind(self.text, tokenizer=tokenizer)
        return {
            kind: prompts_of(
                documents,
                tokenizer,
                count=self.prompts,
                length=self.prompt_tokens,
                stride=self.stride,
            )
            for kind, documents in kinds.items()
        }


class Ahead:
    """Compiles the steps of the evaluation while variants still learn: the device is busy with
    these, the host is not.

    Args:
        frozen: params of the trunk, its own modules left out.
        prompts: what to continue.
        evaluation: how.
    """

    def __init__(self, frozen: Params, prompts: Prompts, evaluation: Evaluation):
        self._frozen, self._prompts = frozen, prompts
        self._evaluation = dataclasses.replace(evaluation, temperatures=evaluation.temperatures[:1])
        self._begun: set[tuple[str, int]] = set()

    @contextlib.contextmanager
    def running(self, trainees: Sequence[Trainee]) -> Iterator[None]:
        """Compiles what is new in another thread, by a decoding of the weights that `trainees` have
        now, whose counts nobody keeps; waits for it at the end.
        """
        fresh = {}
        for trainee, drafts in itertools.product(trainees, self._evaluation.drafts):
            kind = (trainee.variant.config.weights, drafts)
            if trainee.variant.drafts(drafts) and kind not in self._begun:
                # A copy, as training gives its arrays away.
                heads = jax.tree.map(jnp.copy, trainee.state.params)
                state = dataclasses.replace(trainee.state, params=heads)
                fresh[kind] = dataclasses.replace(trainee, state=state)
                self._begun.add(kind)
        with ThreadPoolExecutor(max_workers=max(len(fresh), 1)) as pool:
            works = [
                pool.submit(
                    measure_one, trainee, self._frozen, self._prompts, self._evaluation, drafts
                )
                for (_, drafts), trainee in fresh.items()
            ]
            yield
            for work in works:
                work.result()


def evaluate_together(
    trainees: Sequence[Trainee],
    frozen: Params,
    prompts: Prompts,
    evaluation: Evaluation,
    on_done: Callable[[Trainee, list[dict[str, Any]], float], Any],
) -> None:
    """Measures every variant at every number of drafts that it can serve.

    Args:
        trainees: variants whose heads are final.
        frozen: params of the trunk, its own modules left out.
        prompts: what to continue.
        evaluation: how.
        on_done: called once a variant, never twice at a time, with its records (`measure_one`) and
            the seconds they took.
    """
    todo: dict[tuple[str, int], list[Trainee]] = {}
    for trainee, drafts in itertools.product(trainees, evaluation.drafts):
        if trainee.variant.drafts(drafts):
            todo.setdefault((trainee.variant.config.weights, drafts), []).append(trainee)
    left = {id(t): sum(t in queue for queue in todo.values()) for t in trainees}
    found: dict[int, list[dict[str, Any]]] = {id(t): [] for t in trainees}
    seconds = dict.fromkeys(found, 0.0)
    lock = threading.Lock()

    def work(drafts: int, queue: list[Trainee]) -> None:
        for trainee in queue:
            begun = time.monotonic()
            records = measure_one(trainee, frozen, prompts, evaluation, drafts)
            with lock:
                key = id(trainee)
                found[key] += records
                seconds[key] += time.monotonic() - begun
                left[key] -= 1
                if not left[key]:
                    ordered = sorted(found[key], key=lambda r: (r["drafts"], r["temperature"]))
                    on_done(trainee, ordered, seconds[key])

    with ThreadPoolExecutor(max_workers=max(len(todo), 1)) as pool:
        works = [pool.submit(work, drafts, queue) for (_, drafts), queue in todo.items()]
        for one in works:
            one.result()


def measure_one(
    trainee: Trainee, frozen: Params, prompts: Prompts, evaluation: Evaluation, drafts: int
) -> list[dict[str, Any]]:
    """One record a temperature: `train_mtp.acceptance.record` of all prompts, and in `kinds` those
    of each kind, there with `accepted` and `drafted` of every prompt in order.
    """
    params, cfg = drafting_model(trainee, frozen, drafts)
    records = []
    for temperature in evaluation.temperatures:
        with trainee.recipe.matmul_precision():
            kinds = decode(
                params,
                cfg,
                prompts,
                drafts=drafts,
                temperature=temperature,
                rule=evaluation.rule,
                max_tokens=evaluation.max_tokens,
                seed=evaluation.seed,
                impl=trainee.recipe.impl,
            )
        everything = list(itertools.chain.from_iterable(kinds.values()))
        by_kind = {kind: _with_prompts(stats) for kind, stats in kinds.items()}
        setting = {"drafts": drafts, "temperature": temperature}
        records.append({**setting, **record(everything), "kinds": by_kind})
    return records


def drafting_model(trainee: Trainee, frozen: Params, drafts: int) -> tuple[Params, ModelConfig]:
    """The trunk with the modules that draft, as they would be exported."""
    heads, cfg = shipped(trainee.heads, trainee.recipe, frozen), trainee.recipe.cfg
    if trainee.variant.config.weights == "independent":
        mtp = dataclasses.replace(cfg.mtp, num_nextn_predict_layers=drafts)
        cfg = dataclasses.replace(cfg, mtp=mtp)
        heads = {MODULES: jax.tree.map(lambda w: w[:drafts], heads[MODULES])}
    return {**frozen, **heads}, cfg


def _with_prompts(stats: Sequence[AcceptanceStats]) -> dict[str, Any]:
    each = {name: [int(getattr(one, name)) for one in stats] for name in ("accepted", "drafted")}
    return {**record(stats), **each}
