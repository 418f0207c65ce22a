"""`act_quant` for `benchmarks.kernels`: inputs past the L2 cache, a check to the bit, figures."""

import dataclasses
import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.layers import one_by_one
from pallas_kernels.act_quant import triton
from pallas_kernels.act_quant.cases import BENCH, RECIPES, Case
from pallas_kernels.quant import QTensor, quantise

CASES = tuple(
    dataclasses.replace(case, name=f"{case.name} {recipe}", quant=recipe)
    for case in BENCH
    for recipe in ("tile", "tile_ue8m0", "token")
)
POOL_BYTES = 2**28
"""Of all layers together: five times the L2 cache; but no more than `MOST_LAYERS`."""
MOST_LAYERS = 32
MATMUL = "matmul_tflops"
REFERENCES: dict[str, dict[str, float]] = {}
REFERENCE_CEILINGS = {"matmul_tflops": 738.0, "read_gbs": 3120.0}


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Activations of several layers, each an array of its own."""
    shape = jax.ShapeDtypeStruct(case.shape, case.dtype)
    layers = min(max(2, -(-POOL_BYTES // (shape.size * shape.dtype.itemsize))), MOST_LAYERS)
    keys = jax.random.split(jax.random.key(seed), layers)
    return {"x": [jax.random.normal(key, shape.shape, shape.dtype) for key in keys]}


def implementations(case: Case, sweep: bool, others: bool) -> Iterator[tuple[str, Any, Any]]:
    """(name, function of the op's arguments, tiles); the first is the usual choice."""
    yield "triton", triton.act_quant, triton.Tiles()
    if others:
        yield "xla", quantise, None
    if sweep:
        for elements, per_thread in ((1024, 8), (2048, 8), (4096, 16), (4096, 32), (8192, 32)):
            tiles = triton.Tiles(elements=elements, per_thread=per_thread)
            name = f"triton {elements} elements, {per_thread} a thread"
            yield name, functools.partial(triton.act_quant, tiles=tiles), tiles


def every_layer(run: Any, case: Case, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op for each layer, one after the other; what it takes; the number
    of layers).
    """

    def function(x: list[jax.Array]) -> Any:
        return one_by_one(lambda this: run(this, RECIPES[case.quant]), x)

    return function, args.values(), len(args["x"])


def answers(case: Case, args: dict[str, Any]) -> dict[str, tuple[list[Any], Any]]:
    """(operands, result) of the reference for rows of other sizes, one operation at a time, so that
    divisions are rounded to nearest: on a CPU where there is one.
    """
    x = args["x"][0]
    sizes = 2.0 ** (jnp.arange(x.shape[0]) % 40 - 20)
    operands = [x, (x * sizes[:, None]).astype(x.dtype)]
    cpu = jax.devices("cpu")[0]
    found = {}
    for name, operand in zip(("random", "sizes"), operands, strict=True):
        with jax.default_device(cpu):
            want = quantise(jax.device_put(operand, cpu), RECIPES[case.quant])
        found[name] = [operand], want
    return found


def check(run: Any, case: Case, answers: dict[str, tuple[list[Any], QTensor]]) -> dict[str, float]:
    """Values that differ in a bit, and the largest relative error of scales.

    Raises:
        ValueError: more than one value in 10,000 differs (XLA's divisions may be 2 ulps off; ours
            are exact), or a scale by more than 2 ulps.
    """
    errors = {}
    for name, (operands, want) in answers.items():
        got = jax.jit(run, static_argnums=1)(*operands, RECIPES[case.quant])
        bits, want_bits = (np.asarray(q.values).view(np.uint8) for q in (got, want))
        wrong = int((bits != want_bits).sum())
        scales, want_scales = np.asarray(got.scales), np.asarray(want.scales)
        off = float(np.abs(scales / want_scales - 1).max())
        errors |= {f"{name} values": wrong, f"{name} scales": off}
        if wrong > bits.size / 10_000 or off > 2.0**-22:
            raise ValueError(f"{case}, {name}: {wrong} values differ, scales by {off:.3g}")
    return errors


def flops(case: Case) -> float:
    """A magnitude and a product for each element."""
    return 2.0 * np.prod(case.shape)


def bytes_moved(case: Case, args: dict[str, Any]) -> float:
    """Activations once, values and scales once."""
    size = float(np.prod(case.shape))
    per_scale = RECIPES[case.quant].block[1] or case.shape[-1]
    return size * args["x"][0].dtype.itemsize + size + 4 * size / per_scale
