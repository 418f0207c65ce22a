"""Inputs of cases: page tables, ragged rows, loads of experts, and poison where none may look."""

import dataclasses
import zlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.quant import FP8_BLOCK, INT4_GROUP, QTensor, quantise

Tag = Literal["ci", "full", "bench"]
"""`ci` runs everywhere, `full` are slow or large tests, `bench` are real workloads."""

Format = Literal["array", "e4m3", "int4"]
"""How a weight is given: plain, a scale per 128x128 block, or one per row and 128 columns."""

GARBAGE_PAGES = (2147480000, -1, -2147480000, 2147483647)
"""Page ids that unused entries of a poisoned table hold."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class BaseCase:
    """A named workload.

    Subclasses add sizes and `make(seed, poison)`, which gives the keyword arguments of the op.

    Attributes:
        name: unique within an op.
        tags: which runs take the case.
        dtype: compute dtype of the inputs; it owns the tolerance. Quantized weights and caches are
            compared with their own real values, so they need none of their own.
    """

    name: str
    tags: tuple[Tag, ...] = ("ci",)
    dtype: Literal["float32", "bfloat16"] = "float32"

    def __str__(self) -> str:
        return self.name

    def rng(self, seed: int) -> np.random.Generator:
        """Generator of this case: the same numbers on every machine, others for every name."""
        return np.random.default_rng([seed, zlib.crc32(self.name.encode())])

    def array(self, x: np.ndarray) -> jax.Array:
        """`x` on the device, in the compute dtype."""
        return jnp.asarray(x, self.dtype)


def tagged[CaseT: BaseCase](cases: Iterable[CaseT], tag: Tag) -> tuple[CaseT, ...]:
    """The cases with that tag, in order."""
    return tuple(case for case in cases if tag in case.tags)


def normal(rng: np.random.Generator, *shape: int) -> np.ndarray:
    """Standard normal float32."""
    return rng.standard_normal(shape, np.float32)


def weight(
    rng: np.random.Generator, shape: tuple[int, ...], format: Format, dtype: Any
) -> jax.Array | QTensor:
    """A random weight [..., N, K] of deviation K^-0.5; rows differ in size if it is quantized."""
    w = normal(rng, *shape) * np.float32(shape[-1] ** -0.5)
    if format == "array":
        return jnp.asarray(w, dtype)
    w *= np.exp(rng.uniform(-1, 1, (*shape[:-1], 1))).astype(np.float32)
    return _quantise(jnp.asarray(w), FP8_BLOCK if format == "e4m3" else INT4_GROUP)


_quantise = jax.jit(quantise, static_argnums=1)  # as a loader would, and much faster to compile


def page_table(
    rng: np.random.Generator,
    lens: Sequence[int],
    page_size: int,
    *,
    width: int,
    num_pages: int,
    poison: bool,
) -> np.ndarray:
    """int32 [B, width]: each sequence's pages, no page twice, in random order over the pool.

    Entries past a sequence's last page are 0, or garbage when poisoned.
    """
    used = [-(-length // page_size) for length in lens]
    if sum(used) > num_pages or max(used, default=0) > width:
        raise ValueError(f"{lens=} need {used} pages, more than {num_pages=} or {width=}")
    order = rng.permutation(num_pages)
    table = np.zeros((len(lens), width), np.int32)
    if poison:
        table[:] = np.resize(np.asarray(GARBAGE_PAGES, np.int32), table.shape)
    start = 0
    for row, count in enumerate(used):
        table[row, :count] = order[start : start + count]
        start += count
    return table


def used_slots(
    table: np.ndarray, lens: Sequence[int], page_size: int, num_pages: int
) -> np.ndarray:
    """bool [num_pages, page_size]: slots that hold a cached token of some sequence."""
    used = np.zeros((num_pages, page_size), bool)
    for row, length in enumerate(lens):
        index = np.arange(length)
        used[table[row, index // page_size], index % page_size] = True
    return used


def starts_of(sizes: Sequence[int]) -> np.ndarray:
    """int32 [len + 1]: running sums from 0."""
    return np.concatenate([[0], np.cumsum(sizes)]).astype(np.int32)


Load = Literal["even", "equal", "skewed", "one", "few", "none"]
"""How rows spread: about equally, equally, by a power law, all on one, on a quarter of all,
nowhere.
"""


def group_sizes(rng: np.random.Generator, rows: int, experts: int, load: Load) -> np.ndarray:
    """int32 [experts] that sums to `rows` (to 0 for "none"; "equal" wants a multiple)."""
    if load == "none":
        return np.zeros(experts, np.int32)
    if load == "equal":
        return np.full(experts, rows // experts, np.int32)
    p = np.ones(experts)
    if load == "skewed":
        p = 1.0 / np.arange(1, experts + 1) ** 1.2
    elif load == "few":
        p = (np.arange(experts) < max(1, experts // 4)).astype(float)
    elif load == "one":
        p = (np.arange(experts) == 0).astype(float)
    return rng.multinomial(rows, rng.permutation(p / p.sum())).astype(np.int32)
