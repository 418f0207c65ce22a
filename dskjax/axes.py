"""The glossary of logical axes, and the rules that map them to the axes of a mesh."""

import dataclasses
from collections.abc import Mapping
from typing import Any

import jax
from jax.sharding import NamedSharding, PartitionSpec

from pallas_kernels.grouped_matmul import PackedInt4
from pallas_kernels.grouped_matmul.packed_int4 import INPUTS, OUTPUTS
from pallas_kernels.quant import QTensor

LOGICAL_AXES = {
    "batch": "sequences of a batch, or the flat token rows of a ragged one",
    "sequence": "tokens of a sequence",
    "residual": "token rows of the residual stream between attention and MLPs, where norms work",
    "layers": "stacked layers",
    "vocab": "vocabulary entries (X)",
    "embed": "hidden size (D)",
    "expert_embed": "hidden size in the weights of routed experts, which `experts` splits already",
    "heads": "attention heads times their width",
    "latent": "compressed key/value rank (C)",
    "q_latent": "compressed query rank (Q)",
    "mlp": "intermediate size of an MLP or expert (F)",
    "experts": "routed experts (E)",
}
"""Every logical axis a weight or activation may name, with its meaning."""

SMALL = 128
"""Up to so many rows or columns a quantised weight's scales are not worth splitting."""


def check_axes(shape: tuple[int, ...], axes: tuple[str | None, ...]) -> None:
    """Raises ValueError when `axes` does not fit `shape` or names an axis that is not in the
    glossary.
    """
    if len(shape) != len(axes):
        raise ValueError(f"{len(axes)} axes {axes} for {len(shape)} dimensions {shape}")
    unknown = [axis for axis in axes if axis is not None and axis not in LOGICAL_AXES]
    if unknown:
        raise ValueError(f"unknown logical axes {unknown}; known: {', '.join(LOGICAL_AXES)}")


@dataclasses.dataclass(frozen=True)
class Rules:
    """Which mesh axis (or axes, or none) each logical axis is split over.

    Raises:
        ValueError: at construction for an unknown logical axis; in `spec` when two dimensions of
            one array would use the same mesh axis.
    """

    of: tuple[tuple[str, str | tuple[str, ...] | None], ...]

    @classmethod
    def make(cls, of: Mapping[str, str | tuple[str, ...] | None]) -> "Rules":
        """Rules from a mapping; logical axes that are absent are not split."""
        unknown = sorted(set(of) - set(LOGICAL_AXES))
        if unknown:
            raise ValueError(
                f"rules name unknown logical axes {unknown}; known: {', '.join(LOGICAL_AXES)}"
            )
        return cls(tuple(sorted(of.items())))

    def spec(self, axes: tuple[str | None, ...]) -> PartitionSpec:
        """PartitionSpec of an array with these logical axes."""
        mapping = dict(self.of)
        parts = [mapping.get(axis) if axis is not None else None for axis in axes]
        used: dict[str, str | None] = {}
        for axis, part in zip(axes, parts, strict=True):
            for mesh_axis in (part,) if isinstance(part, str) else part or ():
                if mesh_axis in used:
                    raise ValueError(
                        f"rules split both {used[mesh_axis]!r} and {axis!r} of one array {axes} "
                        f"over mesh axis {mesh_axis!r}"
                    )
                used[mesh_axis] = axis
        return PartitionSpec(*parts)


@dataclasses.dataclass(frozen=True)
class Sharding:
    """A mesh with its rules: all that model code needs to place arrays by their logical axes."""

    mesh: jax.sharding.Mesh
    rules: Rules

    def of(
        self, axes: tuple[str | None, ...], shape: tuple[int, ...] | None = None
    ) -> NamedSharding:
        """NamedSharding for these logical axes. With `shape`, dimensions that do not divide evenly
        stay whole.
        """
        spec = self.rules.spec(axes)
        if shape is None:
            return NamedSharding(self.mesh, spec)
        parts = [
            part if size % self._ways(part) == 0 else None
            for size, part in zip(shape, spec, strict=True)
        ]
        return NamedSharding(self.mesh, PartitionSpec(*parts))

    def constrain(self, x: jax.Array, axes: tuple[str | None, ...]) -> jax.Array:
        """Pins an activation's sharding inside jit."""
        return jax.lax.with_sharding_constraint(x, self.of(axes, x.shape))

    def whole_logits(self, x: jax.Array) -> jax.Array:
        """Pins logits [..., X] with all of the vocabulary on each device that takes part in its
        product: choosing from them takes sums along it, which XLA makes loops of where an axis is
        split, an iteration a token.
        """
        if self._ways(dict(self.rules.of).get("vocab")) == 1:
            return x
        # Within `shard_map` only the mesh at hand may be named; its other axes are left to XLA.
        inside = not jax.sharding.get_abstract_mesh().empty
        where = PartitionSpec() if inside else NamedSharding(self.mesh, PartitionSpec())
        return jax.lax.with_sharding_constraint(x, where)

    def between(self, x: jax.Array) -> jax.Array:
        """Pins rows [T, D] of the residual stream where they lie between attention and MLPs."""
        split = "residual" if dict(self.rules.of).get("residual") else "batch"
        return self.constrain(x, (split, None))

    def inside(self, x: jax.Array) -> jax.Array:
        """Pins normed rows [T, D] where attention and MLPs want them."""
        return self.constrain(x, ("batch", None))

    def of_weight(self, axes: tuple[str | None, ...], value: Any, name: str) -> Any:
        """NamedSharding of an array, or those of a QTensor or PackedInt4; see `quantised` and
        `packed`.
        """
        if isinstance(value, QTensor):
            return self.quantised(axes, value, name)
        if isinstance(value, PackedInt4):
            return self.packed(axes, value, name)
        return self.of(axes, value.shape)

    def quantised(self, axes: tuple[str | None, ...], q: QTensor, name: str) -> QTensor:
        """NamedShardings of a QTensor's values and scales, in a QTensor of the same structure.

        A split is asked for where the rules give an axis to several devices and the values divide
        among them. Scales are then split like the values, so a dimension of whole blocks may be
        split between its blocks only. Two kinds of dimension keep their few scales whole where
        parts cut blocks: a small one, up to `SMALL` or one block, and one that is no multiple of
        the block (DeepSeek-V2-Lite's 10944), which no degree would suit.

        Args:
            axes: logical axes of the weight [..., N, K].
            q: the weight; its shapes are enough.
            name: of the weight, for errors.

        Raises:
            ValueError: a part would end inside a block.
        """
        values = self.of(axes, q.values.shape)
        blocks = (*(1 for _ in axes[:-2]), *q.block)
        parts: list[str | tuple[str, ...] | None] = []
        for axis, size, block, part in zip(axes, q.shape, blocks, values.spec, strict=True):
            whole = size % (self._ways(part) * block) == 0
            if not whole and size > max(block, SMALL) and size % block == 0:
                what = f"of this {q.format} weight", f"blocks of {block} that share a scale"
                raise ValueError(self._cut(name, what, axis, size, block, part))
            parts.append(part if whole else None)
        scales = NamedSharding(self.mesh, PartitionSpec(*parts))
        return dataclasses.replace(q, values=values, scales=scales)

    def packed(self, axes: tuple[str | None, ...], w: PackedInt4, name: str) -> PackedInt4:
        """NamedShardings of packed int4 weights, in a PackedInt4; see `quantised`.

        Raises:
            ValueError: a part would end inside a tile.
        """
        parts = self.of(axes, w.shape).spec
        tiles = (*(1 for _ in axes[:-2]), OUTPUTS, INPUTS)
        for axis, size, tile, part in zip(axes, w.shape, tiles, parts, strict=True):
            if size % (self._ways(part) * tile):
                what = "of this weight, packed for Hopper", f"tiles of {tile}"
                raise ValueError(self._cut(name, what, axis, size, tile, part))
        words, scales = PartitionSpec(*parts, None, None), PartitionSpec(*parts, None)
        return dataclasses.replace(
            w, words=NamedSharding(self.mesh, words), scales=NamedSharding(self.mesh, scales)
        )

    def _cut(
        self,
        name: str,
        what: tuple[str, str],
        axis: str | None,
        size: int,
        block: int,
        part: str | tuple[str, ...] | None,
    ) -> str:
        names = (part,) if isinstance(part, str) else part or ()
        degree = " * ".join(f"{name}={self.mesh.shape[name]}" for name in names)
        ways, count = self._ways(part), size // block
        legal = ", ".join(str(n) for n in range(1, count + 1) if count % n == 0)
        of_weight, blocks = what
        return (
            f"{name}: {degree} would split the {axis!r} axis {of_weight}, {size}, "
            f"into parts of {size // ways}, inside its {blocks}; "
            f"choose a mesh that splits it in one of {legal}"
        )

    def params(self, specs: Any, params: Any = None) -> Any:
        """Tree of shardings for a tree of `WeightSpec`.

        Args:
            specs: the weights as declared.
            params: the weights themselves or their shapes; needed when some are QTensors, whose
                scales are split otherwise than their values, or packed.

        Raises:
            ValueError: see `quantised` and `packed`.
        """

        def one(keys: tuple[Any, ...], spec: Any, value: Any) -> Any:
            return self.of_weight(spec.axes, value, _name(keys))

        is_spec = lambda s: hasattr(s, "axes")  # noqa: E731
        if params is None:
            return jax.tree.map(lambda s: self.of(s.axes, s.shape), specs, is_leaf=is_spec)
        return jax.tree_util.tree_map_with_path(one, specs, params, is_leaf=is_spec)

    def _ways(self, part: str | tuple[str, ...] | None) -> int:
        ways = 1
        for axis in (part,) if isinstance(part, str) else part or ():
            ways *= self.mesh.shape[axis]
        return ways


def _name(keys: tuple[Any, ...]) -> str:
    """Dotted name of a leaf; layers that are apart have their number in it."""
    return ".".join(str(getattr(key, "key", getattr(key, "idx", key))) for key in keys)
