"""What planning a step and taking its result in costs the host: it must hide behind the device."""

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import numpy as np

ROOT = Path(__file__).parent.parent.parent
ROWS, DRAFTS, STEPS = 128, 3, 300
LIMIT = 0.5e-3
"""Seconds; a decode step of a model worth serving takes 20 times that."""


def measure() -> dict[str, float]:
    """Median and 90th percentile of schedule + apply, one launch ahead, in seconds."""
    from serve.blocks import BlockManager
    from serve.plan import StepResult
    from serve.request import Request, StopOptions
    from serve.scheduler import Scheduler
    from serve.scheduler_config import SchedulerConfig

    config = SchedulerConfig(
        num_slots=ROWS,
        num_pages=ROWS * 40,
        page_size=64,
        max_columns=64,
        drafts=DRAFTS,
        lookahead=DRAFTS,
        tail=DRAFTS - 1,
        max_prefill_tokens=2**16,
        max_chunks=ROWS,
    )
    blocks = BlockManager(config.num_pages, 64, lookahead=DRAFTS, tail=DRAFTS - 1)
    scheduler = Scheduler(config, blocks, eos_ids=(1,))
    rng = np.random.default_rng(0)
    for i in range(ROWS):
        prompt = rng.integers(2, 1000, 100 + i).tolist()
        scheduler.add(Request(str(i), prompt, stop=StopOptions(max_tokens=2000)))

    def result(plan):
        n = len(plan.requests)
        count = rng.integers(1, DRAFTS + 2, n).astype(np.int32)
        tokens = rng.integers(2, 1000, (n, plan.drafts + 1)).astype(np.int32)
        offered = np.full(n, DRAFTS, np.int32)
        return StepResult(tokens, count, count - 1, offered, np.zeros(n, bool))

    plan = scheduler.schedule(0.0)
    times = []
    for step in range(STEPS):
        brought = result(plan)
        start = time.perf_counter()
        following = scheduler.schedule(float(step))
        scheduler.apply(plan, brought, float(step))
        times.append(time.perf_counter() - start)
        plan = following
    assert len(plan.requests) == ROWS
    return {"median": statistics.median(times), "p90": statistics.quantiles(times, n=10)[-1]}


def test_a_step_of_128_rows_costs_little():
    # In a process of its own: without the run-time type checks of the tests.
    best = {"median": float("inf")}
    for _ in range(3):  # other processes share the cores
        run = subprocess.run(
            [sys.executable, __file__], cwd=ROOT, capture_output=True, text=True, check=True
        )
        best = min(best, json.loads(run.stdout), key=lambda times: times["median"])
        if best["median"] < LIMIT:
            break
    print(f"schedule + apply, {ROWS} rows, K={DRAFTS}: {best}")
    assert best["median"] < LIMIT, best


if __name__ == "__main__":
    sys.path.insert(0, str(ROOT))
    print(json.dumps(measure()))
