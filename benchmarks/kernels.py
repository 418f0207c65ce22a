"""Checks and times GPU kernels at real shapes, beside the card's own ceilings; chooses tiles.

    dskjax bench kernels                                       every case of every op
    dskjax bench kernels mla_decode router --out benchmarks/results
    dskjax bench kernels "mla_decode:b32 * fp8*" --check       only the check
    dskjax bench kernels "mla_decode:b128 kv4096 q1" --sweep   other tiles too
    dskjax bench kernels --tune                                the table of the fastest tiles

and the same as `python -m benchmarks.kernels`. Each row has the median and the spread of 25
samples, TFLOP/s and GB/s of the work that the definition asks for, and its part of the floor: the
time in which the card's ceilings, measured before and after in this run, would do that work. A card
slows down under load: these figures are of a hot one, "rested" of one that did nothing for a while.
Times of others are from another run, see the op.

The table of tiles documents and checks what ops choose by shape; no kernel reads it. It is
{device: {op: {case: entry}}}, see `entry_of`; an entry has its commit, and as "source" its result
file where it comes from a sweep that is older than the table.
"""

import argparse
import dataclasses
import datetime
import fnmatch
import importlib
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import jax

from dskjax.provenance import source_commit, versions
from pallas_kernels.testing.bench import Ceilings, Spread, measure, measure_ceilings

OPS = {
    "act_quant": "benchmarks.kernel_act_quant",
    "expert_mlp": "benchmarks.kernel_expert_mlp",
    "grouped_matmul": "benchmarks.kernel_grouped_matmul benchmarks.kernel_grouped_matmul_bf16",
    "matmul": "benchmarks.kernel_matmul",
    "mla_decode": "benchmarks.kernel_mla_decode",
    "mla_prefill": "benchmarks.kernel_mla_prefill",
    "moe_permute": "benchmarks.kernel_moe_permute",
    "norm_rope_cache": "benchmarks.kernel_norm_rope_cache",
    "router": "benchmarks.kernel_router",
}
"""Modules with cases of an op, in words."""
RESULTS = Path(__file__).parent / "results"
TABLE = "tiles.json"
GAIN = 1.03
"""Tiles that are faster than the usual ones by this factor are worth telling."""

Cases = dict[str, list[tuple[Any, Any]]]
"""{op: (its module, case) of each case}."""
Row = dict[str, Any]


class Variant(NamedTuple):
    """A way to run a case.

    Attributes:
        name: of the implementation and what is not usual about it.
        run: what the op's module knows how to call.
        tiles: what may be chosen, a dataclass or a dictionary of values or dataclasses; None where
            nothing is. Those of the first variant are the usual ones.
    """

    name: str
    run: Any
    tiles: Any = None


def main() -> None:
    """Runs the cases, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="*", metavar="OP[:PATTERN]", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--sweep", nargs="?", const="*", metavar="PATTERN", help="other tiles too, all or these"
    )
    parser.add_argument("--tune", action="store_true", help="a table of the fastest tiles")
    parser.add_argument("--others", action="store_true", help="our other implementations too")
    parser.add_argument("--check", action="store_true", help="no timing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for a kernels-OP.json of each op")
    parser.add_argument("--list", action="store_true", help="only the names of the cases")
    args = vars(parser.parse_args())
    try:
        chosen = chosen_cases(args.pop("ops"))
        if args.pop("list"):
            print(listing(chosen))
            return
        refuse(args["check"], args["others"], args["tune"])
    except ValueError as error:
        parser.error(str(error))
    run(chosen, **args)


def chosen_cases(words: Sequence[str]) -> Cases:
    """The cases asked for.

    Args:
        words: "OP" for all cases of an op, or "OP:PATTERN" with `*` for any letters; none for all
            cases of all ops.

    Raises:
        ValueError: there is no such op, or no case of it has such a name.
    """
    found: Cases = {}
    for word in words or OPS:
        op, _, pattern = word.partition(":")
        if op not in OPS:
            raise ValueError(f"no op {op!r}; there are {', '.join(OPS)}")
        modules = [importlib.import_module(name) for name in OPS[op].split()]
        cases = [(module, case) for module in modules for case in module.CASES]
        matching = [c for c in cases if fnmatch.fnmatchcase(str(c[1]), pattern or "*")]
        if not matching:
            names = "; ".join(str(case) for _, case in cases)
            raise ValueError(f"no case of {op} is called {pattern!r}; there are {names}")
        known = found.setdefault(op, [])
        known.extend(case for case in matching if case not in known)
    return found


def listing(chosen: Cases) -> str:
    """Ops and the names of their cases, a line each."""
    lines = ([op, *(f"  {case}" for _, case in cases)] for op, cases in chosen.items())
    return "\n".join(line for part in lines for line in part)


def refuse(check: bool, others: bool, tune: bool) -> None:
    """What `run` cannot do, here or at all.

    Raises:
        ValueError: there is no GPU, or the table of tiles is asked for without times or with
            implementations that have no tiles.
    """
    if tune and (check or others):
        raise ValueError("--tune times tiles and nothing else: leave out --check and --others")
    if jax.default_backend() != "gpu":
        raise ValueError("JAX finds no GPU here; scripts/aot.sh compiles without one")


def run(
    chosen: Cases,
    *,
    sweep: str | None = None,
    others: bool = False,
    check: bool = False,
    tune: bool = False,
    out: Path | None = None,
) -> list[Row]:
    """Checks and times cases, prints a line for each implementation, and writes files.

    Args:
        chosen: from `chosen_cases`.
        sweep: other tiles too whose name this matches, `*` for any letters.
        others: our other implementations too.
        check: no timing.
        tune: a sweep over tiles alone, whose fastest go to the table.
        out: folder for kernels-OP.json (with `tune`: tune-OP.json and the table), made if need be.
            Without it no rows are written, and the table is that among the committed results.

    Returns:
        The rows of all ops. One that failed has the reason as "failed".

    Raises:
        ValueError: see `refuse`.
    """
    refuse(check, others, tune)
    path = (out or RESULTS) / TABLE
    table = json.loads(path.read_text()) if tune and path.exists() else {}
    if out is not None:
        out.mkdir(parents=True, exist_ok=True)
    shared: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "versions": versions(),
    }
    top = None if check else measure_ceilings()
    if top is not None:
        shared["ceilings"] = dataclasses.asdict(top)
        print(shared["ceilings"], flush=True)
    results: dict[str, dict[str, Any]] = {op: {"op": op} | shared | {"rows": []} for op in chosen}
    faster: list[str] = []
    kind = "tune" if tune else "kernels"
    for op, cases in chosen.items():
        for module, case in cases:
            ways = variants(module, case, sweep=sweep, others=others, tune=tune)
            rows = run_case(module, case, ways, top)
            results[op]["rows"] += rows
            write(results[op], out, kind)  # after each case: a run cut short leaves something
            if tune and (entry := entry_of(rows)):
                cases_of = table.setdefault(shared["device"], {}).setdefault(op, {})
                cases_of[str(case)] = entry | {"commit": shared["commit"]}
                path.write_text(table_text(table) + "\n")
                faster += gain(f"{op} {case}", entry)
        if not results[op]["rows"]:
            print(
                f"{op}: {'has no tiles to choose from' if tune else f'nothing is called {sweep}'}"
            )
    if top is not None:
        after = dataclasses.asdict(measure_ceilings())
        print(after)
        for result in results.values():
            write(result | {"ceilings_after": after}, out, kind)
    for told in faster:
        print(told)
    return [row for result in results.values() for row in result["rows"]]


def write(result: dict[str, Any], folder: Path | None, kind: str) -> None:
    """KIND-OP.json; nothing without a folder."""
    if folder is not None:
        path = folder / f"{kind}-{result['op']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


def variants(op: Any, case: Any, *, sweep: str | None, others: bool, tune: bool) -> list[Variant]:
    """The ways of a case that are asked for; to choose tiles, only those that have some, and always
    the usual ones.
    """
    ways = [Variant(*way) for way in op.implementations(case, tune or bool(sweep), others)]
    if tune:
        ways = [way for way in ways if way.tiles is not None]
    usual = ways[:1] if tune else []
    named = sweep or "*"
    return usual + [w for w in ways[len(usual) :] if fnmatch.fnmatchcase(f"{w.name} ", named)]


def run_case(op: Any, case: Any, ways: Sequence[Variant], top: Ceilings | None) -> list[Row]:
    """A row for each way; one that fails says so, and so does a case too large for the card.

    Args:
        op: the module of the case.
        case: one of its cases.
        ways: from `variants`.
        top: the card's ceilings; None not to time.
    """
    if not ways:
        return []
    try:
        inputs = op.make(case)
        answers = op.answers(case, inputs)
    except RuntimeError as error:
        rows = [{"case": str(case), "impl": "inputs", "failed": reason(error)}]
        print(line(rows[0]), flush=True)
        return rows
    rows = []
    for way in ways:
        row: Row = {"case": str(case), "impl": way.name}
        if way.tiles is not None:
            row["tiles"] = fields(way.tiles)
        try:
            row["errors"] = op.check(way.run, case, answers)
            if top is not None:
                row |= timed(op, case, inputs, way.run, top)
        except (ValueError, RuntimeError) as error:  # wrong, too large for the card, or refused
            row["failed"] = reason(error)
        rows.append(row)
        print(line(row), flush=True)
    return rows


def reason(error: Exception) -> str:
    """Its kind and its first words."""
    return f"{type(error).__name__}: {str(error)[:300]}"


def fields(tiles: Any) -> dict[str, Any]:
    """{name: value}, of a dictionary of tiles {name: their fields}."""
    if isinstance(tiles, dict):
        parts = tiles.items()
        return {k: fields(v) if dataclasses.is_dataclass(v) else v for k, v in parts}
    return dataclasses.asdict(tiles)


def timed(op: Any, case: Any, inputs: dict[str, Any], run: Any, top: Ceilings) -> Row:
    """Times, rates and parts of the floor."""
    function, operands, layers = op.every_layer(run, case, inputs)
    timing = measure(function, *operands, parts=layers)
    flops, moved, us = op.flops(case), op.bytes_moved(case, inputs), timing.best.median
    floor = floor_us(flops, moved, getattr(top, op.MATMUL), top.read_gbs)
    others = op.REFERENCES.get(str(case), {})
    then = op.REFERENCE_CEILINGS
    scale = floor / floor_us(flops, moved, then[op.MATMUL], then["read_gbs"])
    return {
        "wall_us": _dict(timing.wall),
        "kernels_us": timing.kernels and _dict(timing.kernels),
        "rested_us": timing.rested and _dict(timing.rested),
        "tflops": flops / us / 1e6,
        "gbs": moved / us / 1e3,
        "floor_us": floor,
        "part_of_floor": floor / us,
        "layers": layers,
        "others_us": others,
        "others_scaled_to_these_ceilings_us": {k: v * scale for k, v in others.items()},
    }


def floor_us(flops: float, moved: float, tflops: float, gbs: float) -> float:
    """The longer of computing and reading at the ceilings."""
    return max(flops / tflops / 1e6, moved / gbs / 1e3)


def entry_of(rows: Sequence[Row]) -> dict[str, Any] | None:
    """What the table holds of a case; None if no tiles were right and fit.

    Args:
        rows: of the case, with times; those of the usual tiles first.

    Returns:
        "best": the fastest tiles that are right, "us": their median; "default", "default_us": the
        usual ones at that commit, None in microseconds where they failed; "timed_by": kernels_us
        if all have that, or wall_us; "tried": how many; "failed": {name: why}.
    """
    right = [row for row in rows if "failed" not in row]
    if not right:
        return None
    clock = "kernels_us" if all(row["kernels_us"] for row in right) else "wall_us"
    best = min(right, key=lambda row: row[clock]["median"])
    usual = rows[0]
    return {
        "best": best["tiles"],
        "us": best[clock]["median"],
        "default": usual["tiles"],
        "default_us": None if "failed" in usual else usual[clock]["median"],
        "timed_by": clock,
        "tried": len(rows),
        "failed": {row["impl"]: row["failed"] for row in rows if "failed" in row},
    }


def gain(where: str, entry: dict[str, Any]) -> Iterator[str]:
    """A line if other tiles than the usual ones should be chosen."""
    us, usual = entry["us"], entry["default_us"]
    if usual is None:
        yield f"{where}: the usual tiles fail; {us:.1f} us with {entry['best']}"
    elif usual > GAIN * us:
        part = 100 * (1 - us / usual)
        yield f"{where}: {us:.1f} us, {part:.0f} % less than {usual:.1f}, with {entry['best']}"


def table_text(table: dict[str, Any], depth: int = 3) -> str:
    """JSON with a line for each case."""
    if depth == 0:
        return json.dumps(table)
    pad = " " * (4 - depth)
    inner = (f"{pad}{json.dumps(k)}: {table_text(v, depth - 1)}" for k, v in table.items())
    return "{\n" + ",\n".join(inner) + f"\n{pad[1:]}}}"


def line(row: Row) -> str:
    """A line of what is printed."""
    head = f"{row['case']:28}{row['impl']:44}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    errors = " ".join(f"{k} {v:.1e}" for k, v in row["errors"].items())
    if "tflops" not in row:
        return f"{head} {errors}"
    best = row["kernels_us"] or row["wall_us"]
    others = " ".join(f"{k} {v:.0f}" for k, v in row["others_us"].items())
    rested = f", rested {row['rested_us']['median']:.1f}" if row.get("rested_us") else ""
    return (
        f"{head}{best['median']:8.1f} us ({best['p5']:.1f}-{best['p95']:.1f}){rested}, wall "
        f"{row['wall_us']['median']:.1f}; {row['tflops']:.0f} TFLOP/s {row['gbs']:.0f} GB/s "
        f"{100 * row['part_of_floor']:.0f} % of the floor; {errors}; {others}"
    )


def _dict(spread: Spread) -> dict[str, float]:
    return dataclasses.asdict(spread)


if __name__ == "__main__":
    main()
