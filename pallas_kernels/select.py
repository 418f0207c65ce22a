"""Which implementation of an op runs: a named one, or the first that can.

Every op is a folder with the same parts; its `api` lists its implementations in order of preference
and asks `choose`. The choice depends on static facts only (shapes, dtypes, device), so it is made
while tracing and costs nothing at run time.
"""

import contextlib
import contextvars
import dataclasses
import functools
import logging
import math
from collections.abc import Callable, Iterator, Sequence
from typing import Any, Literal

import jax

Impl = Literal["auto", "reference", "xla"]
"""Names a user may pass as `impl`. `reference` is the meaning of an op in fp32; `xla` is plain JAX
in the compute dtype.
"""

_log = logging.getLogger(__name__)


_FOR_HOPPER = contextvars.ContextVar("for_hopper", default=False)


@contextlib.contextmanager
def for_hopper() -> Iterator[None]:
    """Implementations are chosen as on an H100 within: for compiling ahead of time."""
    token = _FOR_HOPPER.set(True)
    try:
        yield
    finally:
        _FOR_HOPPER.reset(token)


_ORDER_IS_KEPT = contextvars.ContextVar("order_is_kept", default=False)


def keep_order() -> None:
    """From here on in this context no implementation runs whose sums have another order, and other
    bits, every time: to be called before anything is traced.
    """
    _ORDER_IS_KEPT.set(True)


def order_is_kept() -> bool:
    """Whether `keep_order` was called."""
    return _ORDER_IS_KEPT.get()


def _on_gpu() -> bool:
    return _FOR_HOPPER.get() or jax.default_backend() == "gpu"


def _capability() -> tuple[str, str | None]:
    """Name and compute capability of the default device."""
    if _FOR_HOPPER.get():
        return "an H100", "9.0"
    device = jax.devices()[0]
    return device.device_kind, getattr(device, "compute_capability", None)


def on_gpu_only(*_: Any, **__: Any) -> str | None:
    """`supports` of implementations that `auto` should take on GPUs; on a CPU the reference is
    preferred.
    """
    return None if _on_gpu() else "auto uses the reference on a CPU"


H100_SMS = 132
"""Streaming multiprocessors of an H100 or H200 (SXM)."""


def no_hopper() -> str | None:
    """Why the default device cannot run kernels for Hopper, or None."""
    if not _on_gpu():
        return "needs an H100 or H200"
    kind, capability = _capability()
    if capability != "9.0":
        return f"needs compute capability 9.0 (H100, H200), {kind} has {capability}"
    return None


def no_ada() -> str | None:
    """Why the default device cannot run kernels in Triton that make e4m3, or None."""
    if not _on_gpu():
        return "needs an NVIDIA GPU of compute capability 8.9 or more"
    kind, capability = _capability()
    if not str(capability).replace(".", "").isdecimal() or float(str(capability)) < 8.9:
        return f"needs compute capability 8.9 or more, {kind} has {capability}"
    return None


def too_large(*shapes: tuple[int, ...]) -> str | None:
    """Why kernels in Triton, whose offsets have 32 bits, cannot take arrays of these shapes."""
    for shape in shapes:
        if math.prod(shape) >= 2**31:
            return f"needs arrays of fewer than {2**31} elements, not of {shape}"
    return None


def whole_arrays_only(*_: Any, **__: Any) -> str | None:
    """`auto` of kernels that XLA cannot partition: where it may split arrays between devices it
    would gather them first. Within `shard_map` they are a device's own.
    """
    mesh = jax.sharding.get_abstract_mesh()
    if jax.device_count() == 1 or mesh.are_all_axes_manual:
        return None
    return f"{jax.device_count()} devices may share an array here: ask for it by name"


def count_sms() -> int:
    """Streaming multiprocessors of the default device; an H100's where there is no GPU."""
    return getattr(jax.devices()[0], "core_count", H100_SMS)


def anywhere(*_: Any, **__: Any) -> str | None:
    """`supports` of implementations without restrictions."""
    return None


@dataclasses.dataclass(frozen=True)
class Implementation:
    """One way to run an op.

    Attributes:
        name: what a user passes as `impl`.
        run: the function, with the op's own arguments.
        auto: called with the op's arguments; returns None when `auto` may take this one, or the
            reason why not.
        supports: likewise for an explicit request; a reason makes the request an error.
    """

    name: str
    run: Callable[..., Any]
    auto: Callable[..., str | None] = anywhere
    supports: Callable[..., str | None] = anywhere


def choose(
    op: str, impl: str, known: Sequence[Implementation], *args: Any, **kwargs: Any
) -> Callable[..., Any]:
    """Picks the implementation of `op` for these arguments.

    Args:
        op: name of the op, for messages.
        impl: "auto" or the name of one of `known`.
        known: implementations in order of preference.
        *args: the op's arguments, handed to `auto` and `supports`.
        **kwargs: likewise.

    Raises:
        ValueError: `impl` is no implementation of this op; the message lists those that are.
        NotImplementedError: the named implementation cannot run here, or none can; the message
            gives the reasons.
    """
    if impl != "auto":
        for candidate in known:
            if candidate.name == impl:
                reason = candidate.supports(*args, **kwargs)
                if reason is not None:
                    raise NotImplementedError(f"{op}: impl={impl!r} cannot run here: {reason}")
                return candidate.run
        raise ValueError(
            f"{op}: impl={impl!r} is unknown; choose one of auto, "
            f"{', '.join(c.name for c in known)}"
        )
    refusals = []
    for candidate in known:
        reason = candidate.supports(*args, **kwargs) or candidate.auto(*args, **kwargs)
        if reason is None:
            _log_once(op, candidate.name, "; ".join(refusals))
            return candidate.run
        refusals.append(f"{candidate.name}: {reason}")
    raise NotImplementedError(f"{op}: no implementation can run here ({'; '.join(refusals)})")


@functools.cache
def _log_once(op: str, name: str, refusals: str) -> None:
    _log.info("%s: auto chose %s%s", op, name, f" ({refusals})" if refusals else "")
