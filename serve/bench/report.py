"""What a measurement leaves: a JSON file, a table, a plot."""

import json
from pathlib import Path
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt
import numpy as np
from matplotlib.axes import Axes
from rich.table import Table

from serve.bench.options import BenchOptions
from serve.bench.run import BenchResult
from serve.bench.summary import Objectives

SYNTHETIC = "SYNTHETIC ACCEPTANCE"
"""Stands wherever figures of simulated acceptance are shown: nobody can reach them by verifying."""


def to_json(result: BenchResult) -> dict[str, Any]:
    """Everything that was measured, as plain values."""
    found = result.found
    data: dict[str, Any] = {"what": "bench serve", **result.facts}
    data["synthetic_acceptance"] = result.synthetic
    if found is not None:
        data["search"] = {
            "best_qpm": None if found.best is None else 60 * found.best.rate,
            "bounded": found.bounded,
            "curve": [
                {"qpm_offered": 60 * point.rate, "met": point.met, "summary": dict(point.summary)}
                for point in found.curve
            ],
        }
    data["spread"] = result.spread()
    data["runs"] = [
        {
            "rate": trial.rate,
            "summary": trial.summary,
            "reference": None if trial.check is None else trial.check.to_dict(),
            "samples": {
                "ttft_s": _rounded([a.ttft for a in trial.answers if a.ok]),
                "tpot_s": _rounded([a.tpot for a in trial.answers if a.ok and a.tpot is not None]),
            },
        }
        for trial in result.trials
    ]
    data["reference"] = {
        "compared": sum(check.compared for check in result.checks),
        "mismatches": [found for check in result.checks for found in check.mismatches],
    }
    return data


def write(result: BenchResult, options: BenchOptions, folder: Path) -> tuple[Path, Path]:
    """Writes `serve.json` and `serve.png` into the folder and returns both paths."""
    folder.mkdir(parents=True, exist_ok=True)
    json_path, png_path = folder / "serve.json", folder / "serve.png"
    partial = json_path.with_suffix(".tmp")
    partial.write_text(json.dumps(to_json(result), indent=1, allow_nan=False) + "\n")
    partial.replace(json_path)
    plot(result, options.objectives, png_path)
    return json_path, png_path


def table(result: BenchResult, objectives: Objectives) -> Table:
    """The main figures of the last run, in a search of the best rate."""
    out = Table(title=_title(result), show_header=False)
    out.add_column("what")
    out.add_column("value", justify="right")
    if result.found is not None:
        best = result.found.best
        cut = "" if result.found.bounded else ", search cut short"
        out.add_row(
            f"highest rate within TTFT {objectives.ttft:g} s and TPOT {1e3 * objectives.tpot:g} ms "
            f"at p{objectives.percentile:g}",
            "none" if best is None else f"{60 * best.rate:.1f} QPM{cut}",
        )
    if not result.trials:
        return out
    summary = result.trials[-1].summary
    failed = ", ".join(f"{count} x {kind}" for kind, count in summary["errors"].items())
    out.add_row(
        "answered",
        f"{summary['completed']} of {summary['requests']} in {summary['seconds']:.1f} s",
    )
    if failed:
        out.add_row("errors", failed)
    out.add_row("QPM", f"{summary['qpm']:.1f}")
    speed = summary["tokens_per_s"]
    out.add_row(
        "tokens/s: input (cached), output",
        f"{speed['input']:.0f} ({speed['input_cached']:.0f}), {speed['output']:.0f}",
    )
    for key, name in (("ttft_s", "TTFT"), ("tpot_s", "TPOT"), ("itl_s", "gap"), ("e2e_s", "E2E")):
        values = [summary[key][f"p{p}"] for p in (50, 90, 99)]
        shown = " / ".join("-" if v is None else f"{1e3 * v:.0f}" for v in values)
        out.add_row(f"{name} p50 / p90 / p99, ms", shown)
    good = summary["goodput"]
    out.add_row("goodput", f"{good['requests_per_s']:.2f} requests/s ({good['share']:.0%})")
    out.add_row("accepted / drafted", *_drafts(summary["speculation"]))
    compared = sum(check.compared for check in result.checks)
    equal = f"{compared - result.mismatches} of {compared} equal" if compared else "not compared"
    out.add_row("greedy texts alone and under load", equal)
    return out


def plot(result: BenchResult, objectives: Objectives, path: Path) -> None:
    """TTFT and TPOT as distributions; of a search also goodput by rate."""
    panels = 3 if result.found is not None else 2
    figure, axes = plt.subplots(1, panels, figsize=(4.5 * panels, 3.6), layout="constrained")
    for trial in result.trials:
        answers = [answer for answer in trial.answers if answer.ok]
        _cdf(axes[0], [1e3 * answer.ttft for answer in answers])
        _cdf(axes[1], [1e3 * a.tpot for a in answers if a.tpot is not None])
    limits = (1e3 * objectives.ttft, 1e3 * objectives.tpot)
    for axis, name, limit in zip(axes, ("TTFT", "TPOT"), limits, strict=False):
        axis.axvline(limit, color="tab:red", linestyle="--", label=f"objective {limit:g} ms")
        axis.set(xlabel=f"{name}, ms", ylabel="share of requests", ylim=(0, 1.02), title=name)
        axis.legend()
    if result.found is not None:
        _by_rate(axes[2], result)
    figure.suptitle(_title(result))
    figure.savefig(path, dpi=120)
    plt.close(figure)


def _by_rate(axis: Axes, result: BenchResult) -> None:
    assert result.found is not None
    curve = result.found.curve
    qpm = [60 * point.rate for point in curve]
    good = [60 * point.summary["goodput"]["requests_per_s"] for point in curve]
    axis.plot(qpm, qpm, color="0.8", label="all good")
    axis.plot(qpm, good, color="tab:blue", marker="o", label="goodput")
    if result.found.best is not None:
        best = 60 * result.found.best.rate
        axis.axvline(best, color="tab:green", label=f"best {best:.1f}")
    axis.set(xlabel="offered QPM", ylabel="good requests a minute", title="goodput")
    axis.legend()


def _cdf(axis: Axes, values: list[float]) -> None:
    if values:
        axis.step(np.sort(values), np.arange(1, len(values) + 1) / len(values), where="post")


def _title(result: BenchResult) -> str:
    facts = result.facts
    where = f" on {facts['device']}" if facts["device"] else ""
    mark = f"{SYNTHETIC}: " if result.synthetic else ""
    return f"{mark}{facts['model']}{where}"


def _drafts(speculation: dict[str, Any] | None) -> tuple[str]:
    if speculation is None or speculation["accepted_per_drafted"] is None:
        return ("-",)
    text = f"{speculation['accepted_per_drafted']:.3f}"
    length = speculation["mean_accepted_length"]
    return (text if length is None else f"{text}, mean accepted length {length:.2f}",)


def _rounded(values: list[float]) -> list[float]:
    return [round(value, 6) for value in sorted(values)]
