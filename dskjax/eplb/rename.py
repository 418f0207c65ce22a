"""Giving a plan's nodes and GPUs the names with which it shares most with the placement in use.

All GPUs of a node are alike, and so are all nodes, so a plan is as good under any names.
"""

import numpy as np
from jaxtyping import Float, Float32, Int

from dskjax.eplb.placement import replicas


def renamed(
    now: Int[np.ndarray, "L P"],
    plan: Int[np.ndarray, "L P"],
    num_experts: int,
    num_gpus: int,
    num_nodes: int,
) -> Int[np.ndarray, "L P"]:
    """The plan with its nodes, and the GPUs of each, renamed to have most experts where they are.

    Args:
        now: the experts in place.
        plan: the experts to place.
        num_experts: E.
        num_gpus: D.
        num_nodes: N; 1 if a GPU may get the name of any other.
    """
    layers, size = len(now), num_gpus // num_nodes
    shared = _shared(now, plan, num_experts, num_gpus)
    pairs = shared.reshape(layers, num_nodes, size, num_nodes, size).transpose(0, 1, 3, 2, 4)
    inner = match(pairs.reshape(-1, size, size)).reshape(layers, num_nodes, num_nodes, size)
    kept = np.take_along_axis(pairs, inner[..., None], axis=4)[..., 0].sum(axis=3)
    node = match(kept)
    inside = np.take_along_axis(inner, node[:, :, None, None], axis=2)[:, :, 0]
    gpu = (node[:, :, None] * size + inside).reshape(layers, num_gpus, 1)
    return np.take_along_axis(plan.reshape(layers, num_gpus, -1), gpu, axis=1).reshape(now.shape)


def match(score: Float[np.ndarray, "X n n"]) -> Int[np.ndarray, "X n"]:
    """A column for each row, none twice, with a large sum of scores.

    The largest scores are taken first, then pairs of rows swap columns until no swap helps.
    """
    layers = np.arange(len(score))
    size = score.shape[1]
    column = np.empty(score.shape[:2], np.int64)
    left = score.copy()
    for _ in range(size):
        row, taken = np.divmod(left.reshape(len(score), -1).argmax(axis=1), size)
        column[layers, row] = taken
        left[layers, row, :] = left[layers, :, taken] = -np.inf
    while True:
        given = np.take_along_axis(score, column[:, None, :], axis=2)  # [row, whose column]
        own = np.diagonal(given, axis1=1, axis2=2)
        gain = given + given.transpose(0, 2, 1) - own[:, :, None] - own[:, None, :]
        flat = gain.reshape(len(score), -1)
        best = flat.argmax(axis=1)
        rows = np.flatnonzero(flat[layers, best] > 0)
        if not rows.size:
            return column
        a, b = np.divmod(best[rows], size)
        column[rows, a], column[rows, b] = column[rows, b], column[rows, a]


def stay(
    now: Int[np.ndarray, "L P"], plan: Int[np.ndarray, "L P"], num_gpus: int
) -> Int[np.ndarray, "L P"]:
    """The plan with the slots of each GPU in the order that keeps experts in their slots."""
    old, new = (slots.reshape(len(slots) * num_gpus, -1) for slots in (now, plan))
    rows = np.arange(len(old))
    out = np.full_like(old, -1)
    used = np.zeros(new.shape, bool)
    for slot in range(old.shape[1]):
        found = (new == old[:, slot, None]) & ~used
        hit = found.any(axis=1)
        out[hit, slot] = old[hit, slot]
        used[rows[hit], found.argmax(axis=1)[hit]] = True
    out[out < 0] = new[~used]
    return out.reshape(now.shape)


def _shared(
    now: Int[np.ndarray, "L P"], plan: Int[np.ndarray, "L P"], num_experts: int, num_gpus: int
) -> Float32[np.ndarray, "L D D"]:
    """Replicas that GPU i of `now` and GPU j of the plan have in common."""
    held, wanted = (
        replicas(slots.reshape(len(slots) * num_gpus, -1), num_experts).reshape(
            len(slots), num_gpus, num_experts
        )
        for slots in (now, plan)
    )
    out = np.zeros((len(now), num_gpus, num_gpus), np.float32)
    for times in range(1, int(min(held.max(), wanted.max())) + 1):
        a, b = ((counts >= times).astype(np.float32) for counts in (held, wanted))
        out += a @ b.transpose(0, 2, 1)
    return out
