"""Training of several sets of heads on one pass of the trunk.

The trunk runs once a batch; each set then takes its own step from the same hidden states and the
same law. What a set learns is, bit for bit, what a run of its own would teach it.
"""

import contextlib
import dataclasses
import functools
import math
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import jax

from dskjax.params import Params
from train_mtp.data import PackedDataset, read_ahead
from train_mtp.heads.recipe import HeadsRecipe
from train_mtp.heads.step import head_step, teach
from train_mtp.heads.sums import Taught
from train_mtp.metrics import METRICS, MetricsLog, Progress, to_host
from train_mtp.state import TrainState
from train_mtp.step import place_batch
from train_mtp.study.variants import Variant

Step = Callable[..., tuple[TrainState, dict[str, Any]]]


@dataclasses.dataclass(kw_only=True)
class Trainee:
    """One variant while it learns.

    Attributes:
        variant: what it is.
        recipe: its step.
        state: masters and moments.
        metrics: of its last step, on the host; empty if it is not trained.
        steps: steps taken.
        seconds: wall time of the training of all variants beside it.
    """

    variant: Variant
    recipe: HeadsRecipe
    state: TrainState
    metrics: dict[str, Any] = dataclasses.field(default_factory=dict)
    steps: int = 0
    seconds: float = 0.0

    @property
    def heads(self) -> Params:
        """fp32 masters."""
        return self.state.params

    @property
    def diverged(self) -> bool:
        """Whether its last loss is NaN or infinite."""
        return bool(self.metrics) and not math.isfinite(self.metrics["total_loss"])


class Steps:
    """The compiled steps of a study; variants that differ in their seed or data alone share one,
    and all share the trunk's pass.
    """

    def __init__(self):
        self._teach: Callable[..., Taught] | None = None
        self._of: dict[HeadsRecipe, Step] = {}

    def compile(self, trainees: Sequence[Trainee], frozen: Params, batch: Any) -> None:
        """Compiles what is missing, as many at a time as there are cores. Python traces one step
        after another, those of many depths first: they take the compiler longest.
        """
        recipe = trainees[0].recipe
        taught = jax.eval_shape(functools.partial(teach, recipe=recipe), frozen, batch)
        wanted = {t.recipe: t.state for t in trainees if t.recipe not in self._of}
        with ThreadPoolExecutor() as pool:
            made = {
                of: pool.submit(head_step.lower(state, frozen, batch, taught, recipe=of).compile)
                for of, state in sorted(wanted.items(), key=lambda item: -item[0].depths)
            }
            if self._teach is None:
                self._teach = teach.lower(frozen, batch, recipe=recipe).compile()
            self._of |= {of: step.result() for of, step in made.items()}

    def teach(self, frozen: Params, batch: Any) -> Taught:
        """The trunk's states and law on a batch."""
        assert self._teach is not None
        return self._teach(frozen, batch)

    def __getitem__(self, recipe: HeadsRecipe) -> Step:
        return self._of[recipe]


def train_together(
    trainees: Sequence[Trainee],
    frozen: Params,
    dataset: PackedDataset,
    steps: Steps,
    *,
    out: Path,
    progress: Progress,
    deadline: float | None = None,
) -> float:
    """Trains variants of one seed and data set on the same batches; the trainees' states change.

    Args:
        trainees: those to train, which share all but `train_mtp.study.variants.FIELDS`.
        frozen: params of the trunk, its own modules left out.
        dataset: batches by step number.
        steps: compiled steps; what is missing is added.
        out: folder of the study; each variant gets a folder with its metrics.
        progress: shows the first variant's figures.
        deadline: `time.monotonic()` after which no further step begins.

    Returns:
        Seconds of compilation.
    """
    config, recipe = trainees[0].variant.config, trainees[0].recipe
    assert all(t.recipe.temperatures == recipe.temperatures for t in trainees)
    with contextlib.ExitStack() as open_:
        logs = [open_.enter_context(_log(out, trainee)) for trainee in trainees]
        open_.enter_context(progress.running())
        batches = read_ahead(
            dataset,
            start=0,
            stop=config.steps,
            place=lambda batch: place_batch(batch, recipe.sharding),
        )
        begun, waited, last = time.monotonic(), 0.0, None
        for done, batch in enumerate(batches, start=1):
            if done == 1:
                at = time.monotonic()
                steps.compile(trainees, frozen, batch)
                waited = time.monotonic() - at
                progress.say(f"{len(trainees)} steps compiled in {waited:.0f} s")
            taught = steps.teach(frozen, batch)
            on_device = [_advance(t, steps, frozen, batch, taught) for t in trainees]
            if last is not None:
                jax.block_until_ready(last)  # the host stays one step ahead, not more
            last = on_device[-1]
            over = deadline is not None and time.monotonic() > deadline
            if over or done == config.steps or done == 1 or done % config.log_every == 0:
                clock = {"seconds": round(time.monotonic() - begun, 3)}
                for trainee, log, metrics in zip(trainees, logs, on_device, strict=True):
                    trainee.metrics = to_host(metrics)
                    log.write("train", done, {**trainee.metrics, **clock})
                spent = time.monotonic() - begun - waited
                tokens = done * dataset.batch_size * dataset.seq_len
                progress.step(done, trainees[0].metrics, tokens / spent)
            if over:
                progress.say(f"time is up after step {done} of {config.steps}")
                break
    for trainee in trainees:
        trainee.seconds = time.monotonic() - begun
    return waited


def _advance(
    trainee: Trainee, steps: Steps, frozen: Params, batch: Any, taught: Any
) -> Mapping[str, Any]:
    step = steps[trainee.recipe]
    trainee.state, metrics = step(trainee.state, frozen, batch, taught)
    trainee.steps += 1
    return metrics


def _log(out: Path, trainee: Trainee) -> MetricsLog:
    folder = out / trainee.variant.slug
    folder.mkdir(parents=True, exist_ok=True)
    return MetricsLog(folder / METRICS, steps=0)
