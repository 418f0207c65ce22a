"""What an engine's thread does between two launches must hide behind the device's step.

The figures that count are those of `benchmarks/engine_host_time.py` on an idle machine, in
benchmarks/results/engine-host-time.json. Here the cores are shared with other tests: the limits are
wide, and what they see is work that grew by a factor.
"""

import json
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parent.parent.parent
CPU_MS, WALL_MS = 1.5, 3.0
"""Three and six times the aim, 0.5 ms."""


def test_engine_host_time():
    # In a process of its own: without the run-time type checks of the tests.
    best = {"cpu_ms_median": float("inf"), "host_ms_median": float("inf")}
    for _ in range(3):
        run = subprocess.run(
            [sys.executable, "benchmarks/engine_host_time.py", "--steps", "200"],
            cwd=ROOT,
            env={"PYTHONPATH": str(ROOT)},
            capture_output=True,
            text=True,
            check=True,
        )
        found = json.loads(run.stdout)["best"]
        best = {name: min(value, found[name]) for name, value in best.items()}
        if best["cpu_ms_median"] < CPU_MS and best["host_ms_median"] < WALL_MS:
            break
    print(f"between two launches, 128 rows, K=3: {best}")
    assert best["cpu_ms_median"] < CPU_MS and best["host_ms_median"] < WALL_MS, best
