"""Plots of a study: gains over the baseline, acceptance by position, gains by kind of text."""

import itertools
from collections.abc import Sequence
from pathlib import Path

import numpy as np
from matplotlib import colormaps
from matplotlib.axes import Axes
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.colors import Normalize
from matplotlib.figure import Figure

from train_mtp.study.compare import Study
from train_mtp.study.published import PUBLISHED

SCALE = 40.0
"""Gain or loss in % that has the fullest colour."""


def paths(stem: Path) -> dict[str, Path]:
    """Where the plots lie, by what they show: STEM.png, STEM_positions.png, STEM_kinds.png."""
    suffixes = {"gains": "", "positions": "_positions", "kinds": "_kinds"}
    return {name: stem.with_name(f"{stem.name}{suffix}.png") for name, suffix in suffixes.items()}


def make(study: Study) -> dict[str, Figure]:
    """The plots by what they show, as in `paths`."""
    return {"gains": _gains(study), "positions": _positions(study), "kinds": _kinds(study)}


def draw(study: Study, stem: Path) -> None:
    """Writes the plots to their `paths`."""
    plots = make(study)
    for name, path in paths(stem).items():
        plots[name].savefig(path, dpi=110, metadata={"Software": None})


def _gains(study: Study) -> Figure:
    """Relative gain in mean accepted length of each variant, a panel a setting."""
    names = [name for name in study.names if name != study.baseline][::-1]
    figure, axes = _panels(len(study.settings), height=1.2 + 0.32 * len(names), width=4.2)
    for axis, setting in zip(axes, study.settings, strict=True):
        for y, name in enumerate(names):
            gain = study.gain(name, study.baseline, setting)
            if gain is None:
                continue
            change = gain.length
            color = "C7" if not study.of(name)["trained"] else f"C{_weights(study, name)}"
            axis.plot([100 * change.low, 100 * change.high], [y, y], color=color, lw=2)
            axis.plot(100 * change.value, y, "o", color=color, ms=5)
        for published in PUBLISHED:
            if published.drafts == setting.drafts:
                color = f"C{int(published.weights == 'independent')}"
                axis.axvline(100 * published.gain, color=color, ls=":", lw=1)
        axis.axvline(0, color="black", lw=0.8)
        axis.set_title(str(setting), fontsize=10)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xlabel("gain in accepted length, %", fontsize=8)
        axis.grid(axis="x", alpha=0.3)
    figure.suptitle(
        f'over "{study.baseline}", 95% intervals; dotted: published elsewhere on another model',
        fontsize=9,
    )
    return figure


def _positions(study: Study) -> Figure:
    """P(draft i is accepted, given all before it), at the most drafts; a panel a temperature.

    Variants stand side by side at each position: many accept nearly as much.
    """
    most = max(setting.drafts for setting in study.settings)
    settings = [setting for setting in study.settings if setting.drafts == most]
    names = [name for name in study.names if any(study.score(name, one) for one in settings)]
    shifts = np.linspace(-0.3, 0.3, len(names)) if len(names) > 1 else [0.0]
    figure, axes = _panels(len(settings), height=4.4, width=6.0)
    for axis, setting in zip(axes, settings, strict=True):
        for number, (name, shift) in enumerate(zip(names, shifts, strict=True)):
            score = study.score(name, setting)
            if score is not None:
                marks = {"marker": "osv^Dx*P"[number % 8], "ms": 4, "lw": 0.6}
                marks["ls"] = "--" if study.of(name)["weights"] == "independent" else "-"
                x, color = np.arange(1, most + 1) + shift, colormaps["tab20"](number % 20)
                axis.plot(x, score.conditional, color=color, label=name, **marks)
        axis.set_title(str(setting), fontsize=10)
        axis.set_xlabel("position of the draft, variants side by side")
        axis.set_xticks(range(1, most + 1))
        axis.grid(alpha=0.3)
    axes[0].set_ylabel("accepted, given all before it")
    figure.legend(*axes[0].get_legend_handles_labels(), loc="outside right center", fontsize=7)
    return figure


def _kinds(study: Study) -> Figure:
    """Relative gain in accepted / drafted by kind of text, a panel a setting."""
    names = [name for name in study.names if name != study.baseline]
    figure, axes = _panels(len(study.settings), height=1.6 + 0.34 * len(names), width=3.4)
    cmap, norm = colormaps["RdBu"], Normalize(-SCALE, SCALE)
    for axis, setting in zip(axes, study.settings, strict=True):
        gains = np.full((len(names), len(study.kinds)), np.nan)
        for (y, name), (x, kind) in itertools.product(enumerate(names), enumerate(study.kinds)):
            gain = study.gain(name, study.baseline, setting, kind)
            if gain is not None:
                gains[y, x] = 100 * gain.relative.value
                mark = "*" if gain.relative.sign else ""
                place = {"ha": "center", "va": "center", "fontsize": 7}
                color = _readable(cmap(float(norm(gains[y, x]))))
                axis.text(x, y, f"{gains[y, x]:+.1f}{mark}", color=color, **place)
        axis.imshow(gains, cmap=cmap, norm=norm, aspect="auto")
        axis.set_title(str(setting), fontsize=10)
        axis.set_yticks(range(len(names)), names, fontsize=8)
        axis.set_xticks(range(len(study.kinds)), study.kinds, rotation=45, fontsize=8)
    figure.suptitle(
        f'gain in accepted / drafted over "{study.baseline}", %; * interval clear of 0', fontsize=9
    )
    return figure


def _readable(color: tuple[float, ...]) -> str:
    """Black or white, whichever stands out on a colour."""
    return "black" if np.dot(color[:3], [0.299, 0.587, 0.114]) > 0.45 else "white"


def _weights(study: Study, name: str) -> int:
    return int(study.of(name)["weights"] == "independent")


def _panels(count: int, *, height: float, width: float) -> tuple[Figure, Sequence[Axes]]:
    figure = Figure(figsize=(width * count + 2, height), layout="constrained")
    FigureCanvasAgg(figure)
    return figure, list(figure.subplots(1, count, sharex=True, sharey=True, squeeze=False)[0])
