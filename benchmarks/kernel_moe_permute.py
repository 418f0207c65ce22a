"""`permute` and `combine` for `benchmarks.kernels`: inputs past the L2 cache, checks, figures."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.layers import one_by_one
from pallas_kernels.moe_permute import cases, reference, triton


@dataclasses.dataclass(frozen=True, kw_only=True)
class Case(cases.Case):
    """A workload of one of the two.

    Attributes:
        op: "permute" or "combine".
    """

    op: str


CASES = tuple(
    Case(**dataclasses.asdict(case) | {"op": op, "name": f"{op} {case.name}"})
    for op in ("permute", "combine")
    for case in cases.BENCH
)
POOL_BYTES = 2**28
"""Of all layers together: five times the L2 cache; but no more than `MOST_LAYERS`."""
MOST_LAYERS = 16
TOLERANCE = 4e-3
"""Of |got - want| / |want| of a sum in bf16."""
MATMUL = "matmul_tflops"

# Microseconds on another H100 80GB HBM3 on 2026-11-22, whose ceilings were as below, of eight
# copies times a per-channel scale, quantized with one scale for the tensor. torch: 2.11,
# torch.compile, in a CUDA graph. XLA: by CUPTI.
REFERENCES = {
    "permute deepseek-v3 t128": {"torch.compile": 8.1, "XLA": 10.1},
    "permute deepseek-v3 t4096": {"torch.compile": 225, "XLA": 320},
}
REFERENCE_CEILINGS = {"matmul_tflops": 738.0, "read_gbs": 3120.0}


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Rows of several layers, each an array of its own; one choice of experts."""
    rows = case.tokens if case.op == "permute" else case.num_rows
    size = rows * case.width * 2
    layers = min(max(2, -(-POOL_BYTES // size)), MOST_LAYERS)
    keys = jax.random.split(jax.random.key(seed), layers + 1)
    places = jnp.asarray(_by_expert(case, case.rng(seed)))
    if case.op == "permute":
        other = jnp.exp(jax.random.normal(keys[-1], (case.width,), jnp.float32))
    else:
        other = jax.random.uniform(keys[-1], places.shape, jnp.float32)
    shape = (rows, case.width)
    x = [jax.random.normal(key, shape, jnp.bfloat16) for key in keys[:-1]]
    return {"x": x, "places": places, "other": other}


def _by_expert(case: Case, rng: np.random.Generator) -> np.ndarray:
    """Copies sorted by expert of 256, the experts of a token all different."""
    chosen = np.stack([rng.permutation(256)[: case.choices] for _ in range(case.tokens)])
    order = np.argsort(chosen.reshape(-1), kind="stable")
    return np.argsort(order).astype(np.int32).reshape(chosen.shape)


def implementations(case: Case, sweep: bool, others: bool) -> Iterator[tuple[str, Any, Any]]:
    """(name, (module, options of its functions), tiles); the first is the usual choice."""
    yield "triton", (triton, {}), {"channels": triton.CHANNELS, "per_thread": triton.PER_THREAD}
    if others:
        yield "xla", (reference, {}), None
    if sweep:
        for channels, per_thread in ((512, 8), (1024, 16), (2048, 8), (2048, 16), (4096, 16)):
            options = {"channels": channels, "per_thread": per_thread}
            yield f"triton {channels} channels, {per_thread} a thread", (triton, options), options


def every_layer(run: Any, case: Case, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op for each layer, one after the other; what it takes; the number
    of layers).
    """

    def function(x: list[jax.Array], places: jax.Array, other: jax.Array) -> Any:
        return one_by_one(lambda this: _run(run, case, this, places, other), x)

    return function, args.values(), len(args["x"])


def _run(run: Any, case: Case, x: jax.Array, places: jax.Array, other: jax.Array) -> Any:
    module, options = run
    if case.op == "combine":
        return module.combine(x, places, other, **options)
    recipe = cases.RECIPES[case.quant]
    return module.permute(x, places, other, rows=case.num_rows, recipe=recipe, **options)


def answers(case: Case, args: dict[str, Any]) -> tuple[list[Any], Any]:
    """(operands, result) of the reference, where permuted ones are computed on a CPU, one operation
    at a time, so that divisions are rounded to nearest.
    """
    operands = [args["x"][0], args["places"], args["other"]]
    run = (reference, {})
    if case.op == "combine":
        return operands, jax.jit(functools.partial(_run, run, case))(*operands)
    cpu = jax.devices("cpu")[0]
    with jax.default_device(cpu):
        return operands, _run(run, case, *jax.device_put(operands, cpu))


def check(run: Any, case: Case, answers: tuple[list[Any], Any]) -> dict[str, float]:
    """Values that differ in a bit, or the relative error of a sum.

    Raises:
        ValueError: more than one value in 10,000 differs (XLA's divisions may be 2 ulps off; ours
            are exact), or the error is larger than the tolerance.
    """
    operands, want = answers
    got = jax.jit(functools.partial(_run, run, case))(*operands)
    if case.op == "combine":
        got, want = got.astype(jnp.float32), want.astype(jnp.float32)
        error = float(jnp.linalg.norm(got - want) / jnp.linalg.norm(want))
        if not error <= TOLERANCE:
            raise ValueError(f"{case}: sums are off by {error:.3g} of their size")
        return {"out": error}
    bits, want_bits = (np.asarray(q.values).view(np.uint8) for q in (got, want))
    wrong = int((bits != want_bits).sum())
    off = float(np.abs(np.asarray(got.scales) / np.asarray(want.scales) - 1).max())
    if wrong > bits.size / 10_000 or not off <= 2.0**-22:
        raise ValueError(f"{case}: {wrong} values differ, scales by {off:.3g}")
    return {"values": wrong, "scales": off}


def flops(case: Case) -> float:
    """Of each copy a product and a sum."""
    return 2.0 * case.num_rows * case.width


def bytes_moved(case: Case, args: dict[str, Any]) -> float:
    """Each row once, each copy once."""
    once, copies = 2.0 * case.tokens * case.width, case.num_rows * case.width
    return once + copies * (2.0 if case.op == "combine" else 1 + 4 / 128)
