"""Which slot ("physical expert") computes a row's choice of a logical expert, and the two maps that
say so; see `dskjax.eplb` for how experts come to have several slots.
"""

from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Int, Int32

from dskjax.config import MoeConfig
from dskjax.eplb import Placement


def physical(
    experts: Int[Array, "T K"], replicas: Int[Array, "E most"], counts: Int[Array, " E"]
) -> Int[Array, "T K"]:
    """Slots of the chosen experts: row t takes replica t modulo their number.

    So rows that choose an expert spread over its replicas, and the same rows always the same way.

    Args:
        experts: logical ids; -1 is none and stays -1.
        replicas: slots of each expert, padded with -1.
        counts: replicas of each expert, at least 1.
    """
    known = jnp.maximum(experts, 0)
    row = jnp.arange(experts.shape[0], dtype=jnp.int32)[:, None]
    return jnp.where(experts >= 0, replicas[known, row % counts[known]], -1)


def default_plan(layers: int, moe: MoeConfig) -> Int32[np.ndarray, "L P"]:
    """The expert in each slot when nobody planned: slot p holds expert p modulo their number, so
    that the redundant slots repeat the first experts.
    """
    row = np.arange(moe.num_slots, dtype=np.int32) % moe.n_routed_experts
    return np.tile(row, (layers, 1))


def check_plan(phy2log: Any, layers: int, moe: MoeConfig, name: str) -> Int32[np.ndarray, "L P"]:
    """The experts in the slots of some layers, if they are a plan for this model.

    Args:
        phy2log: [L, P].
        layers: L.
        moe: the experts.
        name: of the plan, for errors.

    Raises:
        ValueError: another shape, no integers, an id that is no expert, or an expert without slot.
    """
    found = np.asarray(phy2log)
    if found.shape != (layers, moe.num_slots) or found.dtype.kind != "i":
        raise ValueError(
            f"{name}: a plan of {found.dtype} {found.shape}; expected integers "
            f"{(layers, moe.num_slots)}, an expert for each slot of each layer"
        )
    experts = moe.n_routed_experts
    if found.min() < 0 or found.max() >= experts:
        wrong = found.min() if found.min() < 0 else found.max()
        raise ValueError(f"{name}: a slot is to hold expert {wrong}; ids are 0..{experts - 1}")
    for layer, row in enumerate(found):
        if (missing := np.setdiff1d(np.arange(experts), row)).size:
            raise ValueError(
                f"{name}: no slot of layer {layer} holds expert {missing[0]}; each needs one"
            )
    return found.astype(np.int32)


def tables(phy2log: Int[np.ndarray, "L P"], moe: MoeConfig) -> dict[str, np.ndarray]:
    """The maps of a layer's `Experts`, stacked: `replicas` i32 [L, E, 1 + redundant] and
    `replica_counts` i32 [L, E].
    """
    placement = Placement.of(phy2log, moe.n_routed_experts)
    slots = placement.log2phy
    padding = 1 + moe.num_redundant_experts - slots.shape[2]
    padded = np.pad(slots, ((0, 0), (0, 0), (0, padding)), constant_values=-1)
    return {"replicas": padded, "replica_counts": placement.logcnt}


def plan_of(maps: dict[str, Any], moe: MoeConfig, name: str) -> Int32[np.ndarray, "L P"]:
    """The expert in each slot, read from the maps of `tables`.

    Raises:
        ValueError: the maps do not name every slot once; the message has the layer and the slot.
    """
    replicas, counts = (np.asarray(jax.device_get(maps[key])) for key in _MAPS)
    used = np.arange(replicas.shape[2]) < counts[:, :, None]
    out = np.full((len(replicas), moe.num_slots), -1, np.int32)
    for layer, (row, mine) in enumerate(zip(replicas, used, strict=True)):
        expert, nth = np.nonzero(mine)
        times = np.bincount(row[expert, nth].clip(0), minlength=moe.num_slots)
        if (wrong := np.flatnonzero(times != 1)).size or row[mine].min() < 0:
            slot = wrong[0] if wrong.size else -1
            raise ValueError(
                f"{name}: the maps of layer {layer} name slot {slot} {times[slot]} times; each "
                f"of the {moe.num_slots} slots holds one expert"
            )
        out[layer, row[expert, nth]] = expert
    return out


_MAPS = ("replicas", "replica_counts")
