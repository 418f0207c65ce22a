"""How long rows of DeepSeek-V3 take to their experts' GPUs and back, on the GPUs of one host.

    python benchmarks/expert_exchange.py --out benchmarks/results/expert-exchange.json

Each GPU has its own rows, a share of 256 experts and 8 choices a row, drawn evenly. Experts give
back what they get, and weights of a row sum to 1, so every exchange of a chain must return its
rows: that is checked. A time is of one exchange in a chain of them inside one call, by the wall
clock. Beside it `all_to_all`: the same padded bytes both ways and nothing else.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax import lax
from jax.sharding import NamedSharding, PartitionSpec

from dskjax.expert_parallel import by_expert, combine, dispatch, weigh
from dskjax.mesh import make_mesh
from dskjax.provenance import describe_devices, source_commit, versions
from pallas_kernels.quant import dequantise
from pallas_kernels.testing.bench import Spread

AXIS, EXPERTS, TOP_K, WIDTH, CHAIN, RUNS = "ep", 256, 8, 7168, 20, 25
ROWS = (1, 8, 32, 64, 128, 512, 2048)
"""Of a GPU."""
KINDS = {
    "throughput": ("throughput", "native"),
    "throughput, fp8": ("throughput", "fp8"),
    "low latency, fp8": ("low_latency", "fp8"),
}


def main() -> None:
    """Times every kind at every number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    mesh, rows_of = make_mesh(ep=jax.device_count()), []
    for rows in args.rows:
        inputs = draw(mesh, rows, args.width)
        for kind, (mode, payload) in KINDS.items():
            if mode == "low_latency" and rows > 128:
                continue  # slots for every row at every expert: a form for few rows
            step = functools.partial(exchange, mode=mode, payload=payload)
            rows_of.append({"rows": rows, "kind": kind} | measure(mesh, step, inputs, check=True))
            print(json.dumps(rows_of[-1]), flush=True)
        bare = measure(mesh, both_ways, inputs, check=False)
        sent = 2 * rows * args.width * 2 * (jax.device_count() - 1)
        bare |= {"bytes_sent": sent, "gbs": sent / bare["us"]["median"] / 1e3}
        rows_of.append({"rows": rows, "kind": "all_to_all"} | bare)
        print(json.dumps(rows_of[-1]), flush=True)
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": describe_devices(),
        "commit": source_commit(),
        "versions": versions(),
        "shape": {"experts": EXPERTS, "choices": TOP_K, "width": args.width, "chain": CHAIN},
        "rows": rows_of,
    }
    if args.out:
        args.out.write_text(json.dumps(report, indent=1) + "\n")


def draw(mesh: Any, rows: int, width: int) -> tuple[jax.Array, ...]:
    """(x, experts, weights) of all GPUs, split over them."""
    rng, total = np.random.default_rng(0), rows * mesh.size
    x = rng.integers(-8, 9, (total, width)).astype(jnp.bfloat16)
    x[:, ::128] = 224  # so that integers are exact in fp8
    experts = np.argsort(rng.random((total, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    weights = np.full(experts.shape, 1 / TOP_K, np.float32)
    where = NamedSharding(mesh, PartitionSpec(AXIS))
    return tuple(jax.device_put(a, where) for a in (x, experts, weights))


def exchange(
    x: jax.Array, experts: jax.Array, weights: jax.Array, *, mode: str, payload: Any
) -> jax.Array:
    """Rows to their experts, which change nothing, and back."""
    per_rank = EXPERTS // lax.axis_size(AXIS)
    got = dispatch(x, experts, weights, axis=AXIS, per_rank=per_rank, payload=payload)
    if mode == "low_latency":
        slots = by_expert(got, per_rank=per_rank, dtype=x.dtype)
        return combine(weigh(slots.x, slots, got), got, axis=AXIS)
    share = jnp.where(got.experts >= 0, got.weights, 0).sum(axis=1, keepdims=True)
    y = dequantise(got.x, jnp.float32) * share
    return combine(y.astype(x.dtype), got, axis=AXIS)


def both_ways(x: jax.Array, _experts: jax.Array, _weights: jax.Array) -> jax.Array:
    """What an exchange without slack must move: every row to every GPU, and back."""
    ranks = lax.axis_size(AXIS)
    sent = jnp.broadcast_to(x, (ranks, *x.shape)).reshape(-1, x.shape[1])
    for _ in range(2):
        sent = lax.all_to_all(sent, AXIS, 0, 0, tiled=True)
    return sent[: x.shape[0]]


def measure(
    mesh: Any, step: Callable[..., jax.Array], inputs: tuple[jax.Array, ...], *, check: bool
) -> dict[str, Any]:
    """Microseconds of one step in a chain."""

    def chain(x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        return lax.fori_loop(0, CHAIN, lambda _, rows: step(rows, experts, weights), x)

    split = PartitionSpec(AXIS)
    run = jax.jit(jax.shard_map(chain, mesh=mesh, in_specs=split, out_specs=split, check_vma=False))
    out = jax.block_until_ready(run(*inputs))
    if check and not np.array_equal(np.asarray(out), np.asarray(inputs[0])):
        raise ValueError("an exchange changed its rows")
    samples = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        samples.append(1e6 * (time.perf_counter() - begun) / CHAIN)
    return {"us": dataclasses.asdict(Spread.of(samples))}


if __name__ == "__main__":
    main()
