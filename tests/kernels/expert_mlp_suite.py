"""What the tests of `expert_mlp` share: float64 oracles, with rows as they are and with rows in
e4m3, comparisons, and every implementation as a function of the op's arguments.
"""

import dataclasses
import functools

import jax
import numpy as np
import pytest
from ml_dtypes import bfloat16

from pallas_kernels import QTensor, expert_mlp
from pallas_kernels.expert_mlp import cases, formats, mosaic_sm90, swiglu_quant
from pallas_kernels.grouped_matmul.api import hopper_kernel
from pallas_kernels.moe_permute import triton
from pallas_kernels.testing import assert_close, call
from pallas_kernels.testing.interpret import PARAMETERS, interpret
from tests.oracles import formats as numbers
from tests.tolerances import E4M3_ROWS, OP, SAME_E4M3, SAME_E4M3_GPU

CASES = {case.name: case for case in cases.CASES + cases.HOPPER}
SMS = 3
"""Of the interpreted GPU."""


@functools.cache
def op_of(impl):
    return functools.partial(expert_mlp, impl=impl)


def run(impl):
    """An implementation; that for Hopper is skipped where it refuses, and interpreted on a CPU."""

    def op(**args):
        if impl == "mosaic_sm90":
            if reason := formats.hopper_refusal(**args):
                pytest.skip(reason)
            if jax.default_backend() == "cpu":
                return interpreted(**args)
        return call(op_of(impl), args)

    return op


def plain(**args):
    """The implementation for Hopper, of ops in plain JAX."""
    return call(_plain, args)


_plain = functools.partial(mosaic_sm90.expert_mlp, steps=mosaic_sm90.PLAIN)


def interpreted(**args):
    """The implementation for Hopper, its kernels interpreted."""
    return interpret(functools.partial(mosaic_sm90.expert_mlp, steps=kernels()), **args)


def kernels(interpreted=True, sms=SMS):
    """The kernels themselves, for machines that cannot run them."""

    def permuted(x, places, *, rows, recipe):
        options = {"rows": rows, "recipe": recipe, "interpret": interpreted}
        return triton.permute(x, places, None, **options)

    def multiply(x, w, sizes):
        mosaic = PARAMETERS if interpreted else None
        return hopper_kernel(w).grouped_matmul(x, w, sizes, sms=sms, interpret=mosaic)

    return mosaic_sm90.Steps(
        permute=permuted,
        multiply=multiply,
        swiglu_quant=functools.partial(swiglu_quant.swiglu_quant, interpret=interpreted),
        combine=functools.partial(triton.combine, interpret=interpreted),
    )


def real(w):
    """float64 values of a weight, an array or quantized."""
    if not isinstance(w, QTensor):
        return np.float64(w)
    return numbers.dequantise(np.asarray(w.values), np.asarray(w.scales), w.block, w.format)


def in_e4m3(rows, block):
    """float64 values of rows [M, K] in e4m3 with a scale per 1 x block."""
    scales = numbers.block_amax(rows, (1, block), 1e-4) / np.float32(448)
    wide = np.float64(scales).repeat(block, axis=-1)
    return numbers.from_e4m3(numbers.to_e4m3(rows / wide)) * wide


def oracle(x, weights, experts, gate_up, down, pairs=None, block=None):
    """float64 result; with a block also rows go through products in e4m3, a scale per 1 x block
    (0: per row), and products give bf16, as on Hopper.
    """
    x, gate_up, down = np.float64(x), real(gate_up), real(down)

    def quantised(row):
        return row if block is None else in_e4m3(row[None], block or row.size)[0]

    def rounded(row):
        return row if block is None else np.float64(row.astype(bfloat16))

    out = np.zeros_like(x)
    for t, row in enumerate(x):
        for weight, e in zip(np.float64(weights[t]), np.asarray(experts[t]), strict=True):
            if e < 0:
                continue
            gate, up = rounded(gate_up[e] @ quantised(row))
            hidden = quantised(gate / (1 + np.exp(-gate)) * up)
            out[t] += weight * rounded(down[e] @ hidden)
    return out


def check(op, case, seed=0, poison=True):
    """Against the float64 oracle."""
    args = case.make(seed, poison=poison)
    out = op(**args)
    assert out.dtype == args["x"].dtype
    # Packed weights must mean what they meant before.
    want = oracle(**dataclasses.replace(case, packed=False).make(seed, poison=poison))
    assert_close(out, want, OP[case.dtype])


def same_e4m3():
    return SAME_E4M3 if jax.default_backend() == "cpu" else SAME_E4M3_GPU


def check_e4m3(op, case, seed=0):
    """Against both oracles: rows in e4m3, and rows as they are."""
    args = case.make(seed, poison=True)
    out = op(**args)
    assert out.dtype == args["x"].dtype
    same = dataclasses.replace(case, packed=False).make(seed, poison=True)
    assert_close(out, oracle(**same, block=0 if case.packed else 128), same_e4m3())
    assert_close(out, oracle(**same), E4M3_ROWS)
