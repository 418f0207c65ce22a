"""What becomes of weights on their way from one folder to another: nothing, or another form."""

import dataclasses
from collections.abc import Mapping

import jax.numpy as jnp
import ml_dtypes
import numpy as np

from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.weights import VALUES, Codes, HostWeight, Kind, LeafInfo, WeightSource
from dskjax.config import ModelConfig
from dskjax.params import WeightSpec
from dskjax.quantise import Precision, quantise_leaf, recipe_of
from pallas_kernels.quant import Recipe

_BF16 = np.dtype(ml_dtypes.bfloat16)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Change:
    """What to change; by default nothing.

    Attributes:
        dtype: of floats that do not fix their own; None leaves it.
        dequantise: make floats of quantized weights.
        precision: quantise to this, as `dskjax.quantise` does.
    """

    dtype: np.dtype | None = None
    dequantise: bool = False
    precision: Precision | None = None

    def recipe(self, leaf: str) -> Recipe | None:
        """How a leaf is to be quantized; None: not at all, or it stays as it is."""
        return None if self.precision is None else recipe_of(leaf.split("."), self.precision)

    def keeps(self, leaf: str, kind: Kind) -> bool:
        """Whether codes of a leaf go on as they are."""
        if self.precision is None:
            return not self.dequantise
        recipe = self.recipe(leaf)
        return recipe is not None and kind == (recipe.format, recipe.block)

    def float_dtype(
        self, leaf: str, spec: WeightSpec, default: np.dtype, *, quantised: bool
    ) -> np.dtype:
        """The dtype in which a leaf is read as floats.

        Args:
            leaf: its name.
            spec: as declared.
            default: what it is when nothing is to be changed.
            quantised: whether any of its weights has codes.
        """
        if quantised and self.recipe(leaf) is not None:
            return _BF16  # as published W4AFP8 checkpoints are made from FP8 ones
        return np.dtype(spec.dtype or self.dtype or default)


class Quantising:
    """Another source's weights, quantized one by one.

    Args:
        source: their floats, and codes that are already as wanted.
        change: with a precision.

    Attributes:
        cfg: the model.
        leaves: what each leaf is.
        file_order: see `weights.WeightSource`.
    """

    def __init__(self, source: WeightSource, change: Change):
        self.cfg: ModelConfig = source.cfg
        self.file_order: bool = source.file_order
        self._source, self._change = source, change
        self.leaves: Mapping[str, LeafInfo] = {
            name: self._describe(name, info) for name, info in source.leaves.items()
        }

    def read(self, slot: Slot) -> HostWeight:
        """See `weights.WeightSource`."""
        weight, recipe = self._source.read(slot), self._change.recipe(slot.leaf)
        if recipe is None or isinstance(weight, Codes):
            return weight
        quantised = quantise_leaf(jnp.asarray(weight), recipe)
        return Codes(np.asarray(quantised.values), np.asarray(quantised.scales))

    def _describe(self, name: str, info: LeafInfo) -> LeafInfo:
        recipe = self._change.recipe(name)
        if recipe is None:
            return info
        # Codes that go on as they are get the scales of this format, whatever they came from.
        return LeafInfo(
            shape=info.shape, kind=(recipe.format, recipe.block), dtype=VALUES[recipe.format]
        )
