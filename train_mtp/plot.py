"""Curves of one or several runs, from their `metrics.jsonl`, as one PNG."""

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from train_mtp.metrics import METRICS, read_metrics

Row = Mapping[str, Any]


def plot_runs(runs: Sequence[str | Path], out: str | Path) -> Path:
    """Draws losses, agreement with the trunk, accepted length, MaxVio, gradient norm and what
    held-out text says over steps; a panel stays empty if no run knows of it.

    Args:
        runs: folders of runs, or metrics files; each gets a colour, named after its folder.
        out: PNG to write.

    Raises:
        FileNotFoundError: a run without metrics.
    """
    if not runs:
        raise ValueError("no runs to plot: give at least one folder of a run")
    figure = Figure(figsize=(20, 8), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(2, 4).ravel()
    for number, run in enumerate(map(Path, runs)):
        path = run / METRICS if run.is_dir() else run
        if not path.is_file():
            raise FileNotFoundError(f"{path}: no such file; expected the folder of a run")
        rows = read_metrics(path)
        train = [row for row in rows if row["event"] == "train"]
        evals = [row for row in rows if row["event"] == "eval"]
        style = {"color": f"C{number % 10}", "linewidth": 1.0}
        name = path.parent.name
        _line(axes[0], train, lambda row: row["loss"], label=name, **style)
        for depth in range(max((len(row["mtp_loss"]) for row in train), default=0)):
            shade = {**style, "label": f"{name} depth {depth + 1}", "alpha": 1 / (1 + 0.5 * depth)}
            _line(axes[1], train, lambda row, k=depth: row["mtp_loss"][k], **shade)
            _line(axes[2], train, lambda row, k=depth: row["mtp_agree"][k], **shade)
        _line(axes[3], train, lambda row: row.get("max_vio"), label=f"{name} worst layer", **style)
        mean = {**style, "linestyle": ":", "label": f"{name} mean of layers"}
        _line(axes[3], train, lambda row: row.get("mean_max_vio"), **mean)
        _line(axes[4], train, lambda row: row["grad_norm"], label=name, **style)
        _line(axes[6], train, lambda row: row.get("accepted_length"), label=name, **style)
        for nth, kind in enumerate(evals[-1]["kinds"] if evals else ()):
            marked = {**style, "marker": "osv^Dx*P"[nth % 8], "label": f"{name} {kind}"}
            for axis, figure_name in ((axes[5], "bits_per_byte"), (axes[7], "accepted_length")):
                _line(axis, evals, lambda row, k=kind, f=figure_name: _score(row, k, f), **marked)
    titles = (
        "trunk loss (nats/token)",
        "MTP loss (nats/token)",
        "MTP top-1 agreement with the trunk",
        "MaxVio: largest expert load / mean - 1",
        "gradient norm",
        "validation bits per byte",
        "accepted length, greedy, expected",
        "validation accepted length",
    )
    for axis, title in zip(axes, titles, strict=True):
        axis.set_title(title)
        axis.set_xlabel("step")
        axis.grid(alpha=0.3)
        if axis.get_legend_handles_labels()[0]:
            axis.legend(fontsize=7)
    figure.savefig(out, dpi=110)
    return Path(out)


def _score(row: Row, kind: str, name: str) -> float | None:
    return row["kinds"].get(kind, {}).get(name)


def _line(axis: Axes, rows: Sequence[Row], value: Callable[[Row], Any], **style: Any) -> None:
    points = [(row["step"], value(row)) for row in rows]
    points = [(step, float(y)) for step, y in points if y is not None]
    if points:
        axis.plot(*zip(*points, strict=True), **style)
