"""Local search on placements: exchanges that make the fullest GPU lighter, until none does.

Two kinds of exchange are looked at, all of them at once, for all layers together:

    swap   a slot of the fullest GPU and one of another GPU swap their experts
    spare  a slot of another GPU gives up its expert, which has more replicas, for one more replica
           of an expert of the fullest GPU, whose replicas all become lighter

No exchange puts two replicas of an expert on one GPU. Every exchange leaves all GPUs that it
touches lighter than the fullest one was, so the sorted loads fall and the search ends.
"""

import dataclasses
import itertools

import numpy as np
from jaxtyping import Bool, Float64, Int, Int8

from dskjax.eplb.placement import replicas

_PROGRESS = 1e-9
"""Part of the fullest load that an exchange must gain; less is rounding."""
_WORTH = np.array([4, 4, 4, 1, 0.5], np.float32)
"""Value of an exchange's gain if it changes -2 .. 2 slots more: per slot, and best if none."""


def settle(
    phy2log: Int[np.ndarray, "L P"],
    weight: Float64[np.ndarray, "L E"],
    num_gpus: int,
    limit: Float64[np.ndarray, " L"],
    *,
    num_nodes: int = 1,
    origin: Int[np.ndarray, "L P"] | None = None,
    rounds: int | None = None,
) -> Int[np.ndarray, "L P"]:
    """Exchanges until no GPU of a layer is above its limit, or nothing helps there any more.

    Args:
        phy2log: the expert in each slot, to start from.
        weight: loads.
        num_gpus: D.
        limit: load of the fullest GPU that is good enough.
        num_nodes: exchanges stay within a node.
        origin: the experts in place now. With it exchanges are chosen by what they gain per slot
            that differs from it, without it by how light the GPUs become.
        rounds: most exchanges of a layer; None = any number.
    """
    slots = phy2log.copy()
    active = np.arange(len(slots))
    for _ in itertools.count() if rounds is None else range(rounds):
        if not active.size:
            break
        state = _State.of(slots[active], weight[active], num_gpus, num_nodes)
        after = np.stack([_after_swap(state), _after_spare(state)], axis=1)
        fullest = state.fullest[:, None, None, None]
        better = after < fullest * (1 - _PROGRESS)
        if origin is None:
            key = np.where(better, after, np.inf)
        else:
            gain = np.maximum(after, limit[active, None, None, None]) - fullest
            key = np.where(better, gain * _WORTH[_costs(state, origin[active]) + 2], np.inf)
        open_ = state.fullest > limit[active]
        slots[active], moved = _apply(state, key, open_)
        active = active[moved]
    return slots


def separate(
    phy2log: Int[np.ndarray, "L P"],
    weight: Float64[np.ndarray, "L E"],
    num_gpus: int,
    *,
    num_nodes: int = 1,
) -> Int[np.ndarray, "L P"]:
    """Swaps away replicas that share a GPU with another one of their expert, as far as one can.

    Of the swaps within the node, the one that leaves the two GPUs lightest is taken.
    """
    slots = phy2log.copy()
    active = np.arange(len(slots))
    while active.size:
        state = _State.of(slots[active], weight[active], num_gpus, num_nodes, crowded=True)
        double = state.held(state.copies) > 1
        key = np.where(double[:, None, :, None], _after_swap(state)[:, None], np.inf)
        slots[active], moved = _apply(state, key, double.any(axis=1))
        active = active[moved]
    return slots


@dataclasses.dataclass(frozen=True, kw_only=True)
class _State:
    """One round's facts: n layers, S slots a GPU; "held" are the experts of the GPU to relieve."""

    slots: Int[np.ndarray, "n P"]
    gpu: Int[np.ndarray, " P"]
    loads: Float64[np.ndarray, "n P"]  # of the slot's GPU
    weight: Float64[np.ndarray, "n P"]  # of the slot's expert
    count: Int[np.ndarray, "n P"]  # replicas of it
    copies: Int[np.ndarray, "n P"]  # of these, on the slot's GPU
    fullest: Float64[np.ndarray, " n"]  # load of the GPU to relieve
    at: Int[np.ndarray, "n S"]  # slots of it
    same: Bool[np.ndarray, "n S P"]  # whether a slot holds a held expert
    legal: Bool[np.ndarray, "n S P"]  # the slot is elsewhere on the node, beside no such replica
    num_experts: int

    @classmethod
    def of(
        cls,
        slots: Int[np.ndarray, "n P"],
        weight: Float64[np.ndarray, "n E"],
        num_gpus: int,
        num_nodes: int,
        *,
        crowded: bool = False,
    ) -> "_State":
        """Looks at the fullest GPU or, if crowded, at the one with most replicas of one expert."""
        layers, num_slots = slots.shape
        size = num_slots // num_gpus
        gpu = np.repeat(np.arange(num_gpus), size)
        count = np.take_along_axis(replicas(slots, weight.shape[1]), slots, axis=1)
        weights = np.take_along_axis(weight, slots, axis=1)
        by_gpu = slots.reshape(layers, num_gpus, size)
        copies = (by_gpu[:, :, :, None] == by_gpu[:, :, None, :]).sum(axis=3)
        loads = (weights / count).reshape(layers, num_gpus, size).sum(axis=2)
        full = (copies.max(axis=2) if crowded else loads).argmax(axis=1)
        at = full[:, None] * size + np.arange(size)
        same = np.take_along_axis(slots, at, axis=1)[:, :, None] == slots[:, None, :]
        beside = same.reshape(layers, size, num_gpus, size).any(axis=3).repeat(size, axis=2)
        node = gpu // (num_gpus // num_nodes)
        near = (node == node[at[:, :1]]) & (gpu != full[:, None])
        return cls(
            slots=slots,
            gpu=gpu,
            loads=loads[:, gpu],
            weight=weights,
            count=count,
            copies=copies.reshape(layers, num_slots),
            fullest=loads[np.arange(layers), full],
            at=at,
            same=same,
            legal=near[:, None, :] & ~beside,
            num_experts=weight.shape[1],
        )

    def held(self, values: np.ndarray) -> np.ndarray:
        """Of [n, P], what belongs to the slots of the GPU to relieve, [n, S]."""
        return np.take_along_axis(values, self.at, axis=1)


def _apply(
    state: _State, key: Float64[np.ndarray, "n kinds S P"], open_: Bool[np.ndarray, " n"]
) -> tuple[Int[np.ndarray, "n P"], Bool[np.ndarray, " n"]]:
    """The slots after the exchange with the least key, and which layers have one.

    Args:
        state: before.
        key: of swaps and, if there are two kinds, of spares; inf is none.
        open_: layers that want one.
    """
    flat = key.reshape(len(key), -1)
    best = flat.argmin(axis=1)
    moved = open_ & np.isfinite(flat[np.arange(len(flat)), best])
    rows = np.flatnonzero(moved)
    kind, held, other = np.unravel_index(best[rows], key.shape[1:])
    mine = state.at[rows, held]
    slots = state.slots.copy()
    slots[rows, other] = state.slots[rows, mine]
    swap = kind == 0
    slots[rows[swap], mine[swap]] = state.slots[rows[swap], other[swap]]
    return slots, moved


def _after_swap(state: _State) -> Float64[np.ndarray, "n S P"]:
    """Load of the fuller of the two GPUs after each swap; inf where it is not legal."""
    share = state.weight / state.count
    held = state.held(share)[:, :, None]
    left = (state.fullest[:, None, None] - held) + share[:, None, :]
    after = np.maximum(left, (state.loads - share)[:, None, :] + held)
    comes_double = state.same.any(axis=1, keepdims=True)
    return np.where(state.legal & ~comes_double, after, np.inf)


def _after_spare(state: _State) -> Float64[np.ndarray, "n S P"]:
    """The largest load of the GPUs that are touched after a slot went to a held expert, or inf.

    It is never too low: that a GPU may hold both experts is left out.
    """
    weight, count = state.held(state.weight), state.held(state.count)
    share = weight / (count + 1)
    here = state.fullest[:, None] - weight / count + share
    left = np.maximum(state.count - 1, 1)
    rise = state.weight / left - state.weight / state.count
    risen = state.loads + state.copies * rise
    there = (risen - state.weight / left)[:, None, :] + share[:, :, None]
    elsewhere = np.where(state.count > 1, _most_elsewhere(risen, state), np.inf)
    after = np.maximum(np.maximum(there, here[:, :, None]), elsewhere[:, None, :])
    return np.where(state.legal, after, np.inf)


def _most_elsewhere(
    values: Float64[np.ndarray, "n P"], state: _State
) -> Float64[np.ndarray, "n P"]:
    """The largest value among the slots with the same expert on other GPUs; -inf if there is none.

    Slots of one expert on one GPU have the same value.
    """
    order = np.argsort(values, axis=1, kind="stable")
    rows = np.arange(len(order))[:, None]
    experts, gpus = state.slots[rows, order], state.gpu[order]
    ascending = np.take_along_axis(values, order, axis=1)
    most = np.full((len(order), state.num_experts), -np.inf)
    second, where = most.copy(), np.full(most.shape, -1)
    # Of assignments to one place the last one stays, which is the largest value.
    most[rows, experts], where[rows, experts] = ascending, gpus
    row, rest = np.nonzero(gpus != where[rows, experts])
    second[row, experts[row, rest]] = ascending[row, rest]
    mine = where[rows, state.slots] == state.gpu
    return np.where(mine, second[rows, state.slots], most[rows, state.slots])


def _costs(state: _State, origin: Int[np.ndarray, "n P"]) -> Int8[np.ndarray, "n kinds S P"]:
    """By how many more slots than now each exchange differs from the origin, -2 to 2."""
    changed = (state.slots != origin).astype(np.int8)
    comes = (state.held(state.slots)[:, :, None] != origin[:, None, :]).astype(np.int8)
    goes = (state.slots[:, None, :] != state.held(origin)[:, :, None]).astype(np.int8)
    spare = comes - changed[:, None, :]
    return np.stack([spare + goes - state.held(changed)[:, :, None], spare], axis=1)
