"""The device mesh and the named sets of rules: the only place that knows the mesh axes.

Physical axes are `dp`, `ep` and `tp`; their product is the device count. Axis types are always
given (`Auto`: XLA propagates shardings from the constraints that model code places), because JAX's
default has changed before.
"""

from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from dskjax.axes import Rules, Sharding

AXES = ("dp", "ep", "tp")

_RULES = {
    "replicated": Rules.make({}),
    "data": Rules.make({"batch": ("dp", "ep")}),
    "fsdp": Rules.make({"batch": ("dp", "ep"), "embed": ("dp", "ep")}),
    "tensor": Rules.make({"batch": ("dp", "ep"), "heads": "tp", "mlp": "tp", "vocab": "tp"}),
    "train": Rules.make(
        {"batch": ("dp", "ep"), "embed": ("dp", "ep"), "heads": "tp", "mlp": "tp", "vocab": "tp"}
    ),
}


def make_mesh(
    *, dp: int = 1, ep: int = 1, tp: int = 1, devices: Sequence[Any] | None = None
) -> Mesh:
    """A mesh with axes dp (data), ep (experts) and tp (tensor).

    Args:
        dp: ways of data parallelism.
        ep: ways of expert parallelism.
        tp: ways of tensor parallelism.
        devices: devices to use, all local and remote ones when None.

    Raises:
        ValueError: dp * ep * tp is not the number of devices.
    """
    devices = list(jax.devices() if devices is None else devices)
    if dp * ep * tp != len(devices):
        raise ValueError(
            f"{dp=} * {ep=} * {tp=} = {dp * ep * tp} must equal the device count, {len(devices)}; "
            "on a CPU, --cpu-devices N simulates N devices"
        )
    return jax.make_mesh((dp, ep, tp), AXES, axis_types=(AxisType.Auto,) * 3, devices=devices)


def preset(name: str, mesh: Mesh) -> Sharding:
    """A mesh with named rules.

    `replicated`: nothing is split. `data`: the batch. `fsdp`: the batch, and parameters by their
    embed axis, gathered where they are used. `tensor`: heads, MLP widths and vocabulary over tp.
    `train`: fsdp and tensor together.

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in _RULES:
        raise ValueError(f"unknown sharding preset {name!r}; choose one of {', '.join(_RULES)}")
    return Sharding(mesh, _RULES[name])


def parse_mesh(text: str) -> dict[str, int]:
    """Reads "dp=2,tp=4" into keyword arguments of `make_mesh`.

    Raises:
        ValueError: an unknown axis or a size that is not a positive integer.
    """
    sizes: dict[str, int] = {}
    for part in filter(None, (p.strip() for p in text.split(","))):
        axis, _, size = part.partition("=")
        if axis not in AXES or not size.isdigit() or int(size) < 1:
            raise ValueError(
                f"mesh {text!r}: {part!r} is not AXIS=N with an axis of {', '.join(AXES)} and N "
                ">= 1"
            )
        sizes[axis] = int(size)
    return sizes


def expert_ways(text: str) -> int:
    """How many devices share the experts in a mesh like "dp=2,ep=8"; 1 if it does not say."""
    return parse_mesh(text).get("ep", 1)
