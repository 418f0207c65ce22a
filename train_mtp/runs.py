"""What every kind of run does around its loop: its folder, its devices, its resumption.

out/run.json            what makes the run this one
out/metrics.jsonl       a line per logged step and per evaluation
out/metrics.png         the same as curves
out/tensorboard/        the same for TensorBoard, if asked for
out/checkpoints/N/      states by step
"""

import contextlib
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import jax

from dskjax.checkpoint.store import Store
from dskjax.evaluation.kinds import documents_by_kind
from dskjax.extras import require
from dskjax.provenance import describe_devices
from dskjax.tokenizer import Tokenizer
from train_mtp.config import RunConfig
from train_mtp.data import PackedDataset
from train_mtp.evaluation import HeldOut, hold_out
from train_mtp.loop import Plan
from train_mtp.metrics import METRICS, MetricsLog, Progress
from train_mtp.recipe import StepRecipe
from train_mtp.state import TrainState, abstract_state
from train_mtp.token_store import TokenStore

RUN = "run.json"


def is_first() -> bool:
    """Whether this process writes what all would write."""
    return jax.process_index() == 0


def dataset_of(
    corpus: TokenStore,
    *,
    seq_len: int,
    batch_size: int,
    seed: int,
    answers_only: bool = False,
) -> PackedDataset:
    """This process's part of the packed corpus."""
    return PackedDataset(
        corpus,
        seq_len=seq_len,
        batch_size=batch_size,
        seed=seed,
        process_index=jax.process_index(),
        process_count=jax.process_count(),
        answers_only=answers_only,
    )


def check_extras(config: RunConfig) -> None:
    """Raises ValueError if the run asks for what is not installed."""
    if config.tensorboard:
        require("tensorboardX", "tensorboard=True")


def log_of(config: RunConfig, start: int) -> contextlib.AbstractContextManager[MetricsLog | None]:
    """The metrics file; None on processes that do not write."""
    if not is_first():
        return contextlib.nullcontext()
    out = Path(config.out)
    mirror = out / "tensorboard" if config.tensorboard else None
    return MetricsLog(out / METRICS, steps=start, tensorboard=mirror)


def plan_of(config: RunConfig, started: float) -> Plan:
    """When the loop does what; `started` is the `time.monotonic()` that minutes count from."""
    return Plan(
        steps=config.steps,
        save_every=config.save_every,
        log_every=config.log_every,
        eval_every=config.eval_every,
        deadline=None if config.max_minutes is None else started + 60 * config.max_minutes,
    )


def progress_of(config: RunConfig, dataset: PackedDataset, start: int, what: str) -> Progress:
    """The bar, which first says what is trained."""
    progress = Progress(config.steps, start, shown=config.progress and is_first())
    progress.say(
        f"{what}, {dataset.store.n_tokens / 1e6:.1f}M tokens of text, {describe_devices()}, "
        + (f"resumed at step {start}" if start else "from scratch")
    )
    return progress


def held_out(config: RunConfig, tokenizer: Tokenizer, max_tokens: int | None) -> dict[str, HeldOut]:
    """Held-out text by kind, packed like the training rows; empty if there is none."""
    if not config.eval_data:
        return {}
    kinds = documents_by_kind(config.eval_data, index=config.eval_index, tokenizer=tokenizer)
    return {
        kind: hold_out(
            documents,
            tokenizer,
            seq_len=config.seq_len,
            batch_size=config.batch_size,
            max_tokens=max_tokens,
        )
        for kind, documents in kinds.items()
    }


def begin(
    out: str | Path,
    store: Store,
    identity: Mapping[str, Any],
    recipe: StepRecipe,
    make: Callable[[], TrainState],
) -> tuple[TrainState, float]:
    """The state to begin with, and the wall time already spent on it.

    Args:
        out: folder of the run.
        store: its checkpoints.
        identity: what makes the run this one, as JSON.
        recipe: what the state looks like and where it lies.
        make: a fresh state, if there is no checkpoint.

    Raises:
        ValueError: the folder holds another run; the message names each difference.
    """
    step, note = store.latest(), Path(out) / RUN
    if step is None:
        if is_first():
            note.write_text(json.dumps(identity, indent=2, default=str) + "\n")
        return make(), 0.0

    def refuse_another(saved: Mapping[str, Any]) -> None:
        if changed := differences(saved, json.loads(json.dumps(identity, default=str))):
            raise ValueError(
                f"{out} holds another run, at step {step}: {'; '.join(changed)} "
                "(saved -> now). Give the same values to go on, or another out to start anew"
            )

    if note.is_file():  # says it better than a misshapen leaf
        refuse_another(json.loads(note.read_text()))
    state, extra = store.restore(step, abstract_state(recipe))
    seconds = extra.pop("seconds")
    refuse_another(extra)
    return state, seconds


def differences(saved: Mapping[str, Any], now: Mapping[str, Any]) -> list[str]:
    """Lines "name: SAVED -> NOW" for each field that two runs do not share; dotted if nested."""
    found = []
    for name in sorted({*saved, *now}):
        before, after = saved.get(name), now.get(name)
        if isinstance(before, dict) and isinstance(after, dict):
            found += [f"{name}.{line}" for line in differences(before, after)]
        elif before != after:
            found.append(f"{name}: {before!r} -> {after!r}")
    return found
