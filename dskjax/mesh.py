"""The device mesh and the named sets of rules: the only place that knows the mesh axes.

Physical axes are `dp`, `ep` and `tp`; their product is the device count. Axis types are always
given (`Auto`: XLA propagates shardings from the constraints that model code places), because JAX's
default has changed before.
"""

import math
from collections.abc import Sequence
from typing import Any

import jax
from jax.sharding import AxisType, Mesh

from dskjax.axes import Rules, Sharding

AXES = ("dp", "ep", "tp")

_WIDTHS = {"heads": "tp", "mlp": "tp", "vocab": "tp"}
_RULES = {
    "replicated": Rules.make({}),
    "data": Rules.make({"batch": ("dp", "ep")}),
    "fsdp": Rules.make(
        {"batch": ("dp", "ep"), "embed": ("dp", "ep"), "expert_embed": ("dp", "ep")}
    ),
    "tensor": Rules.make({"batch": ("dp", "ep")} | _WIDTHS),
    "train": Rules.make(
        {"batch": ("dp", "ep"), "embed": ("dp", "ep"), "experts": "ep", "expert_embed": "dp"}
        | _WIDTHS
    ),
    "decode": Rules.make({"batch": ("dp", "ep"), "experts": "ep"} | _WIDTHS),
    "prefill": Rules.make(
        {"heads": ("ep", "tp"), "experts": "ep", "mlp": "tp", "vocab": ("ep", "tp")}
    ),
    "prefill_rows": Rules.make(
        {"heads": ("ep", "tp"), "experts": "ep", "mlp": "tp", "vocab": ("ep", "tp")}
        | {"residual": ("ep", "tp")}
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
    `train`: fsdp and tensor together, experts over ep. `decode`: every rank of dp and ep has
    sequences and a cache of its own, experts over ep, widths over tp. `prefill`: all ranks work on
    the same sequences, heads over ep and tp, experts over ep and each expert's width over tp.
    `prefill_rows`: the same with the residual stream split by rows over ep and tp, so that its
    norms work on a device's share: reduce-scatters and all-gathers in the place of all-reduces (on
    CPUs, where XLA has no such pass, all-reduces whose result is cut).

    Raises:
        ValueError: unknown name; the message lists the known ones.
    """
    if name not in _RULES:
        raise ValueError(f"unknown sharding preset {name!r}; choose one of {', '.join(_RULES)}")
    return Sharding(mesh, _RULES[name])


def sharding_of(mesh: str, rules: str) -> Sharding | None:
    """Mesh and rules by name; None on one device.

    Args:
        mesh: like "dp=4,tp=2", on the first devices; all devices on dp if empty.
        rules: name of a preset.

    Raises:
        ValueError: a mesh that cannot be read or wants more devices than there are; unknown rules.
    """
    devices, sizes = jax.devices(), parse_mesh(mesh)
    if sizes:
        made = make_mesh(**sizes, devices=devices[: math.prod(sizes.values())])
    else:
        made = make_mesh(dp=len(devices))
    return None if made.size == 1 else preset(rules, made)


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
