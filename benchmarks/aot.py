"""Compiles the GPU kernels for an H100 without one, and compares with the recorded resources.

    scripts/aot.sh             fails if a kernel spills or copies more than recorded
    scripts/aot.sh --record    writes benchmarks/results/aot.json anew; with -k, those cases
    scripts/aot.sh -k fp8      only cases whose "op case" contains that

The environment is prepared by the script.
"""

import argparse
import dataclasses
import functools
import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp

from pallas_kernels.grouped_matmul import cases as grouped_matmul_cases
from pallas_kernels.grouped_matmul import mosaic_sm90_bf16
from pallas_kernels.grouped_matmul.api import hopper_kernel
from pallas_kernels.matmul import cases as matmul_cases
from pallas_kernels.matmul import mosaic_sm90 as matmul_sm90
from pallas_kernels.mla_decode import cases as mla_decode_cases
from pallas_kernels.mla_decode import mosaic_sm90
from pallas_kernels.mla_decode.plan import plan_mla_decode, with_work
from pallas_kernels.mla_prefill import cases as mla_prefill_cases
from pallas_kernels.mla_prefill import mosaic_sm90 as mla_prefill
from pallas_kernels.peer_exchange import cases as peer_exchange_cases
from pallas_kernels.peer_exchange import mosaic_sm90 as peer_exchange
from pallas_kernels.select import H100_SMS
from pallas_kernels.testing.aot import AXIS, compile_for_h100, read_usage

RESULTS = Path(__file__).parent / "results" / "aot.json"
WORSE = ("spill_stores", "spill_loads", "serialized", "smem", "temp_bytes")
"""What may not grow."""


Program = tuple[str, Callable[..., Any], list[Any]]
"""A case, a function, and the shapes of its arguments."""


def matmul_programs() -> Iterator[Program]:
    """The kernel of every benchmark, and the sum of its splits."""
    for case in matmul_cases.BENCH:
        shapes = case.abstract()
        x, w = shapes["x"], shapes["w"]
        g = matmul_sm90.geometry(x.shape[0], w, None, H100_SMS, None)
        rows = jax.eval_shape(functools.partial(matmul_sm90.prepare, g=g), x)
        multiply = functools.partial(matmul_sm90.multiply, g=g)
        yield str(case), multiply, [*rows, w]


def mla_decode_programs() -> Iterator[Program]:
    """Every benchmark; and a scan over layers, which must not copy the pool or a layer of it."""
    for case in mla_decode_cases.BENCH:
        *shapes, plan = mla_decode_shapes(case)
        yield (
            str(case),
            functools.partial(mosaic_sm90.mla_decode, scale=case.scale),
            [*shapes, plan],
        )

    case = dataclasses.replace(mla_decode_cases.BENCH[1], layers=4)
    q_latent, q_rope, cache, _, table, plan = mla_decode_shapes(case)

    def scanned(q_latent: Any, q_rope: Any, cache: Any, table: Any, plan: Any) -> Any:
        def layer(carry: Any, index: jax.Array) -> tuple[Any, None]:
            q, pool = carry
            out, _ = mosaic_sm90.mla_decode(q, q_rope, pool, index, table, plan, scale=case.scale)
            return (q + out, pool), None

        return jax.lax.scan(layer, (q_latent, cache), jnp.arange(case.layers))[0][0]

    yield f"{case} scanned", scanned, [q_latent, q_rope, cache, table, plan]


def mla_decode_shapes(case: mla_decode_cases.Case) -> list[Any]:
    """Arguments of the kernel, the plan with its list of work last."""
    args = case.abstract()
    lens, starts = args.pop("cached_lens"), args.pop("query_starts")
    rows, heads = args["q_latent"].shape[:2]

    def planned(lens: jax.Array, starts: jax.Array, table: jax.Array) -> Any:
        plan = plan_mla_decode(lens, starts, rows, queries=case.queries[0])
        return with_work(plan, table, heads, H100_SMS)

    return [*args.values(), jax.eval_shape(planned, lens, starts, args["page_table"])]


def mla_prefill_programs() -> Iterator[Program]:
    """Every benchmark."""
    for case in mla_prefill_cases.BENCH:
        run = functools.partial(_mla_prefill, case.scale)
        yield str(case), run, list(case.abstract().values())


def _mla_prefill(scale: float, *args: Any) -> Any:
    *arrays, blocks = args
    return mla_prefill.mla_prefill(*arrays, scale=scale, blocks=blocks)


def grouped_matmul_programs() -> Iterator[Program]:
    """Every benchmark, and the gradients."""
    for case in grouped_matmul_cases.BENCH:
        shapes = case.abstract()
        run = functools.partial(hopper_kernel(shapes["w"]).grouped_matmul, sms=H100_SMS)
        yield str(case), run, list(shapes.values())
    for gradient in grouped_matmul_cases.GRADIENTS:
        run = functools.partial(mosaic_sm90_bf16.GRADIENTS[gradient.of], sms=H100_SMS)
        yield str(gradient), run, gradient.abstract()


def peer_exchange_programs() -> Iterator[Program]:
    """Every benchmark, for GPUs of one host."""
    for case in peer_exchange_cases.BENCH:
        if case.ranks == RANKS["peer_exchange"]:
            run = functools.partial(peer_exchange.peer_exchange, axis=AXIS)
            yield str(case), run, case.abstract()


PROGRAMS = {
    "grouped_matmul": grouped_matmul_programs,
    "matmul": matmul_programs,
    "mla_decode": mla_decode_programs,
    "mla_prefill": mla_prefill_programs,
    "peer_exchange": peer_exchange_programs,
}
RANKS = {"peer_exchange": 8}
"""GPUs that programs are for, where it is not one."""


def main() -> None:
    """Compiles, prints a table, then compares or records."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--record", action="store_true")
    parser.add_argument("-k", metavar="TEXT", default="", help="only cases that contain it")
    args = parser.parse_args()
    dump = Path(os.environ["MOSAIC_GPU_DUMP_TO"])
    rows = []
    print(
        f"{'op and case':42}{'kernel':24}{'regs':>5}{'spills':>11}{'smem':>8}{'temp':>10}{'s':>6}"
    )
    for op, programs in PROGRAMS.items():
        for name, run, shapes in programs():
            if args.k in f"{op} {name}":
                for row in compiled(op, name, run, shapes, dump):
                    rows.append(row)
                    print(line(row), flush=True)
    facts = {"jax": jax.__version__, "ptxas": ptxas_version(), "target": "sm_90a"}
    if args.record:
        for row in rows:
            del row["seconds"]
        kept = merged(rows, facts, args.k) if args.k else rows
        text = ",\n  ".join(json.dumps(row) for row in kept)
        head = json.dumps(facts)[1:-1]
        RESULTS.write_text(f'{{{head}, "rows": [\n  {text}\n]}}\n')
        print(f"wrote {RESULTS}")
        return
    if problems := list(compared(rows, facts)):
        sys.exit("\n".join(problems))
    print(f"{len(rows)} kernels, none worse than recorded")


def compiled(op: str, name: str, run: Any, shapes: list[Any], dump: Path) -> list[dict[str, Any]]:
    """A row for each kernel of a program."""
    shutil.rmtree(dump, ignore_errors=True)
    dump.mkdir(parents=True)
    begun = time.perf_counter()
    program = compile_for_h100(run, *shapes, ranks=RANKS.get(op, 1))
    seconds = time.perf_counter() - begun
    temp = program.memory_analysis().temp_size_in_bytes
    return [
        {"op": op, "case": name, **vars(usage), "temp_bytes": temp, "seconds": seconds}
        for usage in read_usage(dump)
    ]


def merged(rows: list[dict[str, Any]], facts: dict[str, Any], k: str) -> list[dict[str, Any]]:
    """The recorded rows, those whose case contains `k` being the new ones; ops in their order."""
    recorded = json.loads(RESULTS.read_text())
    if changed := [name for name, value in facts.items() if recorded[name] != value]:
        sys.exit(f"--record of all cases is needed: the recorded ones are of another {changed}")
    others = [row for row in recorded["rows"] if k not in f"{row['op']} {row['case']}"]
    order = list(PROGRAMS)
    return sorted([*others, *rows], key=lambda row: order.index(row["op"]))


def compared(rows: list[dict[str, Any]], facts: dict[str, Any]) -> Iterator[str]:
    """What is worse than recorded, in words."""
    recorded = json.loads(RESULTS.read_text())
    known = {(r["op"], r["case"], r["kernel"]): r for r in recorded["rows"]}
    for row in rows:
        where = (row["op"], row["case"], row["kernel"])
        if where not in known:
            yield f"{' '.join(where)}: not recorded; scripts/aot.sh --record"
            continue
        for what in WORSE:
            if row[what] > known[where][what]:
                yield f"{' '.join(where)}: {what} {row[what]}, recorded {known[where][what]}"
    if rows and (changed := {k: v for k, v in facts.items() if recorded[k] != v}):
        print(f"note: recorded with other versions: now {changed}")


def line(row: dict[str, Any]) -> str:
    """A line of the table."""
    spills = f"{row['spill_stores']}+{row['spill_loads']}" + ("!" if row["serialized"] else "")
    return (
        f"{row['op'] + ' ' + row['case']:42} {row['kernel']:24}{row['registers']:5}{spills:>11}"
        f"{row['smem']:8}{row['temp_bytes']:10}{row['seconds']:6.1f}"
    )


def ptxas_version() -> str:
    """Like V12.9.86."""
    text = subprocess.run(["ptxas", "--version"], capture_output=True, text=True, check=True).stdout
    return text.rpartition("release")[2].split(",")[1].split()[0]


if __name__ == "__main__":
    main()
