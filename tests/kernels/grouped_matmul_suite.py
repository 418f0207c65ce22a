"""What the tests of `grouped_matmul` share: the float64 oracle's answer to each case, the
comparison, and every implementation as a function of the op's arguments, the Hopper kernels
interpreted.
"""

import dataclasses
import functools
import inspect

import jax
import numpy as np
import pytest

from pallas_kernels import QTensor, grouped_matmul
from pallas_kernels.grouped_matmul import api, cases, xla
from pallas_kernels.testing import assert_close, call, distinct
from pallas_kernels.testing.interpret import PARAMETERS, interpret
from tests.oracles import formats
from tests.tolerances import OP

IMPLS = [*distinct(api.IMPLEMENTATIONS), "xla by capacity"]
CASES = {case.name: case for case in cases.CASES}
SMS = 3
"""Of the interpreted GPU: few, so that a thread block has several items."""


@functools.cache
def op_of(impl):
    """The op with one implementation; "xla by capacity" is how `xla` treats very large weights."""
    if impl != "xla by capacity":
        return functools.partial(grouped_matmul, impl=impl)

    def by_capacity(x, w, group_sizes):
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(xla, "BLOCK_SUMS_BYTES", -1)
            return xla._with_gradient(x, w, group_sizes)

    return by_capacity


def run(impl):
    if impl == "mosaic_sm90" and jax.default_backend() == "cpu":
        return interpreted()

    def op(**args):
        if impl == "mosaic_sm90":
            skip_unsupported(args)
        if impl == "xla by capacity" and not isinstance(args["w"], jax.Array):
            pytest.skip("a quantized weight is never trained, so it has no such path")
        return call(op_of(impl), args)

    return op


def skip_unsupported(args):
    if reason := api.hopper_refusal(args["x"], args["w"]):
        pytest.skip(reason)


def interpreted(**options):
    """The Hopper kernel for the types of x and w, in the interpreter."""

    def op(x, w, group_sizes):
        skip_unsupported({"x": x, "w": w})
        keywords = {"sms": SMS, "interpret": PARAMETERS} | options
        kernel = api.hopper_kernel(w).grouped_matmul
        return interpret(kernel, x, w, group_sizes, **keywords)

    return op


def has(monkeypatch, kernel, where, name, replacement, **options):
    """The Hopper kernels, interpreted, with something replaced in the one of module `kernel`."""
    monkeypatch.setattr(where, name, replacement)
    run = kernel._run.__wrapped__
    statics = range(3, len(inspect.signature(run).parameters))
    # Traced again, with the bug and without.
    monkeypatch.setattr(kernel, "_run", jax.jit(lambda *a: run(*a), static_argnums=statics))
    return interpreted(**options)


def real(w):
    """float64 values of an array or QTensor."""
    if not isinstance(w, QTensor):
        return np.float64(w)
    return formats.dequantise(np.asarray(w.values), np.asarray(w.scales), w.block, w.format)


def oracle(x, w, group_sizes):
    x, w = real(x), real(w)
    out, start = np.zeros((len(x), *w.shape[1:-1])), 0
    for weight, size in zip(w, np.asarray(group_sizes), strict=True):
        for row in range(start, start + size):
            out[row] = weight @ x[row]
        start += size
    return out


@functools.cache
def expected(case, seed=0):
    args = case.make(seed, poison=True)
    # Packed weights must mean what they meant before.
    plain = dataclasses.replace(case, packed=False).make(seed, poison=True)
    return args, oracle(**plain)


def check(op, case, seed=0):
    args, want = expected(case, seed)
    out = op(**args)
    assert out.dtype == (case.dtype if case.x == "array" else "bfloat16")
    assert_close(out, want, OP[case.dtype])
    past = int(args["group_sizes"].sum())
    assert not np.asarray(out)[past:].any(), "rows past the groups must be exactly 0"
