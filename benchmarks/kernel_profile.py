"""What holds a kernel back, by Nsight Compute: how busy each unit is, and what its warps wait for.

    python -m benchmarks.kernel_profile "mla_decode:b128 kv4096 q1 fp8" --out PROFILE.json

Runs the check of `benchmarks.kernels` under `ncu`, which must be on the path, and keeps the longest
launch of each kernel of ours. Its times are taken with cold caches, one launch at a time; they are
not those of `benchmarks.kernels`.
"""

import argparse
import csv
import json
import re
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

from benchmarks.kernels import OPS

SECTIONS = (
    "SpeedOfLight",
    "ComputeWorkloadAnalysis",
    "MemoryWorkloadAnalysis",
    "SchedulerStats",
    "WarpStateStats",
    "LaunchStats",
    "Occupancy",
)
KEPT = re.compile(
    r"^gpu__time_duration\.sum$|^gpc__cycles_elapsed\.max$|"
    r"^(sm|dram|lts|l1tex|gpu)__\w*throughput\w*\.avg\.pct_of_peak_sustained_elapsed$|"
    r"^sm__(inst_executed_)?pipe\w+\.(avg|sum)\.pct_of_peak_sustained_(active|elapsed)$|"
    r"^sm__inst_executed\.avg\.per_cycle_(active|elapsed)$|"
    r"^smsp__(issue_active|warps_eligible|warps_active)\.avg\.per_cycle_active$|"
    r"^smsp__average_warps?_(latency|issue_stalled)\w*\.ratio$|"
    r"^dram__bytes_(read|write)\.sum(\.per_second)?$|^lts__t_sector_hit_rate\.pct$|"
    r"^launch__(registers_per_thread|grid_size|shared_mem_per_block_dynamic)$|"
    r"^sm__warps_active\.avg\.pct_of_peak_sustained_active$"
)
"""Names of metrics."""
LAUNCHES = 3
"""Of our kernels that are profiled, in the order of the check; each is repeated for every group of
counters.
"""
LEAST = 0.02
"""Waits of fewer warps than this, on average, are left out."""


def main() -> None:
    """Profiles the cases of each op and writes the figures."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("ops", nargs="+", metavar="OP[:PATTERN]", help=f"of {', '.join(OPS)}")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if shutil.which("ncu") is None:
        parser.error("ncu, of Nsight Compute, is not on the path")
    rows = []
    for word in args.ops:
        try:
            found = profile(word)
        except subprocess.CalledProcessError as error:
            rows.append({"ops": word, "failed": (error.stdout or "")[-500:]})
            print(rows[-1], flush=True)
            continue
        for kernel, metrics in found.items():
            rows.append({"ops": word, "kernel": kernel, "metrics": metrics})
            print(word, kernel, json.dumps(metrics), flush=True)
        args.out.write_text(json.dumps({"rows": rows}, indent=1) + "\n")


def profile(word: str) -> dict[str, dict[str, float]]:
    """{kernel: its metrics} of one word for `benchmarks.kernels`."""
    names = "|".join(OPS)
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.ncu-rep"
        run = [sys.executable, "-m", "benchmarks.kernels", word, "--check"]
        record = ["ncu", "--kernel-name", f"regex:{names}", "--export", str(report)]
        record += ["--launch-count", str(LAUNCHES), "--clock-control", "none"]
        record += [part for name in SECTIONS for part in ("--section", name)]
        _output([*record, *run])
        pages = _output(["ncu", "--import", str(report), "--csv", "--page", "raw"])
    lines = list(csv.DictReader(pages.splitlines()))
    units, launches = lines[0], lines[1:]
    longest: dict[str, dict[str, float]] = {}
    for launch in launches:
        kernel, metrics = launch["Kernel Name"], _kept(launch, units)
        duration = "gpu__time_duration.sum"
        if metrics[duration] > longest.get(kernel, metrics | {duration: 0.0})[duration]:
            longest[kernel] = metrics
    return longest


def _kept(launch: dict[str, str], units: dict[str, str]) -> dict[str, float]:
    """Times in microseconds, the rest in ncu's units."""
    found: dict[str, Any] = {}
    for name, text in launch.items():
        number = text.replace(",", "") if text else ""
        if KEPT.match(name) and re.fullmatch(r"[-\d.e+]+", number):
            value = float(number)
            if "stalled" in name and value < LEAST:
                continue
            if name == "gpu__time_duration.sum":
                value *= {"ns": 1e-3, "us": 1.0, "ms": 1e3, "s": 1e6}[units[name]]
            found[name] = value
    return found


def _output(command: list[str]) -> str:
    return subprocess.run(
        command, check=True, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    ).stdout


if __name__ == "__main__":
    main()
