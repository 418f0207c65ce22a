"""The numbers of `metrics.jsonl` as scalars for TensorBoard (the extra `tensorboard`)."""

import time
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from dskjax.extras import require

_FLUSH_S = 10
_NOT_FINITE = ("nan", "inf", "-inf")  # as `train_mtp.metrics` spells them


class TensorBoardLog:
    """An event file of one run, always begun anew: nothing in it can be there twice.

    A scalar's name is the path to it in the line of metrics, "train/loss", "train/mtp_loss/1" for
    the first of a list. Its time is the run's own clock, on which no time passes between the
    processes that carried it on.

    Args:
        folder: older event files in it are removed.
        rows: lines of metrics to begin with.
    """

    def __init__(self, folder: Path, rows: list[dict[str, Any]]):
        package = require("tensorboardX", str(folder))
        self._scalar = require("tensorboardX.summary", str(folder)).scalar
        self._summary = require("tensorboardX.proto.summary_pb2", str(folder)).Summary
        for old in folder.glob("events.out.tfevents.*"):
            old.unlink()
        # purge_step: a TensorBoard that is looking on forgets what it read from the old files.
        self._writer = package.SummaryWriter(str(folder), purge_step=0, flush_secs=_FLUSH_S)
        self._seconds = 0.0
        self._start = time.time() - max((row.get("seconds", 0.0) for row in rows), default=0.0)
        for row in rows:
            self.write(row)

    def write(self, row: Mapping[str, Any]) -> None:
        """Adds the numbers of a line of metrics."""
        self._seconds = row.get("seconds", self._seconds)
        values = {name: value for name, value in row.items() if name not in ("event", "step")}
        summary = self._summary()  # one record for the line: `add_scalar` would write one a number
        for tag, value in _scalars(row["event"], values):
            summary.MergeFrom(self._scalar(tag, value))
        at = self._start + self._seconds
        self._writer.file_writer.add_summary(summary, row["step"], walltime=at)

    def close(self) -> None:
        """Writes what is left and closes the file."""
        self._writer.close()


def _scalars(tag: str, value: Any) -> Iterator[tuple[str, float]]:
    if isinstance(value, Mapping):
        for name, item in value.items():
            yield from _scalars(f"{tag}/{name}", item)
    elif isinstance(value, list | tuple):
        for number, item in enumerate(value, start=1):
            yield from _scalars(f"{tag}/{number}", item)
    elif isinstance(value, int | float) or value in _NOT_FINITE:
        yield tag, float(value)
