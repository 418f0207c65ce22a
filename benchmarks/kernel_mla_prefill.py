"""`mla_prefill` and its gradients for `benchmarks.kernels`: random rows on the device, a check, and
figures.

Gradients are timed alone, from results that are there; what cuDNN and the whole op take has the
forward pass in it, and says so.
"""

import dataclasses
import functools
import itertools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from pallas_kernels.mla_prefill import api, cudnn, mosaic_sm90, reference
from pallas_kernels.mla_prefill.block_list import BlockList, visible
from pallas_kernels.mla_prefill.cases import BENCH, Case
from pallas_kernels.mla_prefill.gradient import FOR_KEYS, FOR_QUERIES, GradientTiles, gradients
from pallas_kernels.mla_prefill.plan import MlaPrefillPlan
from pallas_kernels.mla_prefill.tiles import QUERY_TILE, Tiles
from pallas_kernels.testing.bench import relative_error

MATMUL = "matmul_tflops"
TOLERANCE = 1e-2
"""Of |got - want| / |want|: bf16 results of bf16 products are off by 2e-3 to 4e-3."""
PEAK = 4.0
"""Queries are multiplied with it for a second check, where maxima grow from tile to tile."""
QUERIES = ("q_nope", "q_rope")
ARRAYS = (*QUERIES, "k_nope", "k_rope", "v")
NAMES = (*ARRAYS, "plan", "blocks")

# Microseconds on another H100 80GB HBM3 on 2026-11-22, whose ceilings were as below. All of them
# are causal with 128 heads of 192 channels; "padded" has values of 192 channels too, as jax.nn
# wants them. cuDNN 9.19; FlashAttention-2 through torch 2.11.
REFERENCES = {
    "deepseek-v3 b1 t4096": {
        "cuDNN by torch": 1162,
        "cuDNN by jax.nn, padded": 1456,
        "FlashAttention-2, padded": 2691,
    },
}
REFERENCE_CEILINGS = {"matmul_tflops": 738.0, "read_gbs": 3120.0}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Gradient:
    """Gradients of a case in queries, keys and values, from a random one of its result.

    Attributes:
        case: the forward pass, without a list of blocks.
    """

    case: Case

    def __str__(self) -> str:
        return f"{self.case} gradient"


_ONE_PROMPT, _SHORT = (
    next(case for case in BENCH if case.name == f"deepseek-v3 {name}")
    for name in ("b1 t4096", "b4 t1024")
)
_PACKED = dataclasses.replace(
    _ONE_PROMPT,
    name="v2-lite b8 t4096",
    chunks=((0, 1024),) * 32,
    rows=8,
    heads=16,
)
CASES = (*BENCH, *(Gradient(case=case) for case in (_ONE_PROMPT, _SHORT, _PACKED)))


def make(case: Case | Gradient, seed: int = 0) -> dict[str, Any]:
    """Random arguments on the device; they are larger than the L2 cache."""
    if isinstance(case, Gradient):
        args = make(case.case, seed)
        d_out = jax.random.normal(jax.random.key(seed + 1), args["q_nope"].shape, jnp.bfloat16)
        return _with_results(case, args) | {"d_out": d_out}
    shapes, keys = case.abstract(), iter(jax.random.split(jax.random.key(seed), 5))
    args: dict[str, Any] = {
        name: jax.random.normal(next(keys), shape.shape, shape.dtype)
        for name, shape in shapes.items()
        if name not in ("plan", "blocks")
    }
    plan = case.plan(*(jnp.asarray(a) for a in case.plan_arrays(seed)))
    return args | {"plan": plan, "blocks": jax.jit(case.blocks)(plan, args)}


def _with_results(case: Gradient, args: dict[str, Any]) -> dict[str, Any]:
    """Results of the forward pass, which stand between the plan and the gradient of `out`."""
    arrays = {name: args[name] for name in (*ARRAYS, "plan")}
    out, lse = _compiled(mosaic_sm90.mla_prefill, case.case)(*arrays.values(), None)
    return arrays | {"out": out, "lse": lse}


def implementations(
    case: Case | Gradient, sweep: bool, others: bool
) -> Iterator[tuple[str, Any, Any]]:
    """(name, function of the op's arguments, tiles); the first is the usual choice."""
    if isinstance(case, Gradient):
        yield from _gradient_implementations(sweep, others)
        return
    yield "mosaic_sm90", mosaic_sm90.mla_prefill, Tiles()
    if case.top is not None:
        yield "mosaic_sm90 and its list", functools.partial(_listed, case), None
    listed = case.a_shape is not None or case.top is not None
    if others and not listed:
        yield "cudnn", functools.partial(api.mla_prefill, impl="cudnn", with_lse=False), None
    if sweep:
        for (keys, slots), ping_pong in itertools.product(((128, 2), (64, 4)), (True, False)):
            tiles = Tiles(keys=keys, slots=slots, ping_pong=ping_pong)
            if tiles != Tiles() and (not listed or keys == 128):  # the tile of its list
                name = f"mosaic_sm90 keys {keys} slots {slots} ping-pong {ping_pong}"
                yield name, functools.partial(mosaic_sm90.mla_prefill, tiles=tiles), tiles


# (own rows, rows walked, stages): of 64 rows two programs fit in the shared memory of an SM.
SWEEP = {
    "for_keys": ((128, 64, 3), (128, 64, 1), (128, 32, 3), (64, 64, 1), (64, 32, 2), (128, 64, 2)),
    "for_queries": ((128, 64, 2), (128, 64, 1), (128, 32, 3), (128, 128, 1), (64, 64, 1)),
}
USUAL = {"for_keys": FOR_KEYS, "for_queries": FOR_QUERIES}


def _gradient_implementations(sweep: bool, others: bool) -> Iterator[tuple[str, Any, Any]]:
    yield "triton", _gradients, USUAL
    if others:
        yield "cudnn with its forward pass", functools.partial(_pullback, cudnn.mla_prefill), None
        whole = functools.partial(_pullback, mosaic_sm90.mla_prefill)
        yield "triton with mosaic_sm90's forward pass", whole, None
    if sweep:
        for of, sizes in ((of, sizes) for of, tried in SWEEP.items() for sizes in tried):
            own, walked, stages = sizes
            tiles = USUAL | {of: GradientTiles(own=own, walked=walked, stages=stages)}
            name = f"triton {of} own {own} walked {walked} stages {stages}"
            yield name, functools.partial(_gradients, **tiles), tiles


def _gradients(**args: Any) -> Any:
    return gradients(**args, d_lse=None)


def _pullback(op: Any, *, plan: MlaPrefillPlan, d_out: Any, scale: float, **args: Any) -> Any:
    """Computes results again, whatever is there."""

    def run(*arrays: jax.Array) -> jax.Array:
        return op(*arrays, plan, scale=scale, with_lse=False)[0]

    _, pull = jax.vjp(run, *(args[name] for name in ARRAYS))
    return pull(d_out)


def _listed(case: Case, *, blocks: Any, **args: Any) -> Any:
    """Makes the list too, where all others get it."""
    return mosaic_sm90.mla_prefill(**args, blocks=case.blocks(args["plan"], args))


def every_layer(run: Any, case: Case | Gradient, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op once; what it takes; 1)."""
    return _compiled(run, case), args.values(), 1


def answers(case: Case | Gradient, args: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    """(operands, out and lse of `_sample` by the fp32 reference), for random and peaked scores; of
    a gradient the whole result.
    """
    if isinstance(case, Gradient):
        return _gradient_answers(case, args)
    found, (rows, heads) = {}, _sample(case)
    tiles = rows[::QUERY_TILE] // QUERY_TILE
    for name, factor in (("random", 1.0), ("peaked", PEAK)):
        changed = args | {k: args[k] * jnp.bfloat16(factor) for k in QUERIES}
        if case.top is not None:
            changed["blocks"] = jax.jit(case.blocks)(args["plan"], changed)
        few = changed | {k: changed[k][:, heads] for k in (*QUERIES, "k_nope", "v")}
        few |= {k: few[k][rows] for k in QUERIES}
        if case.rows == 1:
            plan = args["plan"]
            few["plan"] = MlaPrefillPlan(
                plan.query_seq[rows], plan.query_pos[rows], plan.key_seq, plan.key_pos
            )
        if (blocks := changed["blocks"]) is not None:
            of = heads if blocks.counts.shape[0] > 1 else np.zeros(1, int)
            listed, counts = (x[of][:, tiles] for x in (blocks.tiles, blocks.counts))
            few["blocks"] = BlockList(listed, counts, blocks.key_tile)
        with jax.default_matmul_precision("highest"):
            want = _compiled(reference.mla_prefill, case)(*few.values())
        found[name] = list(changed.values()), *want
    return found


def _gradient_answers(case: Gradient, args: dict[str, Any]) -> dict[str, tuple[Any, ...]]:
    found: dict[str, tuple[Any, ...]] = {}
    for name, factor in (("random", 1.0), ("peaked", PEAK)):
        changed = args | {k: args[k] * jnp.bfloat16(factor) for k in QUERIES}
        changed = _with_results(case, changed) | {"d_out": args["d_out"]}
        with jax.default_matmul_precision("highest"):
            want = _head_by_head(
                case.case.scale, {k: changed[k] for k in (*ARRAYS, "plan", "d_out")}
            )
        found[name] = list(changed.values()), *want
    return found


@functools.partial(jax.jit, static_argnums=0)
def _head_by_head(scale: float, args: dict[str, Any]) -> list[jax.Array]:
    """Gradients by the fp32 reference; scores of one head are in memory at a time."""

    def of_head(head: jax.Array) -> Any:
        few = {k: x[:, head][:, None] if x.ndim == 3 else x for k, x in args.items() if k != "plan"}
        few = {k: x.astype(jnp.float32) for k, x in few.items()}
        return _pullback(reference.mla_prefill, **few, plan=args["plan"], scale=scale)

    found = jax.lax.map(of_head, jnp.arange(args["q_nope"].shape[1]))
    wide = [x.sum(axis=0) if x.ndim == 3 else jnp.moveaxis(x[:, :, 0], 0, 1) for x in found]
    return [x.astype(jnp.float32) for x in wide]


def _sample(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Queries and heads that are checked: of long prompts eight tiles, the first and the last too;
    two heads.
    """
    tokens = case.rows * case.queries
    tiles = np.arange(-(-tokens // QUERY_TILE))
    if case.rows == 1 and not tokens % QUERY_TILE:
        tiles = np.unique(np.linspace(0, tiles[-1], 8).astype(int))
    rows = (tiles[:, None] * QUERY_TILE + np.arange(QUERY_TILE)).reshape(-1)
    return rows[rows < tokens], np.asarray([0, case.heads * 3 // 5])


def check(run: Any, case: Case | Gradient, answers: dict[str, tuple[Any, ...]]) -> dict[str, float]:
    """Relative errors against `answers`; an implementation without log-sum-exp has one less.

    Raises:
        ValueError: an error is larger than the tolerance.
    """
    errors, compiled, parts = {}, _compiled(run, case), ("out", "lse")
    if isinstance(case, Gradient):
        parts = ARRAYS
    for name, (operands, *want) in answers.items():
        nan = jnp.full(operands[0].shape, jnp.nan, jnp.bfloat16)
        jax.block_until_ready(nan)
        del nan  # what a kernel leaves unwritten should hold no right answer
        for part, g, w in zip(parts, compiled(*operands), want, strict=True):
            if g is None:
                continue
            if not isinstance(case, Gradient):
                rows, heads = _sample(case)
                g = g[rows][:, heads]
            error = float(relative_error(g, w))
            errors[f"{name} {part}"] = error
            if not error <= TOLERANCE:
                raise ValueError(f"{case}, {name}: {part} is off by {error:.3g} of its size")
    return errors


def _compiled(run: Any, case: Case | Gradient) -> Any:
    if isinstance(case, Gradient):
        names, scale = (*ARRAYS, "plan", "out", "lse", "d_out"), case.case.scale
        return jax.jit(lambda *a: run(**dict(zip(names, a, strict=True)), scale=scale))

    def function(*operands: Any) -> Any:
        args = dict(zip(NAMES, operands, strict=True))
        blocks = args.pop("blocks")
        options = {} if blocks is None else {"blocks": blocks}
        return run(**args, scale=case.scale, **options)

    return jax.jit(function)


def flops(case: Case | Gradient) -> float:
    """Multiplications and additions that the definition asks for: of keys that are seen. Gradients
    take five products where results take two.
    """
    if isinstance(case, Gradient):
        return 2.5 * flops(case.case)
    seen: float = sum(new * prefix + new * (new + 1) / 2 for prefix, new in case.chunks)
    if case.top is not None:  # tiles of one prompt, whole ones and the diagonal
        whole = np.minimum(np.arange(case.queries // QUERY_TILE), case.top)
        seen = float((whole * QUERY_TILE**2 + QUERY_TILE * (QUERY_TILE + 1) / 2).sum())
    elif case.a_shape is not None:
        plan = case.plan(*(jnp.asarray(a) for a in case.plan_arrays(0)))
        seen = float(jax.jit(_count_seen)(plan, case.blocks(plan, {})))
    return 2.0 * case.heads * seen * (case.nope + case.rope + case.value)


def _count_seen(plan: MlaPrefillPlan, blocks: BlockList) -> jax.Array:
    return visible(plan, blocks).sum(axis=-1).astype(jnp.float32).sum()


def bytes_moved(case: Case | Gradient, args: dict[str, Any]) -> float:
    """Queries, keys, values and results once; for gradients theirs too."""
    arrays = [args[name] for name in (*ARRAYS, "q_nope")]
    if isinstance(case, Gradient):
        arrays += [args[name] for name in (*ARRAYS, "lse", "d_out")]
    return float(sum(x.size * x.dtype.itemsize for x in arrays))
