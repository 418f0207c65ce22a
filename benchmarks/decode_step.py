"""A whole decode step of a slice of a published model on one GPU: its time, its kernels, its floor.

    python -m benchmarks.decode_step --out benchmarks/results/decode-step.json

The step is one compiled call: new tokens through all layers over a paged cache, logits, the
likeliest token. Weights are random, of the shapes and formats of the model. Three times are stated:
`wall` of steps enqueued one after the other, `kernels`, the sum of their own times by CUPTI, and
`host`, until a call returns. What the kernels take is listed by name.
"""

import argparse
import collections
import dataclasses
import datetime
import functools
import json
import statistics
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.random_weights import Precision, param_shapes, random_like
from dskjax import model, paged
from dskjax.batch import RaggedBatch
from dskjax.cache import init_cache
from dskjax.config import ModelConfig, MtpConfig
from dskjax.params import nbytes
from dskjax.presets import preset
from dskjax.provenance import describe_devices, source_commit, versions
from pallas_kernels.testing.bench import Spread, measure_ceilings

PAGE = 64
RUNS = 25
SLICES: dict[str, tuple[str, int, Precision, str]] = {
    "deepseek-v2-lite bf16": ("deepseek-v2-lite", 27, "bf16", "auto"),
    "deepseek-v3 fp8": ("deepseek-v3", 4, "fp8", "fp8"),
    "deepseek-v3 w4afp8": ("deepseek-v3", 4, "w4afp8", "fp8"),
}
"""Preset, layers, format of the weights, of the cache."""


def main() -> None:
    """Runs every slice at every batch with every implementation, and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--slices", nargs="*", default=list(SLICES), choices=list(SLICES))
    parser.add_argument("--batch", nargs="*", type=int, default=[32, 128])
    parser.add_argument("--context", type=int, default=4096)
    parser.add_argument("--queries", type=int, default=2, help="tokens a sequence: 1 + drafts")
    parser.add_argument("--impl", nargs="*", default=["auto", "xla"])
    parser.add_argument("--layers", type=int, help="other than the slice's")
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    ceilings, rows = dataclasses.asdict(measure_ceilings()), []  # while memory is free
    for name in args.slices:
        for row in of_slice(name, args):
            print(json.dumps(row | {"by_kernel": row["by_kernel"][:8]}), flush=True)
            rows.append(row)
            if args.out is not None:
                args.out.write_text(json.dumps(report(ceilings, rows), indent=1) + "\n")


def report(ceilings: dict[str, float], rows: list[dict[str, Any]]) -> dict[str, Any]:
    """What was measured, and on what."""
    return {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": describe_devices(),
        "commit": source_commit(),
        "versions": versions(),
        "ceilings": ceilings,
        "rows": rows,
    }


def of_slice(name: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Measurements of one slice."""
    preset_name, layers, precision, kv_dtype = SLICES[name]
    cfg = dataclasses.replace(
        preset(preset_name),
        num_hidden_layers=args.layers or layers,
        mtp=MtpConfig(num_nextn_predict_layers=0),
    )
    if cfg.moe is not None and cfg.num_hidden_layers <= cfg.first_k_dense_replace + 1:
        cfg = dataclasses.replace(cfg, first_k_dense_replace=1)  # V3's three would be nearly all
    params = random_like(param_shapes(cfg, precision))
    for batch in args.batch:
        for impl in args.impl:
            found = measure(cfg, params, batch, args.context, args.queries, kv_dtype, impl)
            yield {
                "slice": name,
                "layers": cfg.num_hidden_layers,
                "weights_bytes": nbytes(params),
                "batch": batch,
                "context": args.context,
                "queries": args.queries,
                "impl": impl,
                **found,
            }


def measure(
    cfg: ModelConfig,
    params: Any,
    batch: int,
    context: int,
    queries: int,
    kv_dtype: str,
    impl: str,
) -> dict[str, Any]:
    """Times of one step, and its kernels."""
    width = -(-context // PAGE)
    options = {"page_size": PAGE, "dtype": jnp.bfloat16, "kv_dtype": kv_dtype}
    cache = jax.jit(lambda: init_cache(cfg, num_pages=batch * width, **options))()
    rng = np.random.default_rng(0)
    pages = rng.permutation(batch * width).astype(np.int32).reshape(batch, width)
    tokens = rng.integers(0, cfg.vocab_size, (batch, queries), np.int32)
    lens = np.full(batch, context, np.int32)
    args = jax.device_put((tokens, pages, lens))

    def step(params: Any, cache: Any, tokens: Any, pages: Any, lens: Any) -> Any:
        new = RaggedBatch.uniform(tokens, pages, lens, "absorbed")
        hidden, cache = paged.forward(params, cache, new, cfg=cfg, impl=impl)
        return model.head(params, hidden, cfg=cfg).argmax(axis=-1), cache

    compiled = jax.jit(step, donate_argnums=1).lower(params, cache, *args).compile()
    memory = compiled.memory_analysis()

    def run(count: int, cache: Any) -> tuple[list[float], Any]:
        host = []
        for _ in range(count):
            begun = time.perf_counter()
            out, cache = compiled(params, cache, *args)
            host.append(1e6 * (time.perf_counter() - begun))
        jax.block_until_ready(out)
        return host, cache

    _, cache = run(3, cache)
    wall, host = [], []
    for _ in range(RUNS):
        begun = time.perf_counter()
        some, cache = run(4, cache)
        wall.append(1e6 * (time.perf_counter() - begun) / 4)
        host.append(statistics.median(some))
    kernels = by_kernel(functools.partial(run, 1), cache)
    total = sum(us for _, us, _ in kernels)
    return {
        "wall_us": dataclasses.asdict(Spread.of(wall)),
        "host_us": dataclasses.asdict(Spread.of(host)),
        "kernels_us": total,
        "wall_over_kernels": statistics.median(wall) / total if total else None,
        "launches": sum(count for _, _, count in kernels),
        "temp_bytes": memory.temp_size_in_bytes,
        "pool_bytes": sum(x.nbytes for x in jax.tree.leaves(cache)),
        "by_kernel": kernels,
    }


def by_kernel(run: Any, cache: Any) -> list[tuple[str, float, int]]:
    """(name, microseconds, launches) of the kernels of one call, the longest first."""
    # Not at the top: what it imports takes a second or more. `profiler.measure` would call with
    # the same cache twice, but a step gives its cache away.
    from jax.experimental.mosaic.gpu import profiler

    cupti = profiler.mosaic_gpu_lib._mosaic_gpu_ext
    cupti._cupti_init()
    try:
        run(cache)
    finally:
        timings = cupti._cupti_get_timings(True)
    times: dict[str, list[float]] = collections.defaultdict(list)
    for name, milliseconds in timings:
        times[name].append(1e3 * milliseconds)
    found = [(name[:120], sum(us), len(us)) for name, us in times.items()]
    return sorted(found, key=lambda row: -row[1])


if __name__ == "__main__":
    main()
