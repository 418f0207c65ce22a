"""Tables and plot of what `dskjax.commands.acceptance.report` measured."""

from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np

TEXT, THINKING = "all text", "all thinking"
"""Names of the two sums over kinds."""


def markdown(result: Mapping[str, Any]) -> str:
    """The report as tables: acceptance by rule, then the price of the lossy rules."""
    lines = [
        "accepted / drafted (mean accepted length) by drafts a step, over all prompts of a group.",
        "",
    ]
    drafts = sorted({row["drafts"] for row in result["rows"]})
    published = result["published"]
    for group, temperature in _sections(result):
        lines += [f"### {group}, T = {temperature:g}", ""]
        lines += _table(
            ["rule", "lossless", *(f"{m} drafts" for m in drafts), "another system"],
            [
                [
                    label,
                    "yes" if found[0]["lossless"] else "no",
                    *(_acceptance(found, m) for m in drafts),
                    f"{published[label]:.2f}" if label in published else "",
                ]
                for label, found in _by_rule(result, group, temperature)
            ],
        )
    lines += ["Price: bits per byte of the generated text under the target, and exact answers.", ""]
    most = drafts[-1:]
    for group, temperature in _sections(result):
        body = []
        for label, found in _by_rule(result, group, temperature):
            for row in (row for row in found if [row["drafts"]] == most):
                exact = _percent(row["exact"], row["exact_ci95"]) if "exact" in row else ""
                body.append([label, _span(row["bits_per_byte"], row["bits_ci95"]), exact])
        lines += [f"### {group}, T = {temperature:g}, {most[0]} drafts", ""]
        lines += _table(["rule", "bits per byte (95%)", "exact answers (95%)"], body)
    kinds = [kind for kind in result["settings"]["prompts"]]
    middle = drafts[len(drafts) // 2] if drafts else 0
    body = [
        [kind, f"{row['temperature']:g}", row["rule"], f"{row['accepted_per_drafted']:.3f}"]
        for kind in kinds
        for row in result["rows"]
        if row["kind"] == kind and row["drafts"] == middle
    ]
    lines += [f"### By kind of text, {middle} drafts", ""]
    lines += _table(["kind", "T", "rule", "accepted / drafted"], body)
    if "tv" in result:
        lines += [
            "### Bent laws",
            "",
            "Total variation between the first token's law and the target's on small random "
            "models (`dskjax.commands.rule_tv`); noise is what counting alone shows.",
            "",
        ]
        body = [
            [
                row["rule"],
                "yes" if row["lossless"] else "no",
                f"{row['temperature']:g}",
                *(f"{row[name]:.4f}" for name in ("mean", "largest", "noise")),
            ]
            for row in result["tv"]
        ]
        lines += _table(["rule", "lossless", "T", "mean TV", "largest", "noise"], body)
    if result["skipped"]:
        lines += ["Not run, for lack of time: " + "; ".join(result["skipped"]) + ".", ""]
    return "\n".join(lines)


def plot(result: Mapping[str, Any], path: Path) -> Path:
    """Draws accepted / drafted over the drafts a step, a panel a group and temperature."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    sections = list(_sections(result))
    figure, axes = plt.subplots(
        1, len(sections), figsize=(3.4 * len(sections), 3.6), sharey=True, layout="constrained"
    )
    labels = list(dict.fromkeys(row["rule"] for row in result["rows"]))
    colors = {label: f"C{n}" for n, label in enumerate(labels)}
    for axis, (group, temperature) in zip(np.atleast_1d(axes), sections, strict=True):
        for label, found in _by_rule(result, group, temperature):
            x = [row["drafts"] for row in found]
            y = np.array([row["accepted_per_drafted"] for row in found])
            low, high = np.array([row["ci95"] for row in found]).T
            axis.plot(x, y, marker="o", ms=3, color=colors[label], label=label)
            axis.fill_between(x, low, high, color=colors[label], alpha=0.15, lw=0)
            if label in result["published"] and temperature:
                axis.axhline(result["published"][label], color=colors[label], ls=":", lw=1)
        axis.set(title=f"{group}, T = {temperature:g}", xlabel="drafts a step", ylim=(0, 1))
    first = np.atleast_1d(axes)[0]
    first.set_ylabel("accepted / drafted (dotted: another system)")
    handles = {}
    for axis in np.atleast_1d(axes):
        handles |= dict(zip(*reversed(axis.get_legend_handles_labels()), strict=True))
    figure.legend(
        handles.values(), handles.keys(), loc="outside lower center", ncols=4, fontsize="small"
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _sections(result: Mapping[str, Any]) -> Iterator[tuple[str, float]]:
    for group in (TEXT, THINKING):
        heats = {row["temperature"] for row in result["rows"] if row["kind"] == group}
        yield from ((group, t) for t in sorted(heats))


def _by_rule(
    result: Mapping[str, Any], group: str, temperature: float
) -> list[tuple[str, list[dict[str, Any]]]]:
    found: dict[str, list[dict[str, Any]]] = {}
    for row in result["rows"]:
        if row["kind"] == group and row["temperature"] == temperature:
            found.setdefault(row["rule"], []).append(row)
    return list(found.items())


def _acceptance(found: Sequence[Mapping[str, Any]], m: int) -> str:
    for row in found:
        if row["drafts"] == m:
            return f"{row['accepted_per_drafted']:.3f} ({row['mean_accepted_length']:.2f})"
    return ""


def _span(value: float, interval: Sequence[float]) -> str:
    return f"{value:.3f} ({interval[0]:.3f}-{interval[1]:.3f})"


def _percent(value: float, interval: Sequence[float]) -> str:
    return f"{100 * value:.0f}% ({100 * interval[0]:.0f}-{100 * interval[1]:.0f}%)"


def _table(header: Sequence[str], body: Sequence[Sequence[str]]) -> list[str]:
    rows = [header, ["---"] * len(header), *body]
    return [f"| {' | '.join(row)} |" for row in rows] + [""]
