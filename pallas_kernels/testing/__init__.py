"""Shared by tests and benchmarks of kernels: inputs of named cases, and strict comparison."""

from pallas_kernels.testing.compare import Tolerance, assert_close, assert_equal
from pallas_kernels.testing.generate import BaseCase, tagged
from pallas_kernels.testing.run import call, distinct, jit

__all__ = [
    "BaseCase",
    "Tolerance",
    "assert_close",
    "assert_equal",
    "call",
    "distinct",
    "jit",
    "tagged",
]
