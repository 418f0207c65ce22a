"""An Orbax folder of params as a source of weights; one layer is on the host at a time."""

import contextlib
import functools
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from dskjax.checkpoint import names
from dskjax.checkpoint.hf import load_config
from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.orbax_index import ACTIVATIONS, Index
from dskjax.checkpoint.part_files import PartReader
from dskjax.checkpoint.parts import Part, parts_of, place_of
from dskjax.checkpoint.recast import Change
from dskjax.checkpoint.resume import fingerprint
from dskjax.checkpoint.safetensors import CheckpointError, Pending, SafetensorsFile, numpy_dtype
from dskjax.checkpoint.weights import EMBEDDING, Codes, HostWeight, LeafInfo, is_int4
from dskjax.model import param_specs
from dskjax.params import named_leaves
from pallas_kernels.quant import QTensor, Weight, dequantise


class OrbaxSource:
    """Weights of an Orbax folder, as they are stored or as floats; a context manager.

    The bytes of a part are compared with their hash in the index before they are used.

    Args:
        folder: the folder.
        change: which weights are wanted as floats, and of which dtype.

    Attributes:
        cfg: the model.
        leaves: what each leaf is.
        file_order: see `weights.WeightSource`.
        copies: tensors that repeat another, and what they repeat, in the files it was made from.

    Raises:
        CheckpointError: the folder is incomplete or damaged.
    """

    file_order = False

    def __init__(self, folder: Path, change: Change):
        self.cfg = load_config(folder)
        self._folder, self._index = folder, Index.read(folder, self.cfg)
        self._parts = {(part.group, part.layer): part for part in parts_of(self.cfg)}
        self._kept: tuple[Part | None, dict[str, Any]] = (None, {})
        self.leaves: Mapping[str, LeafInfo] = self._describe(change)
        aliases = names.aliases(self.cfg)
        self.copies = {name: aliases[name] for name in self._index.copies}
        with contextlib.ExitStack() as stack:
            self._reader = stack.enter_context(PartReader(folder, self._index.leaves))
            self._beside: SafetensorsFile | None = None
            if ACTIVATIONS in self._index.parts:
                self._check(ACTIVATIONS)
                self._beside = stack.enter_context(SafetensorsFile(folder / ACTIVATIONS))
            self._stack = stack.pop_all()

    def __enter__(self) -> "OrbaxSource":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stack.close()

    def activation_scales(self) -> Iterator[Pending]:
        """Scales of activations, which belong to int4 weights that go on as they are."""
        file = self._beside
        if file is None or not any(is_int4(info) for info in self.leaves.values()):
            return
        for name, entry in file.entries.items():
            read = functools.partial(file.read, name)
            yield Pending(name, numpy_dtype(entry.dtype), entry.shape, read)

    def read(self, slot: Slot) -> HostWeight:
        """See `weights.WeightSource`."""
        place, info = place_of(slot), self.leaves[slot.leaf]
        weight = self._part(self._parts[place.group, place.layer])[place.name][place.index or ...]
        if info.kind is not None:
            return Codes(weight.values, weight.scales)
        if isinstance(weight, QTensor) or weight.dtype != info.dtype:
            return np.asarray(_as_floats(jax.tree.map(jnp.asarray, weight), info.dtype))
        return weight

    def _part(self, part: Part) -> dict[str, Any]:
        if self._kept[0] != part:
            self._kept = (None, {})  # or there would be two for a while
            self._check(part.name)
            self._kept = (part, self._reader.read(part, None))
        return self._kept[1]

    def _check(self, name: str) -> None:
        if fingerprint(self._folder / name) != self._index.parts[name]:
            raise CheckpointError(
                f"{self._folder / name}: the bytes of this part are not those that were written "
                "(SHA-256 differs): it is damaged, copy it again"
            )

    def _describe(self, change: Change) -> dict[str, LeafInfo]:
        default, out = self._index.leaves[EMBEDDING].dtype, {}
        for leaf, spec in named_leaves(param_specs(self.cfg)):
            info = self._index.leaves[leaf]
            if info.kind is not None and change.keeps(leaf, info.kind):
                out[leaf] = info
                continue
            quantised = info.kind is not None
            dtype = change.float_dtype(
                leaf, spec, default if quantised else info.dtype, quantised=quantised
            )
            out[leaf] = LeafInfo(shape=spec.shape, kind=None, dtype=dtype)
        return out


@functools.partial(jax.jit, static_argnames="dtype")
def _as_floats(weight: Weight, dtype: Any) -> jax.Array:
    return dequantise(weight, dtype)
