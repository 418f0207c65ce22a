"""How long the device idles between decode steps of an engine: one GPU, a slice of V2-Lite.

    python benchmarks/serve_steps.py --out benchmarks/results/serve-steps.json

Three measurements of the same compiled step on the same batch: back to back without a host in
between (the floor), driven by the engine (scheduling, input building, result reading, one step
behind), and the engine's own host time between two launches.
"""

import argparse
import dataclasses
import json
import platform
import queue
import statistics
import time
from pathlib import Path
from typing import Any

import jax
import numpy as np

from dskjax import model
from dskjax.config import MtpConfig
from dskjax.decode.rules import RuleOptions
from dskjax.presets import preset
from dskjax.provenance import source_commit
from serve.buckets import Bucket, Variant
from serve.build import Model, Placement, build_engine
from serve.config import EngineConfig
from serve.engine import Engine, Observer
from serve.engine_api import EngineFailed, Role, Tokens
from serve.request import Request, SamplingOptions, StopOptions


class Times(Observer):
    """Keeps host seconds, and when each full step was applied."""

    def __init__(self, batch: int):
        self.batch, self.host, self.at = batch, [], []

    def stepped(self, plan: Any, result: Any, host: float, step: float) -> None:
        """See `serve.engine.Observer`."""
        if len(plan.requests) == self.batch and not plan.chunks:
            self.host.append(host)
            self.at.append(time.perf_counter())


def main() -> None:
    """Runs the three measurements and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--preset", default="deepseek-v2-lite")
    parser.add_argument("--layers", type=int, default=12)
    parser.add_argument("--chunk", type=int, default=2048)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--prompt", type=int, default=512)
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--drafts", type=int, default=1)
    parser.add_argument("--dtype", default="bfloat16")
    parser.add_argument("--stacked", action="store_true", help="scan over stacked weights")
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    modules = MtpConfig(num_nextn_predict_layers=min(args.drafts, 1))
    cfg = dataclasses.replace(preset(args.preset), num_hidden_layers=args.layers, mtp=modules)
    params = jax.jit(lambda key: model.init(cfg, key, dtype=args.dtype))(jax.random.key(0))
    length = -(-(args.prompt + args.tokens + 8) // 64) * 64
    config = EngineConfig(
        max_model_len=length,
        slots=args.batch,
        chunk=args.chunk,
        drafts=args.drafts,
        accept=RuleOptions(name="rejection"),
        rules=("strict", "rejection"),
        unroll=not args.stacked,
        extras=False,
        few_buckets=True,
    )
    times, events = Times(args.batch), queue.SimpleQueue()
    engine = build_engine(
        Model(name="slice", params=params, cfg=cfg, eos_ids=()),
        config,
        Placement("gpu0", Role.IFB, (jax.devices()[0],)),
        post=events.put,
        observer=times,
        progress=lambda done, total, what: print(f"compiled {done}/{total}: {what}", flush=True),
    )
    engine.start()
    serve(engine, events, args, cfg.vocab_size, seed=0)
    engine.stop()
    steps = np.diff(times.at[20:])
    floor = back_to_back(engine, args.batch, args.drafts)
    median = float(np.median(steps))
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "python": platform.python_version(),
        "commit": source_commit(),
        "model": f"{args.preset} width, {args.layers} layers, {args.drafts} drafts",
        "batch": args.batch,
        "prompt": args.prompt,
        "tokens": args.tokens,
        "dtype": args.dtype,
        "steps": len(steps),
        "step_ms": {"engine": spread(steps), "back_to_back": spread(floor)},
        "idle_between_steps": 1 - float(np.median(floor)) / median,
        "idle_between_steps_mean": 1 - float(np.mean(floor)) / float(np.mean(steps)),
        "host_ms": spread(times.host[20:]),
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    print(json.dumps(result, indent=1))


def serve(engine: Engine, events: Any, args: argparse.Namespace, vocab: int, seed: int) -> None:
    """A full batch from prompt to end; all prompts are there before the first ends."""
    rng = np.random.default_rng(seed)
    for index in range(args.batch):
        request = Request(
            f"{seed}-{index}",
            rng.integers(0, vocab, args.prompt).tolist(),
            stop=StopOptions(max_tokens=args.tokens),
            sampling=SamplingOptions(temperature=1.0, seed=index),
        )
        engine.submit(request)
    left = args.batch
    while left:
        event = events.get(timeout=300)
        if isinstance(event, EngineFailed):
            raise RuntimeError(event.why)
        if isinstance(event, Tokens):
            left -= sum(one.finish is not None for one in event.events)


def back_to_back(engine: Engine, batch: int, drafts: int, steps: int = 100) -> list[float]:
    """Seconds of each of a few runs of `steps` steps of the engine's program, all slots decoding,
    without reading anything in between.
    """
    runner: Any = engine._runner
    columns = runner.buckets.columns[-1]
    bucket = Bucket(batch, 0, 0, drafts, columns, Variant.PLAIN)
    run = runner.programs[bucket]
    table = np.arange(batch * columns, dtype=np.int32).reshape(batch, columns)
    state, found = runner.state, []
    pages = state.cache.num_pages
    decode, _ = runner.programs.example(bucket)
    slots = np.arange(batch, dtype=np.int32)
    decode = dataclasses.replace(decode, slots=slots, page_table=table % pages)
    for _ in range(4):
        state = dataclasses.replace(
            state,
            done=jax.numpy.zeros(batch, bool),
            remaining=jax.numpy.full(batch, 2**30, jax.numpy.int32),
            length=jax.numpy.full(batch, runner.buckets.columns[-1] * 32, jax.numpy.int32),
        )
        jax.block_until_ready(state)
        begun = time.perf_counter()
        for _ in range(steps):
            state, out = run(runner.params, state, decode, None)
        jax.block_until_ready(out)
        found.append((time.perf_counter() - begun) / steps)
    runner.state = state
    return found[1:]


def spread(seconds: Any) -> dict[str, float]:
    """Milliseconds: median, mean, 5th, 95th and 99th percentile."""
    values = sorted(1e3 * float(x) for x in seconds)
    cuts = np.quantile(values, [0.05, 0.95, 0.99])
    named = dict(zip(("p5", "p95", "p99"), map(float, cuts), strict=True))
    return {"median": statistics.median(values), "mean": statistics.fmean(values), **named}


if __name__ == "__main__":
    main()
