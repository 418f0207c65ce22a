"""Training states on disk, by Orbax: sharded, asynchronous, atomic, resumed bit for bit.

A state is any pytree of JAX arrays (params, optimiser state, keys, counters). Its leaves are
stored under dotted names, beside a manifest of their shapes and dtypes and a JSON object of the
caller's (say, the position in the data). Restoring checks the manifest first: Orbax by itself casts
to another dtype without a word. For exchange with other programs see `hf`.
"""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from types import TracebackType
from typing import Any

import jax
import jax.numpy as jnp
import orbax.checkpoint as ocp

from dskjax.checkpoint.part_files import as_checkpoint_error, check_manifest
from dskjax.checkpoint.safetensors import CheckpointError

_STATE, _MANIFEST = "state", "manifest"
_UNFINISHED = "*.orbax-checkpoint-tmp*"
_MIN_SLICE = 1 << 20  # replicas share the writing of arrays from this many bytes each; it compiles


def save(path: str | Path, state: Any, extra: Mapping[str, Any] | None = None) -> None:
    """Writes one state to a new folder and waits for it; the folder appears complete or not at all.

    Args:
        path: folder to make.
        state: pytree of JAX arrays.
        extra: a JSON object to keep with it.

    Raises:
        FileExistsError: `path` exists.
        ValueError: a leaf is not a JAX array, or `extra` is not JSON.
    """
    place = Path(path).resolve()
    if place.exists():
        raise FileExistsError(f"{place} exists already; choose another path or remove it")
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(handler_registry=_handlers())) as writer:
        writer.save(place, args=_save_args(state, extra))


def restore(path: str | Path, like: Any) -> tuple[Any, dict[str, Any]]:
    """Reads a state that `save` wrote.

    Args:
        path: its folder.
        like: pytree of arrays or `jax.ShapeDtypeStruct` with the structure, shapes and dtypes of
            the state. Leaves go where their `sharding` says, without one to the first device.

    Returns:
        The state, and the JSON object kept with it.

    Raises:
        CheckpointError: no checkpoint, a damaged one, or one of another structure; names the first
            leaf that differs.
    """
    place = Path(path).resolve()
    with ocp.Checkpointer(ocp.CompositeCheckpointHandler(handler_registry=_handlers())) as reader:
        return _restore(place, like, lambda args: reader.restore(place, args=args))


class Store:
    """The checkpoints of a training run: a folder for each saved step, one run writing at a time.

    Saving returns once the state is copied from the devices, so it may be donated right after; the
    files are written meanwhile. A step counts when it is complete: what a killed process leaves
    behind is never restored, and is removed when the next writer saves its first step.

    Args:
        directory: where the steps lie; made if absent.
        keep_last: how many steps to keep; older ones are deleted. None keeps all.
        keep_every: also keep the steps that are multiples of this.
        keep_best: also keep the step with the largest value of this metric, among those that are
            saved with it.
    """

    def __init__(
        self,
        directory: str | Path,
        *,
        keep_last: int | None = 3,
        keep_every: int | None = None,
        keep_best: str | None = None,
    ):
        for name, value in (("keep_last", keep_last), ("keep_every", keep_every)):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be positive or None")
        self.directory = Path(directory).resolve()
        self._swept = False
        self._manager = ocp.CheckpointManager(
            self.directory,
            handler_registry=_handlers(),
            options=_options(keep_last, keep_every, keep_best),
        )

    def __enter__(self) -> "Store":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self.close()

    def steps(self) -> list[int]:
        """The complete steps on disk, oldest first."""
        folders = (path for path in self.directory.iterdir() if path.name.isdigit())
        return sorted(int(p.name) for p in folders if ocp.utils.is_checkpoint_finalized(p))

    def latest(self) -> int | None:
        """The last complete step on disk; None when there is none."""
        return max(self.steps(), default=None)

    def best(self) -> int | None:
        """The complete step with the best metric; None when there is none, or no `keep_best`."""
        self.wait()
        return self._manager.best_step() if self._manager.latest_step() is not None else None

    def save(
        self,
        step: int,
        state: Any,
        extra: Mapping[str, Any] | None = None,
        metrics: Mapping[str, float] | None = None,
    ) -> None:
        """Starts to write a step; first waits for the one before.

        Args:
            step: its number, higher than all that were saved before.
            state: pytree of JAX arrays.
            extra: a JSON object to keep with it.
            metrics: figures of the step, with `keep_best` among them if it is to compete.

        Raises:
            ValueError: the step is not after the last one, a leaf is not a JAX array, or `extra` is
                not JSON. A failure to write raises here or in `wait`, whichever comes first.
        """
        args = _save_args(state, extra)
        self.wait()
        latest = self.latest()
        if latest is not None and step <= latest:
            raise ValueError(f"{step=} must come after the last step in {self.directory}, {latest}")
        if not self._swept and jax.process_index() == 0:
            for leftover in self.directory.glob(_UNFINISHED):
                shutil.rmtree(leftover)
        self._swept = True
        saved = self._manager.save(step, args=args, metrics=metrics, force=True)
        assert saved, step

    def restore(self, step: int, like: Any) -> tuple[Any, dict[str, Any]]:
        """Reads a step; arguments, results and errors are those of the function `restore`."""
        self.wait()
        if step not in (found := self.steps()):
            raise CheckpointError(f"{self.directory}: no checkpoint of {step=}; found {found}")
        read = lambda args: self._manager.restore(step, args=args)  # noqa: E731
        return _restore(self.directory / str(step), like, read)

    def wait(self) -> None:
        """Returns when everything is on disk; raises what went wrong while writing."""
        self._manager.wait_until_finished()

    def close(self) -> None:
        """Waits, and frees the threads."""
        self.wait()
        self._manager.close()


def _options(last: int | None, every: int | None, best: str | None) -> ocp.CheckpointManagerOptions:
    if best is None:
        return ocp.CheckpointManagerOptions(max_to_keep=last, keep_period=every)
    kinds = ocp.checkpoint_managers
    metric = lambda metrics: metrics[best]  # noqa: E731
    keep = [
        kinds.LatestN(last),
        kinds.BestN(get_metric_fn=metric, n=1, keep_checkpoints_without_metrics=False),
    ]
    if every is not None:
        keep.append(kinds.EveryNSteps(every))
    policy = kinds.AnyPreservationPolicy(keep)
    return ocp.CheckpointManagerOptions(best_fn=metric, preservation_policy=policy)


def _handlers() -> ocp.handlers.DefaultCheckpointHandlerRegistry:
    arrays = ocp.type_handlers.ArrayHandler(min_slice_bytes_for_replica_parallel=_MIN_SLICE)
    types = ocp.type_handlers.create_type_handler_registry((jax.Array, arrays))
    state = ocp.PyTreeCheckpointHandler(type_handler_registry=types)
    manifest = ocp.JsonCheckpointHandler()
    handlers = ocp.handlers.DefaultCheckpointHandlerRegistry()
    handlers.add(_STATE, ocp.args.PyTreeSave, state)
    handlers.add(_STATE, ocp.args.PyTreeRestore, state)
    handlers.add(_MANIFEST, ocp.args.JsonSave, manifest)
    handlers.add(_MANIFEST, ocp.args.JsonRestore, manifest)
    return handlers


def _save_args(state: Any, extra: Mapping[str, Any] | None) -> Any:
    leaves = _by_name(state)
    for name, leaf in leaves.items():
        if not isinstance(leaf, jax.Array):
            raise ValueError(
                f"leaf {name!r} is a {type(leaf).__name__}; a state holds JAX arrays, all else "
                "belongs in `extra`"
            )
    try:
        kept = json.loads(json.dumps(dict(extra or {})))
    except TypeError as error:
        raise ValueError(f"extra={extra!r} is not JSON: {error}") from error
    manifest = {"leaves": {name: _describe(leaf) for name, leaf in leaves.items()}, "extra": kept}
    plain = {n: jax.random.key_data(w) if _is_key(w) else w for n, w in leaves.items()}
    return ocp.args.Composite(
        **{_STATE: ocp.args.PyTreeSave(plain), _MANIFEST: ocp.args.JsonSave(manifest)}
    )


def _restore(place: Path, like: Any, read: Any) -> tuple[Any, dict[str, Any]]:
    if not place.is_dir():
        raise CheckpointError(f"{place}: expected a checkpoint folder, found nothing of the kind")
    with as_checkpoint_error(place):
        manifest = read(ocp.args.Composite(**{_MANIFEST: ocp.args.JsonRestore()}))[_MANIFEST]
    if not isinstance(manifest, dict) or set(manifest) != {"leaves", "extra"}:
        raise CheckpointError(f"{place}: was not written by dskjax.checkpoint.store")
    wanted, stored = _by_name(like), manifest["leaves"]
    for name, leaf in wanted.items():
        expected, found = _describe(leaf), stored.get(name)
        if expected != found:
            raise CheckpointError(f"{place}: leaf {name!r}: expected {expected}, found {found}")
    if extra := [name for name in stored if name not in wanted]:
        raise CheckpointError(
            f"{place}: leaf {extra[0]!r}: expected none, found {stored[extra[0]]}"
        )
    with as_checkpoint_error(place):
        check_manifest(place / _STATE)
        plain = {name: _as_stored(leaf) for name, leaf in wanted.items()}
        placed = ocp.checkpoint_utils.construct_restore_args(plain)
        args = ocp.args.PyTreeRestore(plain, restore_args=placed)
        found = read(ocp.args.Composite(**{_STATE: args}))[_STATE]
    leaves = [_as_wanted(found[name], leaf) for name, leaf in wanted.items()]
    return jax.tree.unflatten(jax.tree.structure(like), leaves), manifest["extra"]


def _by_name(tree: Any) -> dict[str, Any]:
    leaves = jax.tree_util.tree_leaves_with_path(tree)
    named = {jax.tree_util.keystr(path, simple=True, separator="."): leaf for path, leaf in leaves}
    if len(named) != len(leaves):
        raise ValueError(
            "two leaves of the state have the same dotted name; rename a dict key with '.'"
        )
    return named


def _describe(leaf: Any) -> str:
    return f"{leaf.dtype}[{','.join(map(str, leaf.shape))}]"


def _is_key(leaf: Any) -> bool:
    return jnp.issubdtype(leaf.dtype, jax.dtypes.prng_key)


def _as_stored(leaf: Any) -> jax.ShapeDtypeStruct:
    sharding = getattr(leaf, "sharding", None)
    if sharding is None:
        sharding = jax.sharding.SingleDeviceSharding(jax.local_devices()[0])
    bare = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    bare = jax.eval_shape(jax.random.key_data, bare) if _is_key(leaf) else bare
    return jax.ShapeDtypeStruct(bare.shape, bare.dtype, sharding=sharding)


def _as_wanted(value: jax.Array, leaf: Any) -> jax.Array:
    if not _is_key(leaf):
        return value
    kinds = []  # of random keys; only a key can tell, so trace one
    bare = jax.ShapeDtypeStruct(leaf.shape, leaf.dtype)
    jax.eval_shape(lambda key: kinds.append(jax.random.key_impl(key)), bare)
    return jax.random.wrap_key_data(value, impl=kinds[0])
