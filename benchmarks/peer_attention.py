"""Causal attention of 192 + 128 channels by cuDNN through PyTorch: what `mla_prefill` is held to.

    python -m benchmarks.peer_attention --out benchmarks/results/peer-attention.json

Run it on the machine and right after `python -m benchmarks.kernels mla_prefill`. PyTorch is not
among this project's dependencies. Queries and keys come put together, rope keys copied per head:
making them so is not timed.
"""

import argparse
import datetime
import functools
import itertools
import json
import statistics
import time
from pathlib import Path

import torch
from torch.nn.attention import SDPBackend, sdpa_kernel

CASES = {
    "deepseek-v3 b1 t4096": (4096, 128),
    "deepseek-v3 b1 t8192": (8192, 128),
    "deepseek-v3 b1 t16384": (16384, 128),
    "deepseek-v3 b1 t32768 h32": (32768, 32),
}
"""Tokens and heads."""
SAMPLES = 25
WARM_UP = 0.5
"""Seconds; the card slows under load, and `benchmarks.kernels` works longer before it times."""


def main() -> None:
    """Times every case and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True)
    args = parser.parse_args()
    if not torch.cuda.is_available():
        parser.error("PyTorch finds no GPU here")
    rows = []
    for name, (tokens, heads) in CASES.items():
        times = timed(tokens, heads)
        cuts = statistics.quantiles(times, n=20)
        operations = tokens * (tokens + 1) * heads * (128 + 64 + 128)
        row = {
            "case": name,
            "us": {"median": statistics.median(times), "p5": cuts[0], "p95": cuts[-1]},
            "samples": len(times),
            "tflops": operations / statistics.median(times) / 1e6,
        }
        rows.append(row)
        print(json.dumps(row), flush=True)
    result = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": torch.cuda.get_device_name(),
        "versions": {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()},
        "rows": rows,
    }
    args.out.write_text(json.dumps(result, indent=1) + "\n")


def timed(tokens: int, heads: int) -> list[float]:
    """Microseconds of each call, by events on the device; inputs are larger than the L2 cache."""
    shape = 1, heads, tokens
    q, k = (torch.randn(*shape, 192, device="cuda", dtype=torch.bfloat16) for _ in range(2))
    v = torch.randn(*shape, 128, device="cuda", dtype=torch.bfloat16)
    marks = [torch.cuda.Event(enable_timing=True) for _ in range(SAMPLES + 1)]
    attend = functools.partial(torch.nn.functional.scaled_dot_product_attention, is_causal=True)
    with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
        until = time.monotonic() + WARM_UP
        while time.monotonic() < until:
            attend(q, k, v)
            torch.cuda.synchronize()
        for mark in marks:
            mark.record()
            attend(q, k, v)
    torch.cuda.synchronize()
    return [1e3 * a.elapsed_time(b) for a, b in itertools.pairwise(marks)]


if __name__ == "__main__":
    main()
