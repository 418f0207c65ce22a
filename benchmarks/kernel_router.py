"""`router` for `benchmarks.kernels`: logits of several layers, a check to the bit, and figures."""

import functools
from collections.abc import Iterator
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np

from benchmarks.layers import one_by_one
from pallas_kernels.router import reference, triton
from pallas_kernels.router.cases import BENCH, Case

CASES = BENCH
LAYERS = 16
MATMUL = "matmul_tflops"
TOLERANCE = 1e-5
"""Of |got - want| / |want| of the weights, which are sums of a few fp32 numbers."""

# Microseconds of the gate of DeepSeek-V3 on another H100 80GB HBM3 on 2026-11-22, whose ceilings
# were as below. torch: 2.11, torch.compile, in a CUDA graph. XLA: the reference here, by CUPTI.
REFERENCES = {
    "deepseek-v3 t128": {"torch.compile": 43, "XLA": 16.6},
    "deepseek-v3 t4096": {"torch.compile": 163, "XLA": 92},
}
REFERENCE_CEILINGS = {"matmul_tflops": 738.0, "read_gbs": 3120.0}


def make(case: Case, seed: int = 0) -> dict[str, Any]:
    """Logits of every layer, each an array of its own, and one bias."""
    keys = jax.random.split(jax.random.key(seed), LAYERS)
    shape = (case.tokens, case.experts)
    logits = [jax.random.normal(key, shape, jnp.float32) for key in keys]
    return {"logits": logits, "bias": case.make(seed)["bias"]}


def implementations(case: Case, sweep: bool, others: bool) -> Iterator[tuple[str, Any, Any]]:
    """(name, function of the op's arguments, tiles); the first is the usual choice."""
    yield "triton", triton.route, {"num_warps": 1}
    if others:
        yield "xla", reference.route, None
    if sweep:
        for warps in (2, 4):
            run = functools.partial(triton.route, num_warps=warps)
            yield f"triton {warps} warps", run, {"num_warps": warps}


def every_layer(run: Any, case: Case, args: dict[str, Any]) -> tuple[Any, Any, int]:
    """(a function that does the op for each layer, one after the other; what it takes; the number
    of layers).
    """

    def function(logits: list[jax.Array], bias: Any) -> Any:
        return one_by_one(lambda this: _run(run, case, this, bias), logits)

    return function, args.values(), LAYERS


def _run(run: Any, case: Case, logits: jax.Array, bias: Any) -> Any:
    gate = case.make(0)
    del gate["logits"], gate["bias"]
    return run(logits, bias, **gate)


def answers(case: Case, args: dict[str, Any]) -> dict[str, tuple[list[Any], Any]]:
    """(operands, result) of the reference, as XLA compiles it, for random logits and for ties."""
    random = args["logits"][0]
    found = {}
    for name, logits in (("random", random), ("ties", jnp.round(random * 2))):
        operands = [logits, args["bias"]]
        if name == "ties" and case.bias is not None:
            operands[1] = jnp.zeros_like(args["bias"])
        found[name] = operands, _compiled(reference.route, case)(*operands)
    return found


def check(run: Any, case: Case, answers: dict[str, tuple[list[Any], Any]]) -> dict[str, float]:
    """Experts that differ, and the relative error of the weights.

    Raises:
        ValueError: an expert differs, or the error is larger than the tolerance. Softmax scores
            depend on the order of a sum, so an expert in 10,000 may be another one.
    """
    errors = {}
    for name, (operands, (want_weights, want_experts)) in answers.items():
        weights, experts = _compiled(run, case)(*operands)
        wrong = int((experts != want_experts).sum())
        error = float(np.abs(weights - want_weights).max() / np.abs(want_weights).max())
        errors |= {f"{name} experts": wrong, f"{name} weights": error}
        allowed = 0 if case.bias is not None else experts.size // 10_000
        if wrong > allowed or not error <= TOLERANCE:
            raise ValueError(f"{case}, {name}: {wrong} experts differ, weights by {error:.3g}")
    return errors


def _compiled(run: Any, case: Case) -> Any:
    return jax.jit(functools.partial(_run, run, case))


def flops(case: Case) -> float:
    """A comparison is none; some 10 a score."""
    return 10.0 * case.tokens * case.experts


def bytes_moved(case: Case, args: dict[str, Any]) -> float:
    """Logits once, weights and experts once."""
    return 4.0 * case.tokens * (case.experts + 2 * case.top_k)
