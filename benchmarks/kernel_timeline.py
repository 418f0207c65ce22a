"""What each warpgroup of a decode kernel does when: cycles of its phases, measured on the GPU.

    python -m benchmarks.kernel_timeline "b128 kv4096 q1" "b128 kv4096 q1 fp8*" --out DIR

runs the Hopper kernel of `mla_decode` with a clock read where the phases that its source names
(`jax.named_scope`) begin and end, and writes timeline-mla_decode.json and, for each case, a picture
of one thread block. Cycles are of the SM.

A tile of 64 cached rows is what a thread block does at a time, so of each phase the median over
tiles is given, beside the time from one tile to the next and the cycles in which the tensor cores
could do its products. Warpgroups begin to count at their own first phase. There is room for 36
phases of each: with sequences of a few tiles, `--kv 256`, they show how one follows on another.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import shlex
import statistics
import sys
import tempfile
from collections.abc import Iterable
from pathlib import Path
from typing import Any

import jax
from jax.experimental.mosaic.gpu import profiler
from matplotlib.figure import Figure

from benchmarks import kernel_mla_decode as op
from benchmarks.kernels import chosen_cases
from dskjax.provenance import source_commit, versions
from pallas_kernels.mla_decode import mosaic_sm90
from pallas_kernels.mla_decode.work import TILE

WARPGROUPS = ("scores", "values, first half", "values, second half")
FIRST_TILES = 4
"""Tiles of a thread block that are left out: memory is still far behind then."""
ONCE_A_TILE = ("softmax", "shrink")
"""Phases that begin a tile, of either kind of warpgroup."""
PRODUCTS = {"bf16": 2048, "fp8": 4096}
"""Multiplications with addition that the tensor cores of an SM do in a cycle: 989 and 1979 TFLOP/s
at 1.83 GHz, from the data sheet.
"""

Phase = tuple[str, float, float]
"""(name, begin, end) in cycles."""


def main() -> None:
    """Runs the cases, prints what was found, writes files."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("cases", nargs="+", metavar="CASE", help="of mla_decode, * for any letters")
    parser.add_argument("--kv", type=int, metavar="N", help="cached rows of every sequence")
    parser.add_argument("--out", type=Path, metavar="DIR", help="for the result and the pictures")
    args = parser.parse_args()
    try:
        chosen = chosen_cases([f"mla_decode:{case}" for case in args.cases])["mla_decode"]
    except ValueError as error:
        parser.error(str(error))
    if jax.default_backend() != "gpu":
        parser.error("JAX finds no GPU here, and only a GPU has this clock")
    result: dict[str, Any] = {
        "what": "cycles of the phases of a tile, by warpgroup; median over tiles and thread blocks",
        "command": shlex.join(["python", "-m", "benchmarks.kernel_timeline", *sys.argv[1:]]),
        "device": jax.devices()[0].device_kind,
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "commit": source_commit(),
        "versions": versions(),
        "rows": [],
    }
    for _, case in chosen:
        if args.kv is not None:
            case = with_rows(case, args.kv)
        row, blocks = run_case(case)
        result["rows"].append(row)
        print(json.dumps(row), flush=True)
        if args.out is not None:
            args.out.mkdir(parents=True, exist_ok=True)
            name = str(case).replace(" ", "-")
            draw(blocks[len(blocks) // 2], str(case)).savefig(
                args.out / f"timeline-mla_decode-{name}.png", dpi=130
            )
            path = args.out / "timeline-mla_decode.json"
            path.write_text(json.dumps(result, indent=1) + "\n")


def run_case(case: Any) -> tuple[dict[str, Any], list[list[list[Phase]]]]:
    """The row of a case, and the phases of each warpgroup of each thread block."""
    inputs = op.make(case)
    plain, operands, layers = op.every_layer(mosaic_sm90.mla_decode, case, inputs)
    plain = jax.jit(plain)
    _, usual = profiler.measure(plain, aggregate=False)(*operands)
    with tempfile.TemporaryDirectory() as folder:
        run = functools.partial(mosaic_sm90.mla_decode, timeline=folder)
        traced, operands, layers = op.every_layer(run, case, inputs)
        jax.block_until_ready(jax.jit(traced)(*operands))
        jax.effects_barrier()
        last = max(Path(folder).glob("*.json"), key=lambda path: path.stat().st_mtime_ns)
        events = json.loads(last.read_text())["traceEvents"]
    blocks = thread_blocks(events)
    steady = [[phases_after(phases, FIRST_TILES) for phases in block] for block in blocks]
    row = {
        "case": str(case),
        "us": {name: us / layers for name, us in by_kernel(usual or []).items()},
        "cycles_a_tile": period(steady),
        "tensor_core_cycles_a_tile": tensor_cycles(case),
        "phases": {name: medians(b[i] for b in steady) for i, name in enumerate(WARPGROUPS)},
    }
    return row, blocks


def with_rows(case: Any, rows: int) -> Any:
    """The case with as many sequences, all of `rows` cached rows."""
    name = f"{case.name} with {rows} rows"
    return dataclasses.replace(case, name=name, lens=(rows,) * len(case.lens))


def by_kernel(times: list[tuple[str, float]]) -> dict[str, float]:
    """Microseconds by the names of kernels, from milliseconds of launches."""
    found: dict[str, float] = {}
    for name, ms in times:
        found[name] = found.get(name, 0.0) + 1e3 * ms
    return found


def thread_blocks(events: list[dict[str, Any]]) -> list[list[list[Phase]]]:
    """Phases by thread block and warpgroup, from the events of a trace (Chrome's format, whose
    times are thousands of cycles here).
    """
    found: dict[int, list[Phase]] = {}
    begun: dict[int, tuple[str, float]] = {}
    for event in events:
        thread, time = event["tid"] - 1, event["ts"] * 1e3
        if event["name"] == "Init":  # of the kernel, not of its source
            continue
        if event["ph"] == "B":
            begun[thread] = event["name"], time
        else:
            found.setdefault(thread, []).append((*begun.pop(thread), time))
    count = len(WARPGROUPS)
    blocks = sorted({thread // count for thread in found})
    return [[found.get(block * count + i, []) for i in range(count)] for block in blocks]


def phases_after(phases: list[Phase], tiles: int) -> list[Phase]:
    """Without those of the first tiles."""
    starts = [begin for name, begin, _ in phases if name in ONCE_A_TILE]
    first = starts[tiles] if len(starts) > tiles else float("inf")
    return [phase for phase in phases if phase[1] >= first]


def medians(of: Iterable[list[Phase]]) -> dict[str, float]:
    """Cycles by name."""
    spent: dict[str, list[float]] = {}
    for phases in of:
        for name, begin, end in phases:
            spent.setdefault(name, []).append(end - begin)
    return {name: statistics.median(times) for name, times in spent.items()}


def period(blocks: list[list[list[Phase]]]) -> float:
    """Cycles from a tile's softmax to the next one's."""
    gaps: list[float] = []
    for scores, *_ in blocks:
        starts = [begin for name, begin, _ in scores if name == "softmax"]
        gaps += [b - a for a, b in zip(starts, starts[1:], strict=False)]
    return statistics.median(gaps)


def tensor_cycles(case: Any) -> float:
    """What the products of a tile take at the tensor cores' peak."""
    keys = TILE * TILE * (case.latent + case.rope)
    values = TILE * TILE * case.latent
    return keys / PRODUCTS["fp8" if case.kv == "fp8_tensor" else "bf16"] + values / PRODUCTS["bf16"]


def draw(block: list[list[Phase]], title: str) -> Figure:
    """The phases of a thread block, a line for each warpgroup."""
    figure = Figure(figsize=(11, 2.6), layout="constrained")
    axes = figure.subplots()
    names = sorted({name for phases in block for name, _, _ in phases})
    colours = {name: f"C{i}" for i, name in enumerate(names)}
    origin = min(begin for phases in block for _, begin, _ in phases)
    for i, phases in enumerate(block):
        for name in names:
            bars = [(begin - origin, end - begin) for n, begin, end in phases if n == name]
            axes.broken_barh(bars, (i - 0.4, 0.8), color=colours[name], edgecolor="white", lw=0.4)
    for name, colour in colours.items():
        axes.plot([], [], color=colour, lw=6, label=name)
    axes.set(title=f"mla_decode, {title}: one thread block", xlabel="cycles of the SM")
    axes.set_yticks(range(len(WARPGROUPS)), WARPGROUPS)
    axes.invert_yaxis()
    figure.legend(loc="outside right upper", frameon=False)
    return figure


if __name__ == "__main__":
    main()
