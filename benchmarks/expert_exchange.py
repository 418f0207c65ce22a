"""How long rows of DeepSeek-V3 take to their experts' GPUs and back, on the GPUs of one host.

    python benchmarks/expert_exchange.py --out benchmarks/results/expert-exchange.json

Each GPU has its own rows, a share of 256 experts and 8 choices a row, drawn evenly. Experts give
back what they get, and weights of a row sum to 1, so every exchange of a chain must return its
rows: that is checked. A time is of one exchange in a chain of them inside one call, by the wall
clock. Beside it, bare, the rows both ways and nothing else: `all_to_all` with padding, and peer
puts of those that count. `floor_us` is what NVLink allows: the bytes that must leave the busiest
GPU, there and back, over the speed of a large copy to a peer in the same run.
"""

import argparse
import dataclasses
import datetime
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

from dskjax.expert_parallel import by_expert, combine, dispatch, layout, message, weigh
from dskjax.mesh import make_mesh
from dskjax.provenance import describe_devices, source_commit, versions
from pallas_kernels.quant import dequantise
from pallas_kernels.testing.bench import Spread

AXIS, EXPERTS, TOP_K, WIDTH, CHAIN, RUNS = "ep", 256, 8, 7168, 20, 25
ROWS = (1, 8, 32, 64, 128, 512, 4096)
"""Of a GPU."""
MOST_SLOTS = 128
"""Rows that the low-latency form is for: it has a slot for every row at every expert."""
COPY_BYTES, COPIES = 256 * 2**20, 15
"""Of a copy to a peer, and how many are timed."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Kind:
    """A way of exchange.

    Attributes:
        mode: "throughput", "low_latency", or "bare": no bookkeeping.
        payload: of dispatch.
        transport: of both ways.
    """

    mode: str
    payload: Any = "native"
    transport: Any = "all_to_all"


KINDS = {
    "throughput": Kind(mode="throughput"),
    "throughput, fp8": Kind(mode="throughput", payload="fp8"),
    "throughput, fp8, peer puts": Kind(mode="throughput", payload="fp8", transport="peer"),
    "low latency, fp8": Kind(mode="low_latency", payload="fp8"),
    "all_to_all": Kind(mode="bare"),
    "peer puts": Kind(mode="bare", transport="peer"),
}


def main() -> None:
    """Times every kind at every number of rows."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--rows", type=int, nargs="*", default=ROWS)
    parser.add_argument("--width", type=int, default=WIDTH)
    parser.add_argument("--out", type=Path)
    parser.add_argument("--plot", metavar="PNG", type=Path)
    args = parser.parse_args()
    mesh = make_mesh(ep=jax.device_count())
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": describe_devices(),
        "commit": source_commit(),
        "versions": versions(),
        "shape": {"experts": EXPERTS, "choices": TOP_K, "width": args.width, "chain": CHAIN},
        "peer_copy_gbs": peer_copy_gbs(),
        "rows": [],
    }
    for rows in args.rows:
        inputs = draw(mesh, rows, args.width)
        for name, kind in KINDS.items():
            if kind.mode == "low_latency" and rows > MOST_SLOTS:
                continue
            bytes_sent = must_leave(mesh, inputs, kind)
            row = {
                "rows": rows,
                "kind": name,
                "bytes_sent": bytes_sent,
                "floor_us": bytes_sent / report["peer_copy_gbs"] / 1e3,
            }
            step = both_ways if kind.mode == "bare" else exchange
            row |= measure(mesh, step, inputs, kind)
            row["gbs"] = bytes_sent / row["us"]["median"] / 1e3
            report["rows"].append(row)
            print(json.dumps(row), flush=True)
        if args.out:  # after each, so that what is there survives a time limit
            args.out.write_text(json.dumps(report, indent=1) + "\n")
    if args.plot:
        plot(report, args.plot)


def peer_copy_gbs() -> float:
    """Median 1e9 bytes/s of copies from the first GPU to the second."""
    first, second = jax.devices()[:2]
    x = jax.device_put(jnp.zeros(COPY_BYTES, jnp.uint8), first)
    samples = []
    for _ in range(COPIES + 1):
        begun = time.perf_counter()
        jax.block_until_ready(jax.device_put(x, second))
        samples.append(time.perf_counter() - begun)
    return COPY_BYTES / float(np.median(samples[1:])) / 1e9


def must_leave(mesh: Any, inputs: tuple[jax.Array, ...], kind: Kind) -> int:
    """Bytes that the busiest GPU has to send: its rows to other GPUs, and theirs back."""
    x, experts, _ = inputs
    ranks, width = mesh.size, x.shape[1]
    to = np.asarray(experts).reshape(ranks, -1, TOP_K) // (EXPERTS // ranks)
    goes = (to[..., None] == np.arange(ranks)).any(axis=2).sum(axis=1)  # [from, to]
    if kind == KINDS["all_to_all"]:
        goes[:] = len(x) // ranks
    np.fill_diagonal(goes, 0)
    row = width * 2 if kind.payload == "native" else width + width // 128 * 4
    extra = 0 if kind.mode == "bare" else 2 * 4 * TOP_K
    there, back = goes.sum(axis=1).max() * (row + extra), goes.sum(axis=0).max() * width * 2
    return int(there + back)


def draw(mesh: Any, rows: int, width: int) -> tuple[jax.Array, ...]:
    """(x, experts, weights) of all GPUs, split over them."""
    rng, total = np.random.default_rng(0), rows * mesh.size
    x = rng.integers(-8, 9, (total, width)).astype(jnp.bfloat16)
    x[:, ::128] = 224  # so that integers are exact in fp8
    experts = np.argsort(rng.random((total, EXPERTS)), axis=1)[:, :TOP_K].astype(np.int32)
    weights = np.full(experts.shape, 1 / TOP_K, np.float32)
    where = NamedSharding(mesh, PartitionSpec(AXIS))
    return tuple(jax.device_put(a, where) for a in (x, experts, weights))


def exchange(x: jax.Array, experts: jax.Array, weights: jax.Array, kind: Kind) -> jax.Array:
    """Rows to their experts, which change nothing, and back."""
    per_rank = EXPERTS // lax.axis_size(AXIS)
    options = {"payload": kind.payload, "transport": kind.transport}
    got = dispatch(x, experts, weights, axis=AXIS, per_rank=per_rank, **options)
    if kind.mode == "low_latency":
        slots = by_expert(got, per_rank=per_rank, dtype=x.dtype)
        return combine(weigh(slots.x, slots, got), got, axis=AXIS)
    share = jnp.where(got.experts >= 0, got.weights, 0).sum(axis=1, keepdims=True)
    y = dequantise(got.x, jnp.float32) * share
    return combine(y.astype(x.dtype), got, axis=AXIS)


def both_ways(x: jax.Array, experts: jax.Array, _weights: jax.Array, kind: Kind) -> jax.Array:
    """Rows to GPUs and back: every row to every GPU, or puts of those with an expert there."""
    ranks, rows = lax.axis_size(AXIS), x.shape[0]
    sent = jnp.broadcast_to(x, (ranks, *x.shape)).reshape(-1, x.shape[1])
    if kind.transport == "peer":
        sizes = {"per_rank": EXPERTS // ranks, "ranks": ranks, "capacity": rows}
        (there,), counts = message.put((sent,), layout(experts, **sizes).counts, AXIS)
        (back,), _ = message.put((there,), counts, AXIS)
    else:
        (there,) = message.swap((sent,), AXIS)
        (back,) = message.swap((there,), AXIS)
    return back[:rows]


def measure(
    mesh: Any, step: Callable[..., jax.Array], inputs: tuple[jax.Array, ...], kind: Kind
) -> dict[str, Any]:
    """Microseconds of one step in a chain."""

    def chain(x: jax.Array, experts: jax.Array, weights: jax.Array) -> jax.Array:
        return lax.fori_loop(0, CHAIN, lambda _, rows: step(rows, experts, weights, kind), x)

    split = PartitionSpec(AXIS)
    run = jax.jit(
        jax.shard_map(
            chain,
            mesh=mesh,
            in_specs=split,
            out_specs=split,
            axis_names=set(mesh.axis_names),
            check_vma=False,
        )
    )
    out = jax.block_until_ready(run(*inputs))
    if kind.mode != "bare" and not np.array_equal(np.asarray(out), np.asarray(inputs[0])):
        raise ValueError(f"an exchange changed its rows: {kind}")
    samples = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        jax.block_until_ready(run(*inputs))
        samples.append(1e6 * (time.perf_counter() - begun) / CHAIN)
    return {"us": dataclasses.asdict(Spread.of(samples))}


def plot(report: dict[str, Any], out: Path) -> None:
    """Time over rows of a GPU for every kind, and what NVLink allows."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axis = plt.subplots(figsize=(8.5, 4.5), layout="constrained")

    def line(name: str, value: Callable[[dict[str, Any]], float], label: str, **style: Any) -> None:
        found = [row for row in report["rows"] if row["kind"] == name]
        axis.plot(
            [row["rows"] for row in found], [value(row) for row in found], label=label, **style
        )

    for name in KINDS:
        line(name, lambda row: row["us"]["median"], name, marker="o", markersize=4)
    for name, label in (("peer puts", "bf16"), ("throughput, fp8", "fp8 there, bf16 back")):
        style = {"linestyle": "--" if label == "bf16" else ":", "color": "black"}
        line(name, lambda row: row["floor_us"], f"NVLink floor, {label}", **style)
    axis.set(
        xlabel="rows of a GPU",
        ylabel="dispatch and combine, us",
        title=f"{report['device']}, rows of {report['shape']['width']}",
        xscale="log",
        yscale="log",
    )
    figure.legend(loc="outside right upper", fontsize=8)
    axis.grid(alpha=0.3)
    figure.savefig(out, dpi=120)
    plt.close(figure)


if __name__ == "__main__":
    main()
