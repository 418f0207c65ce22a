"""The loop: data -> step -> metrics -> checkpoints.

The host runs one step ahead of the devices: it reads the metrics of a step after it has queued the
next, so the devices never wait for it. Before anything is saved or evaluated it catches up, so a
checkpoint never holds a state whose loss nobody has looked at.
"""

import contextlib
import dataclasses
import math
import signal
import threading
import time
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dskjax.checkpoint.store import Store
from train_mtp.data import Batch, PackedDataset, read_ahead
from train_mtp.flops import Speed
from train_mtp.metrics import MetricsLog, Progress, to_host
from train_mtp.state import TrainState


class Interrupted(Exception):
    """A signal ended the run; its state is saved, and the same call goes on from there."""

    def __init__(self, signum: int, step: int, out: Path):
        self.signum = signum
        self.step = step
        super().__init__(
            f"stopped by {signal.Signals(signum).name} after step {step}, which is saved in {out}; "
            "run the same command to go on"
        )


class NonFiniteLossError(Exception):
    """The loss or the gradient became NaN or infinite."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """When the loop does what, by steps done.

    Attributes:
        steps: where the run ends.
        save_every, log_every, eval_every: periods; `eval_every` 0 is never.
        deadline: `time.monotonic()` to stop at, or None.
    """

    steps: int
    save_every: int
    log_every: int
    eval_every: int = 0
    deadline: float | None = None

    def logs(self, step: int) -> bool:
        """Whether to write metrics after this step."""
        return step % self.log_every == 0 or step in (1, self.steps)

    def saves(self, step: int) -> bool:
        """Whether to write a checkpoint after this step."""
        return step % self.save_every == 0 or step == self.steps

    def evaluates(self, step: int) -> bool:
        """Whether to evaluate after this step; the evaluation at the end is not the loop's."""
        return bool(self.eval_every) and step % self.eval_every == 0 and step != self.steps


@dataclasses.dataclass(kw_only=True)
class Run:
    """What the loop works with.

    Attributes:
        step: (state, placed batch) -> (state, metrics on the devices); the state is donated.
        place: copies a batch to the devices.
        plan: when to do what.
        dataset: batches by step number.
        store: checkpoints.
        log: metrics, None on processes that do not write.
        progress: the bar.
        out: where a bad batch is kept.
        extra: JSON kept with each checkpoint; the loop adds `seconds`.
        seconds: wall time of the run before this process, without set-up.
        evaluate: called with params, returns values for the log.
        judge: makes the store's metrics of an evaluation's values; every saved step is then
            evaluated first. None saves without metrics.
        speed: turns tokens per second into MFU; None leaves that out.
        on_step: called with each finished step's number and metrics, one step late.
    """

    step: Callable[[TrainState, Any], tuple[TrainState, Mapping[str, Any]]]
    place: Callable[[Batch], Any]
    plan: Plan
    dataset: PackedDataset
    store: Store
    log: MetricsLog | None
    progress: Progress
    out: Path
    extra: Mapping[str, Any]
    seconds: float = 0.0
    evaluate: Callable[[Any], Mapping[str, Any]] | None = None
    judge: Callable[[Mapping[str, Any]], Mapping[str, float]] | None = None
    speed: Speed | None = None
    on_step: Callable[[int, Mapping[str, Any]], Any] | None = None

    def train(self, state: TrainState) -> TrainState:
        """Trains from the state's step to the end of the plan or to its deadline.

        Raises:
            Interrupted: SIGINT or SIGTERM came; the state is saved.
            NonFiniteLossError: the batch is saved, the state is not.
        """
        start = int(state.step)
        if start >= self.plan.steps:
            return state
        self._clock = _Clock(self.dataset.batch_size * self.dataset.seq_len, self.seconds)
        self._pending: tuple[int, Mapping[str, Any]] | None = None
        batches = read_ahead(self.dataset, start=start, stop=self.plan.steps, place=self.place)
        with _signals() as received, self.progress.running():
            for done, batch in enumerate(batches, start=start + 1):
                state, metrics = self.step(state, batch)
                self._catch_up()
                self._pending = (done, metrics)
                over = self.plan.deadline is not None and time.monotonic() > self.plan.deadline
                saves, values = self.plan.saves(done), None
                if self.plan.evaluates(done) or (saves and self.judge is not None):
                    values = self._run_evaluation(done, state)
                if saves or received or over:
                    self._save(done, state, values)
                if received:
                    self.store.wait()
                    raise Interrupted(received[0], done, self.out)
                if over:
                    self.progress.say(f"time is up after step {done} of {self.plan.steps}")
                    break
            self._catch_up()
        self.store.wait()
        self.seconds = self._clock.seconds
        return state

    def _catch_up(self) -> None:
        """Reads, checks and writes the metrics of the step that was queued last."""
        if self._pending is None:
            return
        (done, on_device), self._pending = self._pending, None
        metrics = to_host(on_device)
        self._clock.tick(done)
        speed = self._clock.tokens_per_s
        mfu = None if self.speed is None else self.speed.mfu(speed)
        if not all(map(math.isfinite, (metrics["total_loss"], metrics["grad_norm"]))):
            raise NonFiniteLossError(self._keep_bad_batch(done, metrics))
        if self.log is not None and self.plan.logs(done):
            clock = {"seconds": self._clock.seconds, "tokens_per_s": speed, "mfu": mfu}
            self.log.write("train", done, {**metrics, **clock})
        self.progress.step(done, metrics, speed, mfu)
        if self.on_step is not None:
            self.on_step(done, metrics)

    def _save(self, done: int, state: TrainState, values: Mapping[str, Any] | None) -> None:
        self._catch_up()
        judged = None if self.judge is None or values is None else self.judge(values)
        if self.store.latest() != done:
            extra = {**self.extra, "seconds": self._clock.seconds}
            self.store.save(done, state, extra, judged)

    def _run_evaluation(self, done: int, state: TrainState) -> Mapping[str, Any]:
        self._catch_up()
        assert self.evaluate is not None
        values = self.evaluate(state.params)
        if self.log is not None:
            self.log.write("eval", done, values)
        self._clock.skip()
        return values

    def _keep_bad_batch(self, done: int, metrics: Mapping[str, Any]) -> str:
        batch: Batch = self.dataset.batch(done - 1)
        path = self.out / f"bad_batch_step{done}_process{jax.process_index()}.npz"
        arrays = {name: value for name, value in batch._asdict().items() if value is not None}
        np.savez_compressed(path, **arrays)
        self.store.wait()
        good = self.store.latest()
        return (
            f"step {done}: loss {metrics['loss']}, by depth {metrics['mtp_loss']}, gradient norm "
            f"{metrics['grad_norm']}. The batch is in {path}; the last good checkpoint is "
            f"{'none' if good is None else f'step {good}'}. Lower lr or clip, lengthen warmup, or "
            "try precision float32; if the batch alone gives it, look at its text."
        )


class _Clock:
    """Wall time of the steps, and speed since the last tick, smoothed."""

    def __init__(self, tokens: int, seconds: float):
        self.tokens_per_s = math.nan
        self._tokens = tokens
        self._before = seconds
        self._start = time.monotonic()
        self._last: tuple[int, float] | None = None

    @property
    def seconds(self) -> float:
        return round(self._before + time.monotonic() - self._start, 3)

    def tick(self, done: int) -> None:
        now = time.monotonic()
        if self._last is not None:  # the first step compiles
            steps, at = self._last
            speed = (done - steps) * self._tokens / max(now - at, 1e-9)
            old = self.tokens_per_s
            self.tokens_per_s = speed if math.isnan(old) else 0.9 * old + 0.1 * speed
        self._last = (done, now)

    def skip(self) -> None:
        """Leaves out of the speed what happened since the last tick."""
        self._last = None


@contextlib.contextmanager
def _signals() -> Iterator[list[int]]:
    """Collects SIGINT and SIGTERM; a second SIGINT interrupts at once. Only the main thread can."""
    received: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield received
        return

    def note(signum: int, _: Any) -> None:
        received.append(signum)
        signal.signal(signal.SIGINT, signal.default_int_handler)

    old = {name: signal.signal(name, note) for name in (signal.SIGINT, signal.SIGTERM)}
    try:
        yield received
    finally:
        for name, handler in old.items():
            signal.signal(name, handler)
