"""Calling an op the way a step does: compiled, with plain Python arguments static.

Only for tests, which wait for little but compiling.
"""

import functools
from collections.abc import Callable, Sequence
from typing import Any

import jax

from pallas_kernels.quant import Recipe
from pallas_kernels.select import Implementation


def distinct(implementations: Sequence[Implementation]) -> list[str]:
    """Names of the implementations that differ; some ops run one function under two names."""
    return list({i.run: i.name for i in reversed(implementations)}.values())[::-1]


def call(op: Callable[..., Any], args: dict[str, Any]) -> Any:
    """`op(**args)` under jit; shapes that were seen before are not compiled again.

    Numbers, strings and recipes are static; arrays, pytrees and None are traced.
    """
    static = frozenset(k for k, v in args.items() if isinstance(v, int | float | str | Recipe))
    return _jit(op, static)(**args)


def jit(function: Callable[..., Any], **options: Any) -> Callable[..., Any]:
    """`jax.jit` with true fp32 products, also on GPUs that would take TF32; and on a CPU with LLVM
    optimising less, which halves the time to compile.
    """
    fast = {"xla_backend_optimization_level": 0} if jax.default_backend() == "cpu" else None
    compiled = jax.jit(function, compiler_options=fast, **options)

    def run(*args: Any, **kwargs: Any) -> Any:
        with jax.default_matmul_precision("highest"):
            return compiled(*args, **kwargs)

    return run


@functools.cache
def _jit(op: Callable[..., Any], static: frozenset[str]) -> Callable[..., Any]:
    return jit(op, static_argnames=tuple(sorted(static)))
