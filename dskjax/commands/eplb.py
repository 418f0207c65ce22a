"""`dskjax eplb`: plans where experts go, from a file of loads to a file of maps.

The plan's file holds the maps as lists (`phy2log`, `log2phy`, `logcnt`), the settings, the loads of
all GPUs, and per layer the imbalance (fullest over mean) before and after. "Before" is the plan in
use or, if there is none, each expert once, in order; null if the GPUs do not divide the experts.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from rich.table import Table

from dskjax.commands.ids import load_array
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
from dskjax.eplb.layout import check_loads
from dskjax.eplb.plan import scope


def read_loads(path: Path) -> np.ndarray:
    """Loads of a file, float64 [L, E].

    Raises:
        ValueError: not a `.npy` file of loads; the message names it.
    """
    array = load_array(path, "a .npy array of loads [layers, experts]")
    try:
        return check_loads(array)
    except ValueError as error:
        raise ValueError(f"{path}: {error}") from error


def read_plan(path: Path) -> Placement:
    """The maps of a plan's file.

    Raises:
        ValueError: not such a file, or its maps contradict each other; the message names it.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected a plan that dskjax eplb wrote")
    try:
        fields = json.loads(path.read_bytes())
        if not isinstance(fields, dict):
            raise ValueError("not a JSON object")
        return Placement.from_dict(fields)
    except ValueError as error:
        raise ValueError(f"{path} is not a plan: {error}") from error


def make(
    loads: np.ndarray,
    layout: Layout,
    policy: Policy,
    *,
    current: Placement | None = None,
    tolerance: float = 0.02,
) -> dict[str, Any]:
    """A plan, and what it is good for, as JSON values; with `current` also the moves to it.

    Raises:
        ValueError: see `dskjax.eplb.plan` and `dskjax.eplb.replan`.
    """
    settings: dict[str, Any] = {
        "policy": str(policy),
        "num_replicas": layout.num_replicas,
        "num_groups": layout.num_groups,
        "num_nodes": layout.num_nodes,
        "num_gpus": layout.num_gpus,
    }
    moves = {}
    if current is None:
        placement = plan(loads, layout, policy)
        before = plain_loads(loads, layout.num_gpus)
    else:
        found = replan(current, loads, layout, policy, tolerance=tolerance)
        placement, settings["tolerance"] = found.placement, tolerance
        before = gpu_loads(loads, current.phy2log, layout.num_gpus)
        moves = {"moves": found.moves.tolist()}
    after = gpu_loads(loads, placement.phy2log, layout.num_gpus)
    bound = lower_bound(loads, layout, hierarchical=scope(policy, layout).nodes > 1)
    return {
        "settings": settings,
        "imbalance": {
            "before": None if before is None else imbalance(before).tolist(),
            "after": imbalance(after).tolist(),
            "lower_bound": bound.tolist(),
        },
        "gpu_loads": {
            "before": None if before is None else before.tolist(),
            "after": after.tolist(),
        },
        **placement.to_dict(),
        **moves,
    }


def write(result: Mapping[str, Any], path: Path) -> None:
    """Writes the plan's file; it appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    partial.write_text(json.dumps(result) + "\n")
    partial.replace(path)


def table(result: Mapping[str, Any]) -> Table:
    """Imbalance before and after over the layers, replicas, moves."""
    settings, figures = result["settings"], result["imbalance"]
    layers, slots = np.shape(result["phy2log"])
    experts = len(result["logcnt"][0])
    out = Table(
        title=f"{settings['policy']}: {experts} experts in {slots} slots of "
        f"{settings['num_gpus']} GPUs, {layers} layers"
    )
    out.add_column("fullest / mean load of a GPU")
    for name in ("mean of layers", "worst layer"):
        out.add_column(name, justify="right")
    moving = "moves" in result
    for name, what in (
        ("before", "placement in use" if moving else "each expert once, in order"),
        ("after", "this plan"),
        ("lower_bound", "lower bound"),
    ):
        values = figures[name]
        shown = ("-", "-") if values is None else (f"{f(values):.3f}" for f in (np.mean, np.max))
        out.add_row(what, *shown)
    counts = np.array(result["logcnt"])
    out.add_section()
    out.add_row("replicas of an expert", f"{counts.mean():.2f}", str(counts.max()))
    if moving:
        moves = np.bincount([move[0] for move in result["moves"]], minlength=layers)
        out.add_row("slots that change", f"{moves.mean():.1f}", str(moves.max()))
    return out


def plot(result: Mapping[str, Any], path: Path) -> Path:
    """Draws the load of every GPU in every layer, before and after."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    panels = {
        name: _relative(np.array(loads))
        for name, loads in result["gpu_loads"].items()
        if loads is not None
    }
    top = max(values.max() for values in panels.values())
    figure, axes = plt.subplots(
        1,
        len(panels),
        figsize=(5 * len(panels), 4),
        sharey=True,
        squeeze=False,
        layout="constrained",
    )
    for axis, (name, values) in zip(axes[0], panels.items(), strict=True):
        image = axis.imshow(values, aspect="auto", cmap="viridis", vmin=0, vmax=top)
        mean, worst = values.max(axis=1).mean(), values.max()
        axis.set(title=f"{name}: fullest / mean {mean:.3f}, worst layer {worst:.3f}", xlabel="GPU")
    axes[0, 0].set_ylabel("layer")
    figure.colorbar(image, ax=axes, label="load of the GPU / mean of the layer")
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=120)
    plt.close(figure)
    return path


def _relative(loads: np.ndarray) -> np.ndarray:
    mean = loads.mean(axis=1, keepdims=True)
    return np.divide(loads, mean, out=np.ones_like(loads), where=mean > 0)
