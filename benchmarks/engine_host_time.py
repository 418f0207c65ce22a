"""Times what an engine's thread does between two launches: schedule, build inputs, apply a result.

The device is a clock: a step takes 10 ms and brings random tokens. Everything else is real: the
engine's loop and metrics, the arrays of `serve.rows`, and in the same process the output thread,
which makes text of every token and wakes an event loop in a thread of its own.

python benchmarks/engine_host_time.py --out benchmarks/results/engine-host-time.json
"""

import argparse
import asyncio
import datetime
import json
import os
import platform
import statistics
import sys
import threading
import time
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np

from dskjax.decode.rules import RuleOptions
from dskjax.provenance import source_commit
from dskjax.tokenizer import Tokenizer
from serve.api import GenerateOptions, Output
from serve.blocks import BlockManager
from serve.engine import Engine, settle_process
from serve.engine_api import Role, Tokens
from serve.metrics import Metrics
from serve.observe import EngineObserver
from serve.output import OutputThread
from serve.plan import StepPlan, StepResult
from serve.request import FinishReason, Request, SamplingOptions, StopOptions
from serve.rows import decode_rows, prefill_rows
from serve.scheduler import Scheduler
from serve.scheduler_config import SchedulerConfig
from serve.text import AnswerText
from serve.transfer.transport import KVForm

MODEL = Path(__file__).parents[1] / "examples" / "tiny-deepseek"
DRAFTS, PAGE, STEP_SECONDS, DISPATCH_SECONDS = 3, 64, 10e-3, 50e-6
"""Drafts a step; tokens a page; a step's time on the device, and to hand it over, during which the
interpreter lock is free."""
RULE = RuleOptions(name="rejection")
WARM_UP = 30
"""Steps that do not count: prefill, and the first of every size."""


class Pending(NamedTuple):
    """A launched step, and when the device is done with it."""

    plan: StepPlan
    ready: float


class Clock:
    """An `EngineRunner` whose device only lets time pass. Its arrays are those of a real launch."""

    def __init__(self, config: SchedulerConfig, ids: np.ndarray):
        self._config, self._ids = config, ids
        self._random = np.random.default_rng(0)
        self._ready = 0.0
        self.own_cpu = 0.0  # of what stands for the device
        self.dispatch = dispatch_seconds()

    def check(self, request: Request) -> None:
        """Everything can be served."""

    def launch(self, plan: StepPlan, page_table: np.ndarray) -> Pending:
        """Builds the inputs and lets go of the lock, as a dispatch does."""
        scale, columns = np.ones(DRAFTS, np.float32), self._config.max_columns
        if plan.requests:
            decode_rows(plan.slots, page_table, self._config.num_slots, columns, scale)
        for chunk in plan.chunks:
            prefill_rows([chunk], page_table, (1, chunk.length), columns, DRAFTS)
        begun = time.thread_time()
        time.sleep(DISPATCH_SECONDS)  # takes `self.dispatch`, or longer if the lock is gone then
        self.own_cpu += time.thread_time() - begun
        self._ready = max(self._ready, time.monotonic()) + STEP_SECONDS
        return Pending(plan, self._ready)

    def fetch(self, pending: Pending) -> StepResult:
        """Waits for the step and makes up what it did."""
        begun = time.thread_time()
        time.sleep(max(pending.ready - time.monotonic(), 0.0))
        n, m = len(pending.plan.requests), pending.plan.drafts
        count = self._random.integers(1, m + 2, n).astype(np.int32)
        tokens = self._random.choice(self._ids, (n, m + 1)).astype(np.int32)
        offered = np.full(n, m, np.int32)
        result = StepResult(tokens, count, count - 1, offered, np.zeros(n, bool))
        self.own_cpu += time.thread_time() - begun
        return result


def dispatch_seconds() -> float:
    """What a sleep of `DISPATCH_SECONDS` takes when nobody else runs: timers are not that fine."""
    times = []
    for _ in range(200):
        begun = time.perf_counter()
        time.sleep(DISPATCH_SECONDS)
        times.append(time.perf_counter() - begun)
    return statistics.median(times)


class Stopwatch(EngineObserver):
    """Notes the host time of every step and the CPU time of it, both without the device's."""

    def __init__(self, runner: Clock, *args: Any):
        super().__init__(*args)
        self._runner = runner
        self._cpu = 0.0
        self.host: list[float] = []
        self.cpu: list[float] = []

    def stepped(self, plan: StepPlan, result: StepResult, host: float, step: float) -> None:
        """See `serve.engine.Observer`; its own time counts."""
        begun = time.perf_counter()
        super().stepped(plan, result, host, step)
        own = time.perf_counter() - begun
        self.host.append(host + own - self._runner.dispatch)
        now = time.thread_time() - self._runner.own_cpu
        self.cpu.append(now - self._cpu)
        self._cpu = now


class NoBackend:
    """What the output thread may tell of answers that end; here none does."""

    ready = True

    def start(self, sink: Any) -> None:
        """Nothing to start."""

    def stop(self) -> None:
        """Nothing to stop."""

    def submit(self, request: Request) -> None:
        """Not used."""

    def submit_to(self, engine: str, request: Request) -> None:
        """Not used."""

    def abort(self, request_id: str) -> None:
        """Not used."""

    def finish(self, request_id: str, reason: FinishReason) -> None:
        """Not used."""

    def engines(self) -> list[str]:
        """None."""
        return []


def measure(rows: int, steps: int) -> dict[str, list[float]]:
    """Seconds of host and CPU time of each of `steps` steps with `rows` decoding sequences."""
    tokenizer = Tokenizer.load(MODEL)
    lengths = tokenizer.token_lengths()
    longest = 128 + (DRAFTS + 1) * (steps + WARM_UP + rows) + PAGE
    columns = -(-longest // PAGE)
    config = SchedulerConfig(
        num_slots=rows,
        num_pages=rows * columns,
        page_size=PAGE,
        max_columns=columns,
        drafts=DRAFTS,
        lookahead=DRAFTS,
        tail=DRAFTS - 1,
        max_chunks=rows,
        max_prefill_tokens=2**16,
    )
    blocks = BlockManager(config.num_pages, PAGE, lookahead=DRAFTS, tail=DRAFTS - 1)
    metrics, runner = Metrics("model"), Clock(config, np.flatnonzero(lengths > 0))
    watch = Stopwatch(runner, metrics.engine("e"), RULE)
    output = OutputThread(NoBackend(), metrics=metrics)

    def post(event: Any) -> None:
        if isinstance(event, Tokens):
            output.push(event.events)

    form = KVForm(
        model="",
        dtype="",
        kv_dtype="",
        page_size=PAGE,
        layers=1,
        latent=1,
        rope=1,
        mtp_scheme="",
        mtp_depth=0,
        page_bytes=1,
    )
    scheduler = Scheduler(config, blocks)
    engine = Engine("e", Role.IFB, scheduler, runner, form, post=post, observer=watch)
    loop = asyncio.new_event_loop()
    reader = threading.Thread(target=loop.run_forever, name="event-loop")
    pieces: list[Output] = []
    random = np.random.default_rng(1)
    options = GenerateOptions(
        sampling=SamplingOptions(), stop=StopOptions(max_tokens=longest - 128 - PAGE)
    )
    for i in range(rows):
        prompt = random.integers(2, 1000, 100 + i % 28).tolist()
        request = Request(str(i), prompt, stop=options.stop, accept=RULE, arrival=time.monotonic())
        answer = AnswerText(tokenizer, options, request)
        output.add(request, answer, pieces.append, loop=loop)
        engine.submit(request)
    settle_process()
    reader.start()
    output.start()
    engine.start()
    try:
        while len(watch.host) < WARM_UP + steps:
            assert engine.ready or not watch.host, "the engine failed"
            time.sleep(0.05)
        assert scheduler.stats().running == rows and pieces
    finally:
        engine.stop()
        output.stop()
        loop.call_soon_threadsafe(loop.stop)
        reader.join()
        loop.close()
    return {name: getattr(watch, name)[WARM_UP : WARM_UP + steps] for name in ("host", "cpu")}


def figures(times: dict[str, list[float]]) -> dict[str, float]:
    """Milliseconds: median and tail of the host time, and the median of the CPU time."""
    host = statistics.quantiles([1e3 * t for t in times["host"]], n=100)
    return {
        "host_ms_p10": host[9],
        "host_ms_median": host[49],
        "host_ms_p90": host[89],
        "host_ms_p99": host[98],
        "host_ms_max": 1e3 * max(times["host"]),
        "cpu_ms_median": 1e3 * statistics.median(times["cpu"]),
    }


def main() -> None:
    """Measures, prints and, with --out, writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rows", type=int, default=128)
    parser.add_argument("--steps", type=int, default=300)
    parser.add_argument("--runs", type=int, default=1)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    runs = [figures(measure(args.rows, args.steps)) for _ in range(args.runs)]
    best = min(runs, key=lambda run: run["host_ms_median"])
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {
            "architecture": platform.machine(),
            "cpus": os.cpu_count(),
            "load_average": os.getloadavg()[0],
        },
        "commit": source_commit(),
        "python": platform.python_version(),
        "numpy": np.__version__,
        "rows": args.rows,
        "drafts": DRAFTS,
        "step_ms": 1e3 * STEP_SECONDS,
        "steps": args.steps,
        "best": best,
        "runs": runs,
    }
    text = json.dumps(result, indent=2)
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(text)


if __name__ == "__main__":
    sys.exit(main())
