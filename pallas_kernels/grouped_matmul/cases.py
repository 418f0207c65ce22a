"""Workloads of `grouped_matmul`: all loads of experts, and DeepSeek's shapes."""

import dataclasses
import functools
import math
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.grouped_matmul.packed_int4 import pack
from pallas_kernels.quant import (
    FP8_BLOCK,
    FP8_TILE,
    FP8_TOKEN,
    INT4_GROUP,
    QTensor,
    Recipe,
    quantise,
)
from pallas_kernels.testing.generate import BaseCase, Format, Load, group_sizes, normal, tagged
from pallas_kernels.testing.generate import weight as make_weight


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(BaseCase):
    """Rows sorted by expert.

    Attributes:
        rows: rows that belong to an expert.
        padding: rows past them, which may hold anything.
        experts: E.
        lead: output shape of one row, (N,) or (2, N).
        k: K.
        load: how rows spread over experts.
        weight: how the weight is given.
        x: how the rows are given: in `dtype`, or e4m3 with a scale per 128 inputs or per row.
        packed: whether an int4 weight is packed.
        full_range: whether an int4 weight may be -8.
    """

    rows: int
    padding: int = 0
    experts: int
    lead: tuple[int, ...]
    k: int
    load: Load = "even"
    weight: Format = "array"
    x: Literal["array", "tile", "token"] = "array"
    packed: bool = False
    full_range: bool = False

    def make(self, seed: int, poison: bool = False) -> dict[str, Any]:
        """Arguments of `grouped_matmul`. Poisoned: NaN in the rows past the groups."""
        rng = self.rng(seed)
        sizes = group_sizes(rng, self.rows, self.experts, self.load)
        x = normal(rng, self.rows + self.padding, self.k)
        if poison:
            x[sizes.sum() :] = np.nan
        shape = (self.experts, *self.lead, self.k)
        w = make_weight(rng, shape, self.weight, self.dtype)
        if isinstance(w, QTensor) and self.full_range:
            # `quantise` makes no -8, which others do. All values alike: twice the deviation.
            values = jnp.asarray(rng.integers(0, 256, w.values.shape, np.uint8))
            w = dataclasses.replace(w, values=values, scales=w.scales / 2)
        return {
            "x": self.array(x)
            if self.x == "array"
            else self._quantised(x, int(sizes.sum()), poison),
            "w": _pack(w, full_range=self.full_range) if self.packed else w,
            "group_sizes": jnp.asarray(sizes),
        }

    def _quantised(self, x: np.ndarray, used: int, poison: bool) -> QTensor:
        rows = _quantise(jnp.asarray(x), _ROWS[self.x])
        if not poison:
            return rows
        return dataclasses.replace(rows, scales=rows.scales.at[used:].set(jnp.nan))

    def abstract(self) -> dict[str, Any]:
        """Shapes and types of `make`'s arguments."""

        def tensor(shape: tuple[int, ...], recipe: Recipe | None) -> Any:
            array = jax.ShapeDtypeStruct(shape, self.dtype)
            return jax.eval_shape(lambda x: quantise(x, recipe), array) if recipe else array

        w = tensor((self.experts, *self.lead, self.k), _WEIGHTS.get(self.weight))
        packed = functools.partial(pack, full_range=self.full_range)
        return {
            "x": tensor((self.rows + self.padding, self.k), _ROWS.get(self.x)),
            "w": jax.eval_shape(packed, w) if self.packed else w,
            "group_sizes": jax.ShapeDtypeStruct((self.experts,), jnp.int32),
        }


_ROWS = {"tile": FP8_TILE, "token": FP8_TOKEN}
_WEIGHTS = {"e4m3": FP8_BLOCK, "int4": INT4_GROUP}
_quantise = jax.jit(quantise, static_argnums=1)  # as a model would, and much faster to compile
_pack = jax.jit(pack, static_argnames="full_range")


def _deepseek_v3(
    experts: int, tokens: int, weight: Format, *, down: bool, full_range: bool = False
) -> Case:
    """The routed experts of DeepSeek-V3: N 4096 (gate and up), K 7168, or N 7168 (down), K 2048.
    Of 8 of them, each has `tokens` rows: a rank's share under expert parallelism. All 256 share
    8 * `tokens` rows, as drawn.
    """
    part = experts < 256
    return Case(
        name=f"{weight} {'down' if down else 'gate/up'} {experts} experts t{tokens}"
        + (" full range" if full_range else ""),
        tags=("bench",),
        dtype="bfloat16",
        rows=8 * tokens,
        experts=experts,
        lead=(7168,) if down else (2, 2048),
        k=2048 if down else 7168,
        load="equal" if part else "even",
        weight=weight,
        x="token" if weight == "int4" else "tile",
        packed=weight == "int4",
        full_range=full_range,
    )


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient:
    """A gradient of `grouped_matmul` on a case of bf16 arrays.

    Attributes:
        case: the product.
        of: which argument's; "x" multiplies the gradient of the results with the weights, "w" with
            the rows of x.
    """

    case: Case
    of: Literal["x", "w"]

    def __str__(self) -> str:
        return f"{self.case} d{self.of}"

    def abstract(self) -> list[Any]:
        """Shapes and types: of the gradient of the results [M, N]; of w [E, N, K] or of x [M, K];
        of the group sizes.
        """
        args, outputs = self.case.abstract(), math.prod(self.case.lead)
        shapes = {"x": (self.case.experts, outputs, self.case.k), "w": args["x"].shape}
        grad = (args["x"].shape[0], outputs)
        arrays = [jax.ShapeDtypeStruct(shape, jnp.bfloat16) for shape in (grad, shapes[self.of])]
        return [*arrays, args["group_sizes"]]


def _bf16(model: str, rows: int, name: str, **sizes: Any) -> tuple[Case, Case]:
    """Gate and up, and down, of an MoE layer of `hidden` and `width` channels."""
    hidden, width = sizes.pop("hidden"), sizes.pop("width")
    shared: dict[str, Any] = {"tags": ("bench",), "dtype": "bfloat16", "rows": rows, **sizes}
    return (
        Case(name=f"bf16 {model} gate/up {name}", lead=(2, width), k=hidden, **shared),
        Case(name=f"bf16 {model} down {name}", lead=(hidden,), k=width, **shared),
    )


_V3 = {"experts": 256, "hidden": 7168, "width": 2048}
_V2_LITE = {"experts": 64, "hidden": 2048, "width": 1408}
_TRUNK = {"experts": 64, "hidden": 512, "width": 160}
"""Of the model with 144M parameters that `benchmarks/mtp_experiment` trains."""
TRAINING = (
    *_bf16("V2-Lite", 6 * 8192, "t8192", **_V2_LITE),
    *_bf16("V2-Lite", 6 * 32768, "t32768", **_V2_LITE),
    *_bf16("trunk", 4 * 65536, "t65536", **_TRUNK),
)
GRADIENTS = tuple(Gradient(case=case, of=of) for case in TRAINING for of in ("x", "w"))

# 96 rows on 16 experts: the capacity of `xla` is 24, so "one" and "few" overflow it.
_SMALL: dict[str, Any] = {"rows": 96, "experts": 16, "lead": (2, 12), "k": 40}
_PADDED: dict[str, Any] = {**_SMALL, "rows": 50, "padding": 46}
# For the fp8 kernel: whole blocks of 128; x and w are multiplied as they are.
_HOPPER: dict[str, Any] = {
    "experts": 5,
    "lead": (256,),
    "k": 512,
    "weight": "e4m3",
    "x": "tile",
    "dtype": "bfloat16",
}
# For the bf16 kernel: sizes that need padding, groups that end inside a tile.
_BF16: dict[str, Any] = {"experts": 5, "lead": (2, 80), "k": 136, "dtype": "bfloat16"}
_INT4: dict[str, Any] = {"weight": "int4", "full_range": True}
_PACKED: dict[str, Any] = {**_HOPPER, "weight": "int4", "packed": True, "x": "token"}

CASES = (
    Case(name="one token", rows=1, experts=4, lead=(12,), k=40),
    Case(name="even", **_SMALL),
    Case(name="skewed", load="skewed", **_SMALL),
    Case(name="all on one expert", load="one", **_SMALL),
    Case(name="few experts", load="few", **_SMALL),
    Case(name="no rows", load="none", **_SMALL),
    Case(name="padding", **_PADDED),
    Case(name="padding after one", load="one", **_PADDED),
    Case(name="e4m3 ragged blocks", rows=30, experts=3, lead=(200,), k=136, weight="e4m3"),
    Case(name="int4 ragged groups", rows=30, experts=3, lead=(2, 20), k=330, **_INT4),
    Case(name="int4 overflow", rows=60, experts=8, lead=(20,), k=130, load="one", **_INT4),
    Case(name="bfloat16", dtype="bfloat16", load="skewed", **_SMALL),
    Case(
        name="bfloat16 e4m3",
        rows=30,
        experts=3,
        lead=(200,),
        k=136,
        weight="e4m3",
        dtype="bfloat16",
    ),
    Case(
        name="256 experts",
        tags=("full",),
        rows=1024,
        experts=256,
        lead=(2, 64),
        k=256,
        load="skewed",
        dtype="bfloat16",
    ),
    Case(name="hopper one row", rows=1, **_HOPPER),
    Case(name="hopper few", rows=29, padding=7, load="skewed", **_HOPPER),
    Case(name="hopper gate/up", rows=60, **{**_HOPPER, "lead": (2, 128), "experts": 2}),
    Case(name="hopper ragged", rows=150, padding=40, load="skewed", **{**_HOPPER, "experts": 2}),
    Case(name="hopper no rows", rows=40, load="none", **_HOPPER),
    Case(name="bf16 one row", rows=1, **_BF16),
    Case(name="bf16 few", rows=29, padding=7, load="skewed", **_BF16),
    Case(name="bf16 ragged", rows=150, padding=43, load="skewed", **{**_BF16, "experts": 2}),
    Case(name="bf16 no rows", rows=40, load="none", **_BF16),
    Case(name="packed float32", rows=9, experts=2, lead=(2, 64), k=128, packed=True, **_INT4),
    Case(name="packed one row", rows=1, **{**_PACKED, "lead": (128,), "k": 384}),
    Case(name="packed few", rows=29, padding=7, load="skewed", **{**_PACKED, "lead": (2, 64)}),
    Case(name="packed full range", rows=29, load="skewed", full_range=True, **_PACKED),
    Case(name="packed ragged", rows=150, padding=40, load="skewed", **{**_PACKED, "experts": 2}),
    Case(name="packed no rows", rows=40, load="none", **{**_PACKED, "lead": (128,)}),
    *(
        _deepseek_v3(8, tokens, "e4m3", down=down)
        for tokens in (1, 32, 128, 512, 4096)
        for down in (False, True)
    ),
    *(
        _deepseek_v3(experts, tokens, "int4", down=down)
        for experts, all_tokens in ((8, (1, 32, 128, 512)), (256, (8, 32, 128, 512)))
        for tokens in all_tokens
        for down in (False, True)
    ),
    _deepseek_v3(8, 512, "int4", down=False, full_range=True),
    *_bf16("V3", 8, "t1", **_V3),
    *_bf16("V3", 8 * 128, "t128", **_V3),
    *TRAINING,
)
CI, FULL, BENCH = tagged(CASES, "ci"), tagged(CASES, "full"), tagged(CASES, "bench")
