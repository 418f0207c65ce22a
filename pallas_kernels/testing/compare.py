"""Comparison that cannot pass by averaging: each element counts, a failure has a coordinate."""

import dataclasses
from typing import Any

import numpy as np


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tolerance:
    """Three gates that must all hold.

    Attributes:
        abs: absolute part of the error each single element may have.
        rel: part of it in proportion to the expected element; the limit is abs + rel * |expected|.
        cosine: bound on 1 - 2 <a, e> / (|a|^2 + |e|^2) of the whole arrays, which sees small
            errors that add up.
        reason: where the error comes from, and why it is no larger.
    """

    abs: float
    rel: float
    cosine: float
    reason: str


def assert_close(actual: Any, expected: Any, tol: Tolerance, name: str = "result") -> None:
    """Compares arrays of any float dtype in float64.

    Infinities must stand at the same places with the same sign. `expected` holds no NaN, so a NaN
    in `actual` is an error.

    Raises:
        AssertionError: with the first wrong coordinate, the worst one, and how many there are.
    """
    got, want = (np.asarray(x).astype(np.float64) for x in (actual, expected))
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    assert not np.isnan(want).any(), f"{name}: the expected values hold NaN"
    finite = np.isfinite(want)
    with np.errstate(invalid="ignore"):
        error = np.where(finite, np.abs(got - want), np.where(got == want, 0, np.inf))
    error = np.where(np.isnan(error), np.inf, error)
    excess = error - (tol.abs + tol.rel * np.abs(np.where(finite, want, 0)))
    if (excess > 0).any():
        raise AssertionError(f"{name}: {_report(got, want, excess)}\nallowed: {tol}")
    distance = cosine_distance(got[finite], want[finite])
    assert distance <= tol.cosine, (
        f"{name}: each element is close, but the cosine distance is {distance:.3g}\nallowed: {tol}"
    )


def assert_equal(actual: Any, expected: Any, name: str = "result") -> None:
    """Compares shape, dtype and every bit (0.0 differs from -0.0, a NaN equals itself).

    Raises:
        AssertionError: with the first coordinate that differs, both values, and how many differ.
    """
    got, want = np.asarray(actual), np.asarray(expected)
    assert got.shape == want.shape, f"{name}: shape {got.shape}, expected {want.shape}"
    assert got.dtype == want.dtype, f"{name}: dtype {got.dtype}, expected {want.dtype}"
    differs = _bits(got) != _bits(want)
    if differs.any():
        raise AssertionError(f"{name}: {_report(got, want, differs.astype(np.float64))}")


def cosine_distance(a: np.ndarray, b: np.ndarray) -> float:
    """1 - 2 <a, b> / (|a|^2 + |b|^2): unlike a cosine it also sees a wrong length."""
    total = float((a * a).sum() + (b * b).sum())
    return 0.0 if total == 0 else float(((a - b) ** 2).sum()) / total


def _bits(x: np.ndarray) -> np.ndarray:
    # ml_dtypes report kind "V" (or "f"), so ask for anything that is not an integer or a bool.
    return x if x.dtype.kind in "iub" else np.ascontiguousarray(x).view(f"u{x.dtype.itemsize}")


def _report(got: np.ndarray, want: np.ndarray, excess: np.ndarray) -> str:
    def at(flat: int) -> str:
        where = tuple(int(i) for i in np.unravel_index(flat, excess.shape))
        return f"{where} got {got[where]!s}, expected {want[where]!s}"

    first, worst = int(np.argmax(excess.ravel() > 0)), int(np.argmax(excess))
    wrong = int((excess > 0).sum())
    return (
        f"{wrong} of {excess.size} elements are wrong; first at {at(first)}; worst at {at(worst)}"
    )
