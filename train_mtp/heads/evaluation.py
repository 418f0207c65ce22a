"""Figures of draft heads on held-out text, teacher-forced: cheap, and the same for every run.

What speculation really gains is measured by decoding (`train_mtp.acceptance`).
"""

import functools
from collections.abc import Callable, Mapping
from typing import Any

import jax
import numpy as np

from dskjax.params import Params
from train_mtp.evaluation import HeldOut
from train_mtp.heads.recipe import HeadsRecipe
from train_mtp.heads.step import teach
from train_mtp.heads.sums import HeadSums, head_metrics, head_sums
from train_mtp.step import place_batch


@functools.partial(jax.jit, static_argnames=("recipe",))
def _sums(heads: Params, frozen: Params, batch: Any, *, recipe: HeadsRecipe) -> HeadSums:
    with recipe.matmul_precision():
        taught = teach(frozen, batch, recipe=recipe)
        return head_sums(heads, frozen, batch, taught, recipe=recipe)


def evaluate_heads(
    heads: Params,
    frozen: Params,
    kinds: Mapping[str, HeldOut],
    recipe: HeadsRecipe,
    *,
    on_batch: Callable[[], Any] = lambda: None,
) -> dict[str, dict[str, Any]]:
    """Metrics (`train_mtp.heads.sums.head_metrics`) of each kind, and of "all" together.

    Args:
        heads: masters, `mtp_layers`.
        frozen: params of the trunk.
        kinds: held-out text.
        recipe: of the run.
        on_batch: called after each batch.
    """
    totals: dict[str, HeadSums] = {}
    for kind, held_out in kinds.items():
        for batch in held_out.batches:
            placed = place_batch(batch, recipe.sharding)
            sums = jax.device_get(_sums(heads, frozen, placed, recipe=recipe))
            wide = jax.tree.map(lambda x: np.asarray(x, np.float64), sums)
            old = totals.get(kind)
            totals[kind] = wide if old is None else jax.tree.map(np.add, old, wide)
            on_batch()
    if len(totals) > 1:
        totals["all"] = jax.tree.map(lambda *parts: sum(parts), *totals.values())
    return {kind: _plain(head_metrics(total, recipe)) for kind, total in totals.items()}


def _plain(metrics: Mapping[str, Any]) -> dict[str, Any]:
    return {name: np.asarray(value).tolist() for name, value in metrics.items()}
