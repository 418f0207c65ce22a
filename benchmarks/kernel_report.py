"""docs/kernels.md and its plot from the result files of `dskjax bench kernels`.

    python -m benchmarks.kernel_report benchmarks/results/kernels-*.json --out docs/kernels.md

Replaces what is between the two marks of the file and leaves the rest, which is written by hand.
"""

import argparse
import itertools
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from matplotlib import colormaps
from matplotlib.figure import Figure

PEERS_CARD = "H100"
"""Where the times of others were taken."""
BEGIN, END = "<!-- measured: begin -->", "<!-- measured: end -->"


def main() -> None:
    """Reads the files, writes the tables and the plot."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("results", type=Path, nargs="+")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    results = [json.loads(path.read_text()) for path in args.results]
    results.sort(key=lambda result: (result["op"], result["device"]))
    text = args.out.read_text()
    if text.count(BEGIN) != 1 or text.count(END) != 1:
        parser.error(f"{args.out} must hold the lines {BEGIN!r} and {END!r} once each")
    head, tail = text.split(BEGIN)[0], text.split(END)[1]
    picture = args.out.with_suffix(".png")
    draw(results, picture)
    body = "\n\n".join(map(tables, results))
    args.out.write_text(f"{head}{BEGIN}\n\n{body}\n\n![]({picture.name})\n\n{END}{tail}")
    print(f"wrote {args.out} and {picture}")


def tables(result: dict[str, Any]) -> str:
    """One op: how it was measured, and a row for each case and implementation."""
    before, after = result["ceilings"], result.get("ceilings_after", {})
    ceilings = ", ".join(
        f"{name} {value:.0f} / {after[name]:.0f}" if after else f"{name} {value:.0f} / not measured"
        for name, value in before.items()
    )
    note = f" Note: {result['note']}." if "note" in result else ""
    rows = [
        f"| {row['case']} | {row['impl']} | {spread(row)} | {rested(row)} "
        f"| {100 * row['part_of_floor']:.0f} % | {others(row)} "
        f"| {max(row['errors'].values()):.1e} |"
        for row in measured(result)
    ]
    failed = [f"- {r['case']}, {r['impl']}: {r['failed']}" for r in result["rows"] if "failed" in r]
    return "\n".join(
        [
            f"### {result['op']}",
            "",
            f"{result['device']}, jax {result['versions']['jax']}, {result['date'][:10]}, commit "
            f"{result['commit'][:7]}. Ceilings before / after: {ceilings}.{note}",
            "",
            "| case | implementation | us, median (5 % - 95 %) | us, rested | of the floor "
            "| others, us | largest error |",
            "|---|---|---|---|---|---|---|",
            *rows,
            *(["", "Failed:", "", *failed] if failed else []),
        ]
    )


def measured(result: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Rows with a time."""
    return (row for row in result["rows"] if "part_of_floor" in row)


def spread(row: dict[str, Any]) -> str:
    """Of the kernels, or of the wall clock where those are not known."""
    us = row["kernels_us"] or row["wall_us"]
    return f"{us['median']:.1f} ({us['p5']:.1f} - {us['p95']:.1f})"


def rested(row: dict[str, Any]) -> str:
    """Of a card that has rested; nothing in results that are older than that figure."""
    us = row.get("rested_us")
    return f"{us['median']:.1f}" if us else ""


def others(row: dict[str, Any]) -> str:
    """Times of other people's kernels in another run."""
    return ", ".join(f"{name} {us:g}" for name, us in row["others_us"].items())


def draw(results: Sequence[dict[str, Any]], path: Path) -> None:
    """Part of the floor of what has peers: ours as bars, theirs, in our ceilings, as marks."""
    rows = [
        (result["op"], row)
        for result in results
        for row in measured(result)
        if PEERS_CARD in result["device"] and row["others_us"]
    ]
    figure = Figure(figsize=(11, 1 + 0.24 * len(rows)), layout="constrained")
    axes = figure.subplots()
    ours = [100 * row["part_of_floor"] for _, row in rows]
    axes.barh(range(len(rows)), ours, color="#4477aa", label="dskjax")
    marks: dict[str, list[tuple[float, int]]] = {}
    for at, (_, row) in enumerate(rows):
        for name, us in row["others_scaled_to_these_ceilings_us"].items():
            marks.setdefault(name, []).append((100 * row["floor_us"] / us, at))
    markers = itertools.cycle("o^sDvP*X<>dphH8")
    colours = itertools.cycle(colormaps["Dark2"].colors + colormaps["Set1"].colors)
    for (name, points), marker, colour in zip(marks.items(), markers, colours, strict=False):
        axes.plot(*zip(*points, strict=True), marker, color=colour, markersize=5, label=name)
    labels = [f"{op}  {row['case']}  {row['impl']}" for op, row in rows]
    axes.set_yticks(range(len(rows)), labels, fontsize=7)
    axes.margins(y=0.01)
    axes.invert_yaxis()
    axes.set_xlabel("% of the floor: the time the card's ceilings, measured beside, would need")
    axes.axvline(100, color="black", linewidth=0.8)
    figure.legend(loc="outside lower center", ncols=4, fontsize=8)
    figure.savefig(path, dpi=110)


if __name__ == "__main__":
    main()
