"""What XLA launches for a compiled program, and what of it lies in command buffers (CUDA graphs),
which the host launches as one: from the list of thunks that XLA writes into its dump.
"""

import collections
import re
from pathlib import Path
from typing import Any

LIST = "*.thunk_sequence_after_thunk_passes.txt"
ENTRY = re.compile(r"( *)\d+: k(\w+) ")


def of_dump(folder: Path) -> dict[str, Any]:
    """Counts of thunks by kind.

    Args:
        folder: where XLA has dumped one program (`xla_dump_to`, `xla_dump_hlo_as_text`).

    Returns:
        command_buffers: how many there are; "in_command_buffers" and "by_the_host": {kind: thunks},
        those in the bodies of loops counted once.

    Raises:
        FileNotFoundError: the folder has not exactly one list.
    """
    found = list(folder.glob(LIST))
    if len(found) != 1:
        raise FileNotFoundError(f"{folder} must hold one file {LIST}, not {len(found)}")
    return counted(found[0].read_text())


def counted(text: str) -> dict[str, Any]:
    """`of_dump` of a list: thunks of a command buffer are indented below it."""
    inside: collections.Counter[str] = collections.Counter()
    outside: collections.Counter[str] = collections.Counter()
    buffers, buffer = 0, None  # the indent of the one that the line may be in
    for indent, kind in ENTRY.findall(text):
        if buffer is not None and len(indent) <= buffer:
            buffer = None
        if kind == "CommandBuffer":
            buffers, buffer = buffers + 1, len(indent)
        else:
            (outside if buffer is None else inside)[kind] += 1
    return {
        "command_buffers": buffers,
        "in_command_buffers": dict(sorted(inside.items())),
        "by_the_host": dict(sorted(outside.items())),
    }
