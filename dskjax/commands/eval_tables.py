"""Tables and plot of what `dskjax.commands.eval.evaluate` measured."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from rich.table import Table

from dskjax.evaluation.questions import ALL


def text_table(report: Mapping[str, Any]) -> Table:
    """Bits per byte by kind."""
    windows = report["settings"]["text"]
    title = f"bits per byte, windows of {windows['context']} tokens every {windows['stride']}"
    table = _table(title, "kind", "bits/byte", "95%", "nats/token", "documents", "bytes")
    for kind, row in report["text"].items():
        low, high = row["ci95"]
        table.add_row(
            kind,
            f"{row['bits_per_byte']:.3f}",
            f"{low:.3f}-{high:.3f}",
            f"{row['nats_per_token']:.3f}",
            f"{row['documents']:,}",
            f"{row['bytes']:,}",
        )
    return table


def reasoning_table(report: Mapping[str, Any]) -> Table:
    """Right answers by task."""
    how = report["settings"]["reasoning"]
    title = f"right answers, T = {how['temperature']:g}, up to {how['max_tokens']} tokens"
    names = ("task", "right", "95%", "questions", "tokens", "cut off", "no answer")
    several = how["samples"] > 1
    table = _table(title, *names, *(["any right"] if several else []))
    for task, row in report["reasoning"].items():
        low, high = row["ci95"]
        table.add_row(
            task,
            f"{100 * row['accuracy']:.1f}%",
            f"{100 * low:.1f}-{100 * high:.1f}%",
            f"{row['questions']:,}",
            f"{row['tokens_per_answer']:.0f}",
            f"{100 * row['cut_off']:.0f}%",
            f"{100 * row['no_answer']:.0f}%",
            *([f"{100 * row['any_right']:.1f}%"] if several else []),
        )
    return table


def plot(report: Mapping[str, Any], path: Path) -> Path:
    """Draws what the report has: bits per byte by kind, right answers by task, with intervals."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = [
        (report[part], key, label)
        for part, key, label in (
            ("text", "bits_per_byte", "bits per byte"),
            ("reasoning", "accuracy", "share of right answers"),
        )
        if part in report
    ]
    figure, axes = plt.subplots(
        1, len(panels), figsize=(5.5 * len(panels), 3.6), layout="constrained", squeeze=False
    )
    for axis, (rows, key, label) in zip(axes[0], panels, strict=True):
        names = list(rows)[::-1]
        values = [rows[name][key] for name in names]
        low, high = zip(*(rows[name]["ci95"] for name in names), strict=True)
        axis.barh(names, values, color=["C7" if name == ALL else "C0" for name in names])
        axis.hlines(names, low, high, color="black", lw=1.5)
        axis.set(xlabel=f"{label}, 95% interval", xlim=(0, None))
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _table(title: str, *columns: str) -> Table:
    table = Table(title=title)
    for n, name in enumerate(columns):
        table.add_column(name, justify="right" if n else "left")
    return table
