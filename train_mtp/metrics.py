"""What a run writes down: one JSON object a line, and a bar on the terminal.

`metrics.jsonl` holds lines of `"event": "train"` (values of that step's batch alone) and of
`"event": "eval"`. A resumed run drops the lines past its checkpoint, so that the file reads as if
nothing had happened; only the keys in `CLOCK` tell one run of the same configuration from another.
"""

import contextlib
import json
import math
import os
import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import jax
import numpy as np
import rich.console
import rich.progress

from train_mtp.tensorboard import TensorBoardLog

METRICS = "metrics.jsonl"
CLOCK = ("seconds", "tokens_per_s", "mfu")
"""Keys whose values depend on the machine and the hour."""

_PLAIN_EVERY_S = 15.0


class MetricsLog:
    """Appends lines to `metrics.jsonl`; every line is handed to the system at once.

    Args:
        path: the file.
        steps: keep lines of the first so many steps that the file has, drop what follows.
        tensorboard: folder that gets the same numbers for TensorBoard; None writes none.

    Raises:
        ValueError: a line is not JSON, or TensorBoard's writer is not installed.
    """

    def __init__(self, path: Path, *, steps: int, tensorboard: Path | None = None):
        kept = [row for row in read_metrics(path) if row["step"] <= steps] if path.exists() else []
        fresh = path.with_suffix(".tmp")
        fresh.write_text("".join(map(_line, kept)))
        os.replace(fresh, path)
        self._file = path.open("a")
        self._written = {(row["event"], row["step"]) for row in kept}
        self._mirror = None if tensorboard is None else TensorBoardLog(tensorboard, kept)

    def write(self, event: str, step: int, values: Mapping[str, Any]) -> None:
        """Adds a line, unless it is there. NaN and infinities, which JSON lacks, become strings."""
        if (event, step) in self._written:
            return
        self._written.add((event, step))
        row = {"event": event, "step": step, **values}
        self._file.write(_line(row))
        self._file.flush()
        if self._mirror is not None:
            self._mirror.write(row)

    def close(self) -> None:
        """Closes the file, and that of TensorBoard."""
        self._file.close()
        if self._mirror is not None:
            self._mirror.close()

    def __enter__(self) -> "MetricsLog":
        return self

    def __exit__(self, *error: object) -> None:
        self.close()


def read_metrics(path: str | Path) -> list[dict[str, Any]]:
    """Lines of a metrics file in order; a last line that a killed run left unfinished is ignored.

    Raises:
        ValueError: another line is not JSON.
    """
    text = Path(path).read_text()
    rows = []
    for number, line in enumerate(text.splitlines(keepends=True), start=1):
        try:
            rows.append(json.loads(line))
        except json.JSONDecodeError as error:
            if not line.endswith("\n"):
                break
            raise ValueError(f"{path}:{number}: not a line of metrics: {error}") from error
    return rows


def without_clock(row: Mapping[str, Any]) -> dict[str, Any]:
    """A line without what depends on the machine and the hour."""
    return {key: value for key, value in row.items() if key not in CLOCK}


def to_host(metrics: Mapping[str, Any]) -> dict[str, Any]:
    """Metrics of a step as Python numbers and lists; waits for the step to end."""
    return {key: np.asarray(value).tolist() for key, value in jax.device_get(metrics).items()}


def _line(row: Mapping[str, Any]) -> str:
    return json.dumps(finite(row), allow_nan=False) + "\n"


def finite(value: Any) -> Any:
    """JSON values in which NaN and infinities, which JSON lacks, are strings."""
    if isinstance(value, Mapping):
        return {key: finite(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [finite(item) for item in value]
    return str(value) if isinstance(value, float) and not math.isfinite(value) else value


class Progress:
    """A bar with step, loss, speed and time left; plain lines where there is no terminal."""

    def __init__(self, steps: int, start: int, *, shown: bool):
        self._console = rich.console.Console(stderr=True)
        self._plain = shown and not self._console.is_terminal
        self._shown = shown
        self._steps = steps
        self._said = -math.inf
        columns = (
            *("{task.description}", rich.progress.BarColumn(), "{task.completed}/{task.total}"),
            *("{task.fields[note]}", rich.progress.TimeRemainingColumn(elapsed_when_finished=True)),
        )
        self._bar = rich.progress.Progress(
            *columns, console=self._console, disable=not shown or self._plain, refresh_per_second=4
        )
        self._task = self._bar.add_task("training", total=steps, completed=start, note="")

    @contextlib.contextmanager
    def running(self) -> "Iterator[Progress]":
        """Shows the bar inside the block."""
        with self._bar:
            yield self

    def step(
        self, done: int, metrics: Mapping[str, Any], tokens_per_s: float, mfu: float | None = None
    ) -> None:
        """Shows the metrics of the last finished step."""
        mtp = " ".join(f"{loss:.3f}" for loss in metrics["mtp_loss"])
        note = f"loss {metrics['loss']:.3f}" + (f" mtp {mtp}" if mtp else "")
        note += f" {_speed(tokens_per_s)}" + ("" if mfu is None else f" MFU {mfu:.1%}")
        self._bar.update(self._task, completed=done, note=note)
        now = time.monotonic()
        if self._plain and (now - self._said > _PLAIN_EVERY_S or done == self._steps):
            self._said = now
            self.say(f"step {done}/{self._steps} {note}")

    def say(self, text: str) -> None:
        """Prints a line above the bar."""
        if self._shown:
            self._console.print(text, highlight=False, markup=False, soft_wrap=True)


def _speed(tokens_per_s: float) -> str:
    if not math.isfinite(tokens_per_s):
        return "- tok/s"
    for unit, size in (("M", 1e6), ("k", 1e3)):
        if tokens_per_s >= size:
            return f"{tokens_per_s / size:.3g}{unit} tok/s"
    return f"{tokens_per_s:.3g} tok/s"
