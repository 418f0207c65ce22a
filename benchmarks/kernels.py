"""Checks and times GPU kernels at real shapes, beside the card's own ceilings.

    python -m benchmarks.kernels mla_decode router --out benchmarks/results
    python -m benchmarks.kernels "mla_decode:b128 kv4096 q1" --sweep    other tiles too
    python -m benchmarks.kernels grouped_matmul --sweep "* rows 16 *"   these of them
    python -m benchmarks.kernels "mla_decode:b32 * fp8*" --check        only the check

Each row has the median and the spread of 25 samples, TFLOP/s and GB/s of the work that the
definition asks for, and its part of the floor: the time in which the card's ceilings, measured
before and after in this run, would do that work. Times of others are from another run, see the op.
"""

import argparse
import dataclasses
import datetime
import fnmatch
import importlib
import json
from collections.abc import Sequence
from pathlib import Path
from typing import Any

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


def main() -> None:
    """Runs the cases, prints a table and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="+", metavar="OP[:PATTERN]", help=f"of {', '.join(OPS)}")
    parser.add_argument(
        "--sweep", nargs="?", const="*", metavar="PATTERN", help="other tiles too, all or these"
    )
    parser.add_argument("--others", action="store_true", help="our other implementations too")
    parser.add_argument("--check", action="store_true", help="no timing")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for a kernels-OP.json of each op")
    args = parser.parse_args()
    try:
        chosen = chosen_cases(args.ops)
    except ValueError as error:
        parser.error(str(error))
    if jax.default_backend() != "gpu":
        parser.error("JAX finds no GPU here; scripts/aot.sh compiles without one")

    shared: dict[str, Any] = {
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "versions": versions(),
    }
    if not args.check:
        shared["ceilings"] = dataclasses.asdict(measure_ceilings())
        print(shared["ceilings"], flush=True)
    results = {op: {"op": op} | shared | {"rows": []} for op in chosen}
    for op, cases in chosen.items():
        for module, case in cases:
            results[op]["rows"] += run_case(module, case, args, shared.get("ceilings"))
            write(results[op], args.out)  # after each case: a run cut short leaves something
    if not args.check:
        after = dataclasses.asdict(measure_ceilings())
        print(after)
        for result in results.values():
            write(result | {"ceilings_after": after}, args.out)


def chosen_cases(words: Sequence[str]) -> dict[str, list[tuple[Any, Any]]]:
    """{op: (its module, case) of each case asked for}.

    Args:
        words: "OP" for all cases of an op, or "OP:PATTERN" with `*` for any letters.

    Raises:
        ValueError: there is no such op, or no case of it has such a name.
    """
    found: dict[str, list[tuple[Any, Any]]] = {}
    for word in words:
        op, _, pattern = word.partition(":")
        if op not in OPS:
            raise ValueError(f"no op {op!r}; there are {', '.join(OPS)}")
        modules = [importlib.import_module(name) for name in OPS[op].split()]
        cases = [(module, case) for module in modules for case in module.CASES]
        matching = [c for c in cases if fnmatch.fnmatchcase(str(c[1]), pattern or "*")]
        if not matching:
            names = "; ".join(str(case) for _, case in cases)
            raise ValueError(f"no case of {op} is called {pattern!r}; there are {names}")
        found.setdefault(op, []).extend(matching)
    return found


def write(result: dict[str, Any], folder: Path | None) -> None:
    """kernels-OP.json; nothing without a folder."""
    if folder is not None:
        path = folder / f"kernels-{result['op']}.json"
        path.write_text(json.dumps(result, indent=1) + "\n")


def run_case(op: Any, case: Any, args: argparse.Namespace, ceilings: Any) -> list[dict[str, Any]]:
    """A row for each implementation; one that fails is reported and left out."""
    inputs, rows = op.make(case), []
    answers = op.answers(case, inputs)
    for name, run in op.implementations(case, bool(args.sweep), args.others):
        if args.sweep and not fnmatch.fnmatchcase(f"{name} ", args.sweep):
            continue
        row: dict[str, Any] = {"case": str(case), "impl": name}
        try:
            row["errors"] = op.check(run, case, answers)
            if not args.check:
                row |= timed(op, case, inputs, run, Ceilings(**ceilings))
        except (ValueError, RuntimeError) as error:  # wrong, too large for the card, or refused
            row["failed"] = f"{type(error).__name__}: {str(error)[:300]}"
        rows.append(row)
        print(line(row), flush=True)
    return rows


def timed(op: Any, case: Any, inputs: dict[str, Any], run: Any, top: Ceilings) -> dict[str, Any]:
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


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    head = f"{row['case']:28}{row['impl']:44}"
    if "failed" in row:
        return f"{head} {row['failed']}"
    errors = " ".join(f"{k} {v:.1e}" for k, v in row["errors"].items())
    if "tflops" not in row:
        return f"{head} {errors}"
    best = row["kernels_us"] or row["wall_us"]
    others = " ".join(f"{k} {v:.0f}" for k, v in row["others_us"].items())
    return (
        f"{head}{best['median']:8.1f} us ({best['p5']:.1f}-{best['p95']:.1f}), wall "
        f"{row['wall_us']['median']:.1f}; {row['tflops']:.0f} TFLOP/s {row['gbs']:.0f} GB/s "
        f"{100 * row['part_of_floor']:.0f} % of the floor; {errors}; {others}"
    )


def _dict(spread: Spread) -> dict[str, float]:
    return dataclasses.asdict(spread)


if __name__ == "__main__":
    main()
