"""Expert placement: how even DeepSeek's plans and ours are, what they cost, what replanning moves.

Loads are Zipf in random order, every layer another. "even" rows compare plans for known loads, and
say what a step of 4,096 tokens with 8 experts each finds ("step"): drawn from those loads, one by
one, so a token may draw an expert twice. "drift" rows plan for loads, change each by a factor
exp(by * normal) (by = null: new loads), and count the slots that change. Times are of one call for
all layers, on one thread.

python benchmarks/eplb.py --out benchmarks/results/eplb.json
"""

import argparse
import datetime
import json
import os
import platform
import sys
import time
from pathlib import Path
from typing import Any

import matplotlib
import numpy as np

from dskjax.eplb import (
    Layout,
    Placement,
    Policy,
    gpu_loads,
    imbalance,
    lower_bound,
    plain_loads,
    plan,
    replan,
)
from dskjax.eplb.plan import scope
from dskjax.eplb.rename import renamed, stay
from dskjax.provenance import source_commit

EXPERTS, GROUPS, TOKENS, CHOICES = 256, 8, 4096, 8
LAYOUTS = {
    "EP16, 2 nodes, 272 slots": (272, 2, 16),
    "EP32, 4 nodes, 288 slots": (288, 4, 32),
    "EP144, 18 nodes, 288 slots": (288, 18, 144),
    "EP320, 40 nodes, 320 slots": (320, 40, 320),
}
SHOWN = "EP32, 4 nodes, 288 slots"
"""The layout that is drawn, and that loads drift in."""
EXPONENTS = (0.5, 1.0, 1.5)
DRIFTS = (0.05, 0.1, 0.3, 1.0, None)
NAMES = {
    "none": "no replicas, in order",
    "hierarchical": "DeepSeek, hierarchical",
    "hierarchical_refined": "refined, hierarchical",
    "hierarchical_bound": "lower bound, hierarchical",
    "global": "DeepSeek, global",
    "global_refined": "refined, global",
    "global_bound": "lower bound, global",
}


def zipf(rng: np.random.Generator, layers: int, exponent: float) -> np.ndarray:
    """Loads [L, E] with mean 1."""
    ranked = np.arange(1, EXPERTS + 1) ** -exponent
    return rng.permuted(np.tile(ranked / ranked.mean(), (layers, 1)), axis=1)


def layout_of(name: str) -> Layout:
    """A layout by its name."""
    slots, nodes, gpus = LAYOUTS[name]
    return Layout(num_replicas=slots, num_groups=GROUPS, num_nodes=nodes, num_gpus=gpus)


def policies(layout: Layout) -> list[Policy]:
    """Those that can plan for it."""
    return [p for p in Policy if p != Policy.DEEPSEEK and (layout.groups_divide or "glo" in p)]


def even(name: str, exponent: float, layers: int, seeds: int) -> dict[str, Any]:
    """Imbalance under every policy, all seeds and layers together."""
    layout, found, times = layout_of(name), {}, {}
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        loads = zipf(rng, layers, exponent)
        step = np.stack([rng.multinomial(TOKENS * CHOICES, row / row.sum()) for row in loads])
        if (plain := plain_loads(loads, layout.num_gpus)) is not None:
            found.setdefault("none", []).append(imbalance(plain))
        for policy in policies(layout):
            begun, cpu = time.perf_counter(), time.thread_time()
            placement = plan(loads, layout, policy)
            took = (time.thread_time() - cpu, time.perf_counter() - begun)
            times.setdefault(str(policy), []).append(took)
            for key, weight in ((f"{policy}", loads), (f"{policy} step", step)):
                by_gpu = gpu_loads(weight, placement.phy2log, layout.num_gpus)
                found.setdefault(key, []).append(imbalance(by_gpu))
            if not policy.endswith("_refined"):
                whole = scope(policy, layout).nodes > 1
                bound = lower_bound(loads, layout, hierarchical=whole)
                found.setdefault(f"{policy}_bound", []).append(bound)
    return {
        "layout": name,
        "exponent": exponent,
        "imbalance": {key: spread(np.concatenate(values)) for key, values in found.items()},
        "seconds": {key: seconds(values) for key, values in times.items()},
    }


def drift(by: float | None, policy: Policy, layers: int, seeds: int) -> dict[str, Any]:
    """Slots that change per layer, and imbalance, from a plan for Zipf 1.0 to changed loads."""
    layout, values, times = layout_of(SHOWN), {}, []
    for seed in range(seeds):
        rng = np.random.default_rng(seed)
        old = zipf(rng, layers, 1.0)
        current = plan(old, layout, policy)
        factor = np.exp((by or 0) * rng.standard_normal(old.shape))
        loads = zipf(rng, layers, 1.0) if by is None else old * factor
        fresh = plan(loads, layout, policy)
        begun, cpu = time.perf_counter(), time.thread_time()
        ours = replan(current, loads, layout, policy)
        times.append((time.thread_time() - cpu, time.perf_counter() - begun))
        now, new = current.phy2log.astype(np.int64), fresh.phy2log.astype(np.int64)
        named = renamed(now, new, EXPERTS, layout.num_gpus, scope(policy, layout).nodes)
        named = stay(now, named, layout.num_gpus)
        for key, slots in (("fresh", new), ("renamed", named), ("ours", ours.placement.phy2log)):
            values.setdefault(f"moves {key}", []).append((slots != now).sum(axis=1))
        for key, placement in (("before", current), ("fresh", fresh), ("ours", ours.placement)):
            values.setdefault(f"imbalance {key}", []).append(ratio(loads, placement, layout))
    joined = {key: np.concatenate(parts) for key, parts in values.items()}
    worst = (joined["imbalance ours"] / joined["imbalance fresh"]).max()
    return {
        "layout": SHOWN,
        "policy": str(policy),
        "by": by,
        "of_slots": layout.num_replicas,
        **{key: spread(parts) for key, parts in joined.items()},
        "worst_imbalance_of_fresh": float(worst),
        "seconds": seconds(times),
    }


def ratio(loads: np.ndarray, placement: Placement, layout: Layout) -> np.ndarray:
    """Imbalance of each layer."""
    return imbalance(gpu_loads(loads, placement.phy2log, layout.num_gpus))


def spread(values: np.ndarray) -> dict[str, float]:
    """Mean, median, and extremes over layers and seeds."""
    figures = {"mean": np.mean, "median": np.median, "min": np.min, "max": np.max}
    return {name: round(float(figure(values)), 4) for name, figure in figures.items()}


def seconds(times: list[tuple[float, float]]) -> dict[str, float]:
    """Medians and worst of a call: of the thread, and by the clock (other work may run beside)."""
    cpu, wall = np.array(times).T
    return {
        "cpu_median": round(float(np.median(cpu)), 4),
        "cpu_max": round(float(cpu.max()), 4),
        "wall_median": round(float(np.median(wall)), 4),
    }


def plot(result: dict[str, Any], path: Path) -> None:
    """Imbalance by skew, and moves by drift."""
    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4.2), layout="constrained")
    rows = [row for row in result["even"] if row["layout"] == SHOWN]
    for number, (key, label) in enumerate(NAMES.items()):
        style = "k_" if key.endswith("_bound") else "o"
        x = np.arange(len(rows)) + (number - len(NAMES) / 2) / 9
        found = [row["imbalance"][key] for row in rows]
        mean, low, high = (np.array([f[name] for f in found]) for name in ("mean", "min", "max"))
        left.errorbar(x, mean, (mean - low, high - mean), fmt=style, ms=7, label=label, lw=1)
    left.set_xticks(range(len(rows)), [f"Zipf {row['exponent']:g}" for row in rows])
    left.set(yscale="log", ylabel="fullest / mean load of a GPU (mean, min to max)", title=SHOWN)
    ticks = (1, 1.2, 1.5, 2, 3, 5, 8, 12)
    left.set_yticks(ticks, [f"{tick:g}" for tick in ticks])
    left.minorticks_off()
    left.set_ylim(0.9, 80)  # room for the legend
    left.legend(fontsize="small", ncols=2)
    for policy, line in ((Policy.GLOBAL_REFINED, "-"), (Policy.HIERARCHICAL_REFINED, "--")):
        rows = [row for row in result["drift"] if row["policy"] == policy]
        kind = policy.removesuffix("_refined")
        for key, color, what in (
            ("fresh", "C3", "fresh plan"),
            ("renamed", "C1", "fresh plan, GPUs renamed"),
            ("ours", "C0", "replan, within 2%"),
        ):
            moves = [row[f"moves {key}"]["mean"] for row in rows]
            right.plot(moves, f"{color}o{line}", label=f"{what}, {kind}", ms=4)
    right.set_xticks(
        range(len(rows)), ["new" if row["by"] is None else f"{row['by']:g}" for row in rows]
    )
    right.set(
        yscale="log",
        xlabel="loads change by exp(x normal)",
        ylabel=f"slots of {rows[0]['of_slots']} that change, per layer",
        title="replanning, Zipf 1",
    )
    right.legend(fontsize="small")
    figure.savefig(path, dpi=120)
    plt.close(figure)


def main() -> None:
    """Measures, prints and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--layers", type=int, default=61)
    parser.add_argument("--seeds", type=int, default=20)
    parser.add_argument("--out", type=Path, default=Path("benchmarks/results/eplb.json"))
    args = parser.parse_args()
    sizes = (args.layers, args.seeds)
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
        "experts": EXPERTS,
        "groups": GROUPS,
        "step_tokens": TOKENS,
        "layers": args.layers,
        "seeds": args.seeds,
        "even": [even(name, s, *sizes) for name in LAYOUTS for s in EXPONENTS],
        "drift": [
            drift(by, policy, *sizes)
            for policy in (Policy.GLOBAL_REFINED, Policy.HIERARCHICAL_REFINED)
            for by in DRIFTS
        ],
    }
    args.out.parent.mkdir(parents=True, exist_ok=True)
    args.out.write_text(json.dumps(result, indent=1) + "\n")
    plot(result, args.out.with_suffix(".png"))
    for row in result["even"]:
        shown = {key: value["mean"] for key, value in row["imbalance"].items()}
        print(row["layout"], f"Zipf {row['exponent']:g}", shown)
    for row in result["drift"]:
        moves = {key: row[f"moves {key}"]["mean"] for key in ("fresh", "renamed", "ours")}
        print(row["policy"], row["by"], moves)


if __name__ == "__main__":
    sys.exit(main())
