"""The decode step on a mesh whose ranks have sequences of their own: attention is data parallel
over `dp` and `ep`, experts are split over `ep`, widths over `tp`.

Every rank runs the same step on its own slots, pages and rows, as if it were alone; ranks meet only
where a MoE layer exchanges rows. A rank with nothing to do runs padding rows, which write nothing,
draw nothing and go to no expert. Arrays of all ranks lie one after another: rank r of R has slots
[r * S / R, (r + 1) * S / R) and the pages likewise, and ids of slots and pages count from 0 on each
rank.
"""

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jax.sharding import NamedSharding, PartitionSpec

from dskjax.axes import Sharding
from dskjax.config import ModelConfig
from dskjax.decode.rows import DecodeRows, PrefillRows
from dskjax.decode.slots import Slots
from dskjax.decode.step import DecodeConfig, step
from dskjax.distributed import put
from dskjax.expert_parallel import Exchange
from dskjax.model import param_specs
from dskjax.params import Params


@dataclasses.dataclass(frozen=True)
class Ranks:
    """A mesh under rules that split the batch, such as the preset `decode`.

    Attributes:
        sharding: the mesh and its rules.
    """

    sharding: Sharding

    @property
    def axes(self) -> tuple[str, ...]:
        """Mesh axes whose every position is a rank with sequences of its own."""
        batch = dict(self.sharding.rules.of).get("batch") or ()
        return (batch,) if isinstance(batch, str) else batch

    @property
    def count(self) -> int:
        """R."""
        ranks = 1
        for axis in self.axes:
            ranks *= self.sharding.mesh.shape[axis]
        return ranks

    @property
    def manual(self) -> set[str]:
        """Mesh axes that the step names itself; the others are left to XLA."""
        return {*self.axes, *(name for name, size in self.sharding.mesh.shape.items() if size == 1)}

    def place(self, rows: Any) -> Any:
        """Puts slots or rows of all ranks on their devices.

        Args:
            rows: `Slots`, `DecodeRows` or `PrefillRows`; leading sizes are multiples of R.
        """
        return put(rows, self._where(rows))

    def _specs(self, kind: Any) -> Any:
        """A prefix of PartitionSpecs for one of the step's arguments."""
        mine = PartitionSpec(self.axes)
        names = [field.name for field in dataclasses.fields(kind)]
        specs: dict[str, Any] = dict.fromkeys(names, mine)
        if kind is Slots:
            specs["cache"] = PartitionSpec(None, self.axes)
        if kind is DecodeRows:
            specs["draft_scale"] = PartitionSpec()
        return kind(**specs)

    def state(self, state: Slots) -> Any:
        """NamedShardings of all ranks' slots.

        Args:
            state: the slots or their shapes; leading sizes are multiples of R.
        """
        return self._where(state)

    def _where(self, rows: Any) -> Any:
        specs = jax.tree.broadcast(self._specs(type(rows)), rows)
        return jax.tree.map(lambda spec: NamedSharding(self.sharding.mesh, spec), specs)

    def weights(self, params: Params, cfg: ModelConfig) -> Any:
        """NamedShardings of the weights.

        Args:
            params: the weights or their shapes; their layers may be unstacked.
            cfg: the model.
        """
        specs = param_specs(cfg)
        out = {}
        for name, group in params.items():
            layers = len(group) if isinstance(group, tuple) else 0
            stack = _stacked(group) if layers else group
            out[name] = self.sharding.params({name: specs[name]}, {name: stack})[name]
            if layers:
                out[name] = (jax.tree.map(_of_layer, out[name]),) * layers
        return out

    def _params(self, params: Params, cfg: ModelConfig) -> Any:
        """PartitionSpecs of the weights over `axes` alone; `tp` stays with XLA."""

        def mine(where: NamedSharding) -> PartitionSpec:
            return PartitionSpec(*(part if part in self.axes else None for part in where.spec))

        return jax.tree.map(mine, self.weights(params, cfg))

    def program(self, cfg: ModelConfig, config: DecodeConfig) -> Callable:
        """The jitted step of all ranks; like `dskjax.decode.step.step`, the state is donated."""
        return _program(self, cfg, config)

    def over(self, run: Callable, cfg: ModelConfig, config: DecodeConfig) -> Callable:
        """The function of all ranks' arrays, to be jitted, that does what `run` does on each.

        Args:
            run: like `dskjax.decode.step.step`; its output's leaves have a leading size of their
                own, which all ranks together have R times.
            cfg: the model.
            config: static choices; the exchange follows from the mesh.

        Raises:
            ValueError: ranks cannot share the experts equally.
        """
        return _over(self, run, cfg, config)


def _stacked(layers: tuple[Params, ...]) -> Params:
    """Shapes of a stack of layers."""
    count = len(layers)
    return jax.tree.map(lambda x: jax.ShapeDtypeStruct((count, *x.shape), x.dtype), layers[0])


def _of_layer(where: NamedSharding) -> NamedSharding:
    """Where a layer of a stack lies."""
    return NamedSharding(where.mesh, PartitionSpec(*where.spec[1:]))


@functools.cache
def _program(ranks: Ranks, cfg: ModelConfig, config: DecodeConfig) -> Callable:
    return jax.jit(_over(ranks, step, cfg, config), donate_argnums=1)


def _over(ranks: Ranks, one: Callable, cfg: ModelConfig, config: DecodeConfig) -> Callable:
    config = dataclasses.replace(config, sharding=ranks.sharding)
    if cfg.moe is not None:
        exchange = Exchange.within(ranks.sharding, cfg.moe.num_slots)
        config = dataclasses.replace(config, exchange=exchange)

    def run(
        params: Params, state: Slots, decode: DecodeRows | None, prefill: PrefillRows | None
    ) -> Any:
        where = jax.tree.leaves(jax.tree.broadcast(ranks._specs(Slots), state))
        held = [spec for spec, x in zip(where, jax.tree.leaves(state), strict=True) if x.size]
        made: list[_Shape] = []  # what a rank's step returned, known once it is traced

        def on_rank(params: Params, arrays: list[jax.Array], *rows: Any) -> Any:
            mine = _Shape.of(state).scaled(1, ranks.count).fill(arrays)
            after, output = one(params, mine, *rows, cfg=cfg, config=config)
            made[:] = [_Shape.of(output)]
            return _arrays(after), _arrays(output)

        arrays, output = jax.shard_map(
            on_rank,
            mesh=ranks.sharding.mesh,
            in_specs=(
                ranks._params(params, cfg),
                held,
                None if decode is None else ranks._specs(DecodeRows),
                None if prefill is None else ranks._specs(PrefillRows),
            ),
            out_specs=(held, PartitionSpec(ranks.axes)),
            axis_names=ranks.manual,
            check_vma=False,
        )(params, _arrays(state), decode, prefill)
        return _Shape.of(state).fill(arrays), made[0].scaled(ranks.count).fill(output)

    return run


def _arrays(tree: Any) -> list[jax.Array]:
    """Leaves with something in them: XLA:CPU crashes when it compiles a manual computation that
    takes and returns empty arrays beside others (jaxlib 0.11.2).
    """
    return [x for x in jax.tree.leaves(tree) if x.size]


@dataclasses.dataclass(frozen=True)
class _Shape:
    """A pytree's structure, with the shapes of its empty leaves."""

    treedef: Any
    leaves: tuple[tuple[tuple[int, ...], Any] | None, ...]

    @classmethod
    def of(cls, tree: Any) -> "_Shape":
        leaves, treedef = jax.tree.flatten(tree)
        return cls(treedef, tuple(None if x.size else (x.shape, x.dtype) for x in leaves))

    def scaled(self, times: int, parts: int = 1) -> "_Shape":
        """The same with `times / parts` as many rows."""
        leaves = (
            leaf and ((leaf[0][0] * times // parts, *leaf[0][1:]), leaf[1]) for leaf in self.leaves
        )
        return dataclasses.replace(self, leaves=tuple(leaves))

    def fill(self, arrays: list[jax.Array]) -> Any:
        """The pytree with these arrays where it is not empty."""
        rest = iter(arrays)
        leaves = [next(rest) if leaf is None else jnp.zeros(*leaf) for leaf in self.leaves]
        return jax.tree.unflatten(self.treedef, leaves)
