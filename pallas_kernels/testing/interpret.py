"""Mosaic GPU kernels on a CPU: Pallas' GPU interpreter, with its race detector and a time limit.

The only module of ours that touches JAX's private ones. What the interpreter does not see: a
missing wait for a product (its products are immediate and take no part in race detection), a wrong
swizzle, too much shared memory, too few registers. Lowering and compiling ahead of time see these.
"""

import contextlib
import os
import threading
import unittest.mock
import warnings
from collections.abc import Callable, Iterator
from typing import Any

import jax
from jax._src.pallas.mosaic_gpu.interpret import gpu_callbacks, interpret_pallas_call
from jax._src.pallas.mosaic_gpu.interpret.race_detection_state import GPURaceDetectionState
from jax.experimental.pallas import mosaic_gpu as plgpu

PARAMETERS = plgpu.InterpretGPUParams(detect_races=True)
"""What a kernel takes as `interpret`."""
THREADS = 4
"""Each warpgroup of a thread block blocks a thread of XLA's pool; one more does the arithmetic."""


class RaceError(AssertionError):
    """Two warpgroups, or one and a copy, used the same memory without order."""


def interpret(function: Callable[..., Any], *args: Any, seconds: float = 180, **kwargs: Any) -> Any:
    """Calls a function whose kernels are interpreted, and waits for its results.

    Args:
        function: passes `PARAMETERS` to its kernels.
        *args: its arguments.
        seconds: time limit: warpgroups that wait for each other wait forever.
        **kwargs: its arguments.

    Raises:
        RaceError: some kernel had a race; the detector has printed where.
        TimeoutError: the time is over. The process cannot interpret any more after this.
        RuntimeError: XLA has too few threads here.
    """
    if max(jax.local_device_count("cpu"), os.cpu_count() or 1) < THREADS:
        raise RuntimeError(
            f"the interpreter needs {THREADS} threads or it waits forever: "
            f"jax.config.update('jax_num_cpu_devices', {THREADS})"
        )
    outcome: list[Any] = []

    def run() -> None:
        try:
            outcome.append(jax.block_until_ready(function(*args, **kwargs)))
        except BaseException as error:  # handed to the caller below
            outcome.append(error)

    with _recorded() as races, warnings.catch_warnings():
        # NumPy's; a kernel may multiply with rows that it does not use and that hold NaN.
        warnings.filterwarnings("ignore", "invalid value", RuntimeWarning)
        thread = threading.Thread(target=run, daemon=True)
        thread.start()
        thread.join(seconds)
        if thread.is_alive():
            raise TimeoutError(f"the kernel has not ended after {seconds} s: a deadlock?")
    if isinstance(outcome[0], BaseException):
        interpret_pallas_call.reset_gpu_interpret_mode_state()
        raise outcome[0]
    if any(state.races_found for state in races):
        raise RaceError("the kernel has a race, see the output above")
    return outcome[0]


@contextlib.contextmanager
def _recorded() -> Iterator[list[Any]]:
    """The race states of all kernels that begin inside; JAX keeps only the last one's."""
    states = []

    def record(*args: Any, **kwargs: Any) -> Any:
        states.append(GPURaceDetectionState(*args, **kwargs))
        return states[-1]

    with unittest.mock.patch.object(gpu_callbacks, "GPURaceDetectionState", record):
        yield states
