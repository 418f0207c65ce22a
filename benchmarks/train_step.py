"""Times one training step of a model on a batch that stays on the device.

python benchmarks/train_step.py examples/tiny-deepseek --rows 64 --seq-len 1024 --out STEP.json
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import jax
import numpy as np

from dskjax.checkpoint import load_config
from train_mtp.data import Batch
from train_mtp.optim import AdamW
from train_mtp.step import Recipe, init_state, place_batch, train_step

DOCUMENTS = 4
"""Documents a row, of equal length."""


def main() -> None:
    """Times steps one by one and back to back, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path, help="folder with config.json")
    parser.add_argument("--rows", type=int, default=64)
    parser.add_argument("--seq-len", type=int, default=1024)
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()

    cfg = load_config(args.model)
    recipe = Recipe(cfg=cfg, optimizer=AdamW(lr=1e-3, warmup=10, steps=1000))
    shape, length = (args.rows, args.seq_len), args.seq_len // DOCUMENTS
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, shape, np.int32)
    segments = np.broadcast_to(np.arange(args.seq_len) // length + 1, shape).astype(np.int32)
    positions = np.broadcast_to(np.arange(args.seq_len) % length, shape).astype(np.int32)
    batch = place_batch(Batch(tokens, segments, positions), recipe.sharding)

    state, times = init_state(recipe, 0), []
    for _ in range(args.steps + 6):  # the first compiles, five more warm up
        begun = time.perf_counter()
        state, metrics = train_step(state, batch, recipe=recipe)
        jax.block_until_ready(metrics)
        times.append(1e3 * (time.perf_counter() - begun))
    steady = times[6:]
    cuts = statistics.quantiles(steady, n=20)
    begun = time.perf_counter()
    for _ in range(args.steps):
        state, metrics = train_step(state, batch, recipe=recipe)
    jax.block_until_ready(metrics)
    together = 1e3 * (time.perf_counter() - begun) / args.steps
    result = {
        "device": jax.devices()[0].device_kind,
        "jax": jax.__version__,
        "rows": args.rows,
        "seq_len": args.seq_len,
        "compile_s": times[0] / 1e3,
        "ms": {"median": statistics.median(steady), "p5": cuts[0], "p95": cuts[-1]},
        "samples": len(steady),
        "back_to_back_ms": together,
        "tokens_per_s": 1e3 * tokens.size / together,
    }
    args.out.write_text(json.dumps(result, indent=2) + "\n")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
