"""The plot of `benchmarks.v3_ep8`."""

from pathlib import Path
from typing import Any

from matplotlib.figure import Figure


def draw(report: dict[str, Any], path: Path) -> None:
    """Step times over the batch with their floor, what they are spent on, and rates within a limit;
    only what was measured.
    """
    rows = [row for row in report["rows"] if "failed" not in row]
    decode = [row for row in rows if row["part"] == "decode"]
    limits = [row for row in rows if "limit_ms" in row]
    panels = [p for p in ((decode, _steps), (decode, _spent), (limits, _limits)) if p[0]]
    if not panels:
        return
    figure = Figure(figsize=(6 * len(panels), 4.5), layout="constrained")
    for axes, (some, panel) in zip(
        figure.subplots(1, len(panels), squeeze=False)[0], panels, strict=True
    ):
        panel(axes, some)
    figure.suptitle(
        f"{report['preset']}, {report['layers']} layers, {report['device']}, {report['mesh']}\n"
        "random weights, simulated acceptance",
        fontsize=10,
    )
    figure.savefig(path, dpi=110)


def _steps(axes: Any, rows: list[dict[str, Any]]) -> None:
    lines: dict[tuple[int, int], list[dict[str, Any]]] = {}
    for row in rows:
        lines.setdefault((row["context"], row["drafts"]), []).append(row)
    for (context, drafts), some in lines.items():
        batch = [row["batch"] for row in some]
        label = f"context {context}, {drafts} drafts"
        (line,) = axes.plot(
            batch, [row["step_us"]["median"] / 1e3 for row in some], "o-", label=label
        )
        floor = [row["floor_with_exchange_us"] / 1e3 for row in some]
        axes.plot(batch, floor, ":", color=line.get_color())
    axes.set(xscale="log", xlabel="sequences a GPU", ylabel="ms a step (dotted: floor)")
    axes.legend(fontsize=7)


def _spent(axes: Any, rows: list[dict[str, Any]]) -> None:
    rows = [row for row in rows if row["context"] == max(r["context"] for r in rows)]
    names = [f"{row['batch']}\n{row['drafts']}" for row in rows]
    below = [0.0] * len(rows)
    for kind in ("attention", "experts", "exchange", "rest"):
        part = [row["kernels_us"][kind] / 1e3 for row in rows]
        axes.bar(range(len(rows)), part, bottom=below, label=kind)
        below = [a + b for a, b in zip(below, part, strict=True)]
    axes.set_xticks(range(len(rows)), names, fontsize=7)
    axes.set(xlabel="sequences a GPU, drafts", ylabel="ms of kernels a step and GPU")
    axes.legend(fontsize=8)


def _limits(axes: Any, rows: list[dict[str, Any]]) -> None:
    for name in ("apart", "together"):
        axes.plot(
            [row["limit_ms"] for row in rows],
            [row[name]["output"] for row in rows],
            "o-",
            label=f"prefill and decode {name}",
        )
    axes.set(xlabel="limit, ms a token", ylabel="output tokens a second and GPU", ylim=(0, None))
    axes.legend(fontsize=8)
