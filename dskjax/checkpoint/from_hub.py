"""A Hugging Face folder as a source of weights, each read from its file when its turn comes."""

import contextlib
import dataclasses
import os
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from types import TracebackType

import numpy as np

from dskjax.checkpoint import inventory, names, schemes, sources
from dskjax.checkpoint.hf import load_config, stored_dtype
from dskjax.checkpoint.names import Slot
from dskjax.checkpoint.recast import Change
from dskjax.checkpoint.safetensors import Pending, numpy_dtype
from dskjax.checkpoint.shards import Shards
from dskjax.checkpoint.stored import Stored
from dskjax.checkpoint.weights import Codes, HostWeight, LeafInfo
from dskjax.model import param_specs
from dskjax.params import WeightSpec, named_leaves

_CHUNK = 8 << 20  # bytes of memory that a thread takes, unless a single row takes more


class HubSource:
    """Weights of a Hugging Face folder, as they are stored or as floats; a context manager.

    Args:
        folder: the folder.
        change: which weights are wanted as floats, and of which dtype.

    Attributes:
        cfg: the model.
        leaves: what each leaf is.
        file_order: see `weights.WeightSource`.
        copies: tensors that repeat another, by name.

    Raises:
        CheckpointError, NotImplementedError: as `load_hf`.
    """

    file_order = True

    def __init__(self, folder: Path, change: Change):
        cfg, scheme = load_config(folder), schemes.of_folder(folder)
        self._change = change
        with contextlib.ExitStack() as stack:
            self._shards = stack.enter_context(Shards(folder))
            self.cfg = inventory.without_absent_mtp(self._shards, cfg)
            plan = inventory.plan(self._shards, self.cfg, scheme)
            dtype = stored_dtype(self._shards)
            if change.dtype is None:
                inventory.warn_of_narrowing(self._shards, self.cfg, plan, dtype)
            self._specs = dict(named_leaves(param_specs(self.cfg)))
            self.leaves: Mapping[str, LeafInfo] = {
                leaf: self._describe(leaf, weights, dtype) for leaf, weights in plan.items()
            }
            self._stored = {
                (leaf, stored.slot.index): stored for leaf, of in plan.items() for stored in of
            }
            threads = min(8, len(os.sched_getaffinity(0)))
            self._pool = stack.enter_context(ThreadPoolExecutor(threads))
            self._stack = stack.pop_all()

    def __enter__(self) -> "HubSource":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stack.close()

    @property
    def copies(self) -> dict[str, Slot]:
        """Tensors that repeat another, and what they repeat."""
        return {n: slot for n, slot in names.aliases(self.cfg).items() if n in self._shards}

    def activation_scales(self) -> Iterator[Pending]:
        """Scales of activations, which belong to int4 weights that go on as they are."""
        for stored in self._stored.values():
            if stored.form == "int8" and self.leaves[stored.slot.leaf].kind is not None:
                for name in stored.unused:
                    entry = self._shards.entry(name)
                    read = lambda name=name: self._shards.read(name)  # noqa: E731
                    yield Pending(name, numpy_dtype(entry.dtype), entry.shape, read)

    def read(self, slot: Slot) -> HostWeight:
        """See `weights.WeightSource`."""
        stored, inner = self._find(slot)
        info = self.leaves[slot.leaf]
        if info.kind is not None:
            if stored.declared is not None:
                sources.check_declared(self._shards, stored)
            codes, scales = (of(self._shards, stored) for of in (sources.codes, sources.scales))
            return Codes(self._rows(codes), self._rows(scales))
        if stored.form != "plain":
            return self._rows(sources.dequantised(self._shards, stored, info.dtype))
        shape = info.shape[len(stored.slot.index) :]
        source = sources.plain(self._shards, stored.values, shape, info.dtype)
        if not inner:
            return self._rows(source)
        fused = self._rows(source, inner[0], inner[0] + 1)  # experts of transformers 5
        return fused[(0, *inner[1:])]

    def _find(self, slot: Slot) -> tuple[Stored, tuple[int, ...]]:
        for depth in range(len(slot.index), -1, -1):
            if stored := self._stored.get((slot.leaf, slot.index[:depth])):
                return stored, slot.index[depth:]
        raise AssertionError(slot)

    def _rows(self, source: sources.Source, start: int = 0, stop: int | None = None) -> np.ndarray:
        stop = source.shape[0] if stop is None else stop
        out = np.empty((stop - start, *source.shape[1:]), source.dtype)
        step = max(1, _CHUNK // max(1, source.row_cost))

        def fill(first: int) -> None:
            last = min(first + step, stop)
            source.fill(first, last, out[first - start : last - start])

        list(self._pool.map(fill, range(start, stop, step)))
        return out

    def _describe(self, leaf: str, weights: list[Stored], default: np.dtype) -> LeafInfo:
        spec, kinds = self._specs[leaf], {stored.kind for stored in weights}
        codes = kinds - {None}
        if codes and all(self._change.keeps(leaf, kind) for kind in kinds):
            inventory.check_kept(self._shards, self.cfg, weights)
            return self._describe_codes(spec, weights)
        dtype = self._change.float_dtype(leaf, spec, default, quantised=bool(codes))
        return LeafInfo(shape=spec.shape, kind=None, dtype=dtype)

    def _describe_codes(self, spec: WeightSpec, weights: list[Stored]) -> LeafInfo:
        first = weights[0]
        info = LeafInfo(
            shape=spec.shape, kind=first.kind, dtype=sources.codes(self._shards, first).dtype
        )
        scales = {self._shards.entry(stored.scales or "").dtype for stored in weights}
        if len(scales) == 1 and first.form != "row_pairs":
            info = dataclasses.replace(info, scale_dtype=numpy_dtype(scales.pop()))
        declared = {self._shards.entry(s.declared).dtype for s in weights if s.declared is not None}
        if len(declared) == 1:
            info = dataclasses.replace(info, declared_dtype=numpy_dtype(declared.pop()))
        return info
