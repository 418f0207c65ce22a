"""An op done for several layers in one program, as a model does: for ops without a layer index."""

from collections.abc import Callable, Sequence
from typing import Any

import jax


def one_by_one(run: Callable[[Any], Any], inputs: Sequence[Any]) -> list[Any]:
    """The results for each input; none is begun before the ones before it are done."""
    results: list[Any] = []
    for this in inputs:
        # Or XLA would fuse small operations of layers that a model does not have at the same time.
        this, results = jax.lax.optimization_barrier((this, results))
        results.append(run(this))
    return results
