"""One part of an Orbax folder of params: from arrays on the host, and to arrays where they belong.

Orbax is imported when a part is read or written: it takes half a second, and most folders are not
of this kind.
"""

import contextlib
from collections.abc import Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import numpy as np

from dskjax.checkpoint.parts import Part, template
from dskjax.checkpoint.safetensors import CheckpointError
from dskjax.checkpoint.weights import Codes, HostWeight, LeafInfo
from dskjax.params import named_leaves, tree_of
from pallas_kernels.quant import QTensor

_CHUNK_BYTES = 64 << 20
_MANIFEST, _MANIFEST_BEGINS = "manifest.ocdbt", bytes.fromhex("0cdb3a2a")
"""The file that Orbax' arrays hang on, and how every one begins (TensorStore, OCDBT format)."""


@contextlib.contextmanager
def as_checkpoint_error(place: Path) -> Iterator[None]:
    """Turns whatever Orbax raises in the block into a CheckpointError that names the place."""
    try:
        yield
    except Exception as error:  # for a damaged file Orbax raises whatever it likes, even Exception
        raise CheckpointError(f"{place}: cannot be restored ({str(error)[:300]})") from error


def check_manifest(path: Path) -> None:
    """Raises CheckpointError unless what the arrays in a folder of Orbax' hang on can be that.
    Without it Orbax begins to read every array, gives up at the first, and the others complain.
    """
    with (path / _MANIFEST).open("rb") as file:
        if file.read(len(_MANIFEST_BEGINS)) != _MANIFEST_BEGINS:
            raise CheckpointError(f"{_MANIFEST} is no manifest")


def write_part(path: Path, weights: Mapping[str, HostWeight]) -> None:
    """Writes a part that does not exist yet; it appears complete or not at all.

    Args:
        path: its folder.
        weights: by their names inside the part.
    """
    import orbax.checkpoint as ocp

    tree = tree_of({name: _plain(weight) for name, weight in weights.items()})
    options = jax.tree.map(lambda _: ocp.SaveArgs(chunk_byte_size=_CHUNK_BYTES), tree)
    types = ocp.type_handlers.create_type_handler_registry(
        # Or there would be a copy of every array.
        (np.ndarray, ocp.type_handlers.NumpyHandler(deepcopy_host_arrays=False)),
        (jax.Array, ocp.type_handlers.ArrayHandler()),  # none is written, but it warns without
    )
    handler = ocp.PyTreeCheckpointHandler(use_compression=False, type_handler_registry=types)
    with ocp.Checkpointer(handler) as writer:
        writer.save(path, args=ocp.args.PyTreeSave(tree, save_args=options))


class PartReader:
    """Reads parts of one folder; a context manager.

    Args:
        folder: of the parts.
        leaves: what each leaf is.
    """

    def __init__(self, folder: Path, leaves: Mapping[str, LeafInfo]):
        self._folder, self._leaves = folder, leaves
        import orbax.checkpoint as ocp

        self._orbax = ocp.Checkpointer(ocp.PyTreeCheckpointHandler())

    def __enter__(self) -> "PartReader":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._orbax.close()

    def shapes(self, part: Part) -> dict[str, Any]:
        """Shapes and dtypes of the weights of a part: `parts.template` of each."""
        return {
            name: template(spec.shape, self._leaves[part.leaf(name)])
            for name, spec in part.specs.items()
        }

    def read(self, part: Part, shardings: Mapping[str, Any] | None) -> dict[str, Any]:
        """The weights of a part by their names inside it.

        Args:
            part: which.
            shardings: where each weight goes; of a QTensor, a QTensor of two shardings. None: all
                are NumPy arrays on the host.

        Raises:
            CheckpointError: Orbax cannot read the part, or it holds something else than it should;
                names the part.
        """
        import orbax.checkpoint as ocp

        path, wanted = self._folder / part.name, self.shapes(part)
        self._check(path, wanted)
        if shardings is not None:
            wanted = {n: jax.tree.map(_placed, w, shardings[n]) for n, w in wanted.items()}
        plain = tree_of({name: _plain(weight) for name, weight in wanted.items()})
        if shardings is None:
            options = jax.tree.map(lambda _: ocp.RestoreArgs(restore_type=np.ndarray), plain)
        else:
            options = ocp.checkpoint_utils.construct_restore_args(plain)
        args = ocp.args.PyTreeRestore(plain, restore_args=options)
        with as_checkpoint_error(path):
            found = dict(named_leaves(self._orbax.restore(path, args=args)))
        return {name: _weight(weight, found, name) for name, weight in wanted.items()}

    def _check(self, path: Path, wanted: Mapping[str, Any]) -> None:
        with as_checkpoint_error(path):
            check_manifest(path)
            tree = getattr(self._orbax.metadata(path).item_metadata, "tree", None)
            if tree is None:
                raise CheckpointError("Orbax finds no arrays in it")
            found = {name: (tuple(m.shape), str(m.dtype)) for name, m in named_leaves(tree)}
        arrays = dict(named_leaves({name: _plain(weight) for name, weight in wanted.items()}))
        for name in sorted(set(found) | set(arrays)):
            expected = (arrays[name].shape, str(arrays[name].dtype)) if name in arrays else None
            if found.get(name) != expected:
                raise CheckpointError(
                    f"{path}: array {name!r}: expected {expected}, found {found.get(name)}"
                )


def _placed(shape: jax.ShapeDtypeStruct, sharding: Any) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(shape.shape, shape.dtype, sharding=sharding)


def _plain(weight: Any) -> Any:
    if isinstance(weight, QTensor | Codes):
        return {"values": weight.values, "scales": weight.scales}
    return weight


def _weight(weight: Any, found: Mapping[str, Any], name: str) -> Any:
    if not isinstance(weight, QTensor):
        return found[name]
    values, scales = found[f"{name}.values"], found[f"{name}.scales"]
    return QTensor(values, scales, weight.block, weight.format)
