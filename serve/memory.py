"""How many pages an engine's cache can have: what the compiler says a step needs, against what the
device has.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

from serve.programs import Programs

HOST_BYTES = 2**30
"""Budget of a cache on a device that does not tell its memory: simulated CPU devices."""


class StepMemory(NamedTuple):
    """Bytes that the largest step needs on each device, beside what it is given."""

    temporary: int
    output: int


def step_memory(programs: Programs) -> StepMemory:
    """Compiles the largest bucket and reads the compiler's account of it."""
    analysis = programs.lower(programs.buckets.all()[0]).compile().memory_analysis()
    if analysis is None:
        return StepMemory(0, 0)
    output = analysis.output_size_in_bytes - analysis.alias_size_in_bytes
    return StepMemory(int(analysis.temp_size_in_bytes), int(max(output, 0)))


def count_pages(
    *,
    page_bytes: int,
    most: int,
    least: int,
    fraction: float,
    device: Any,
    measure: Callable[[], StepMemory],
) -> int:
    """Pages of a cache that fills what the device has left.

    Args:
        page_bytes: of one page over all layers, on one device.
        most: pages that could ever be used: every slot at its longest.
        least: pages of one longest sequence.
        fraction: of the device's memory to use in all.
        device: whose memory; weights and other state must be on it already.
        measure: memory of the largest step; called only where memory is known.

    Raises:
        ValueError: what is left does not hold the longest sequence.
    """
    stats = device.memory_stats() if device.platform != "cpu" else None
    if not stats or "bytes_limit" not in stats:
        left, where = HOST_BYTES, "the budget of a simulated device"
    else:
        need = measure()
        used = stats["bytes_in_use"] + need.temporary + need.output
        left = int(stats["bytes_limit"] * fraction) - used
        where = (
            f"{fraction:.0%} of {stats['bytes_limit'] / 2**30:.1f} GiB less weights and the "
            f"largest step ({(need.temporary + need.output) / 2**30:.2f} GiB)"
        )
    pages = min(most, left // page_bytes)
    if pages < least:
        raise ValueError(
            f"{where} leaves room for {max(pages, 0)} cache pages of {page_bytes / 2**20:.2f} MiB, "
            f"but the longest sequence needs {least}: lower max_model_len, slots or chunk, or give "
            "pages by hand"
        )
    return int(pages)
