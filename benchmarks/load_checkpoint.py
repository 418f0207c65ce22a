"""Loading a checkpoint against just reading its files, and the memory it takes beside the result.

    python benchmarks/load_checkpoint.py --out benchmarks/results/load-checkpoint.json

Writes checkpoints of random values (bf16; fp8 with 128x128 block scales), several shards each, and
measures every one in processes of their own. Time: `load_hf`, and in turn with it one thread that
reads the same files by preadv into one reused buffer; from the page cache, and `cold` from the disk
(before each run the kernel is told to drop the files). Memory:
the largest RssAnon while loading, beyond what the process had before and what the result takes.
Where other work runs, `--realtime` makes it wait while times are taken.
"""

import argparse
import dataclasses
import datetime
import functools
import json
import math
import os
import statistics
import subprocess
import sys
import tempfile
import threading
import time
from pathlib import Path
from typing import Any

import jax
import ml_dtypes
import numpy as np

from dskjax.checkpoint import load_hf, names
from dskjax.checkpoint.safetensors import Pending, write
from dskjax.checkpoint.shards import INDEX
from dskjax.config import ModelConfig
from dskjax.mesh import make_mesh, preset
from dskjax.presets import deepseek_v3
from dskjax.provenance import describe_devices, source_commit, versions

BLOCK = 128
KINDS = {
    "bf16": {"name": "bf16", "quantised": "keep"},
    "bf16, separate layers": {"name": "bf16", "quantised": "keep", "layers": "separate"},
    "fp8": {"name": "fp8", "quantised": "keep"},
    "fp8, 8 simulated devices": {"name": "fp8", "quantised": "keep", "mesh": {"dp": 4, "tp": 2}},
    "fp8, dequantised": {"name": "fp8", "quantised": "dequantise", "fraction": 0.5},
}
"""What is measured: files, and how they are loaded; `mesh`: of CPU devices, with the rules "train";
`fraction`: of the size.
"""


def main() -> None:
    """Makes the checkpoints, measures each and writes the figures."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--mb", type=int, default=2200, help="bytes of each checkpoint, in 10^6")
    parser.add_argument("--shards", type=int, default=8)
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--kinds", nargs="*", default=list(KINDS), choices=list(KINDS))
    parser.add_argument("--realtime", action="store_true", help="needs root")
    parser.add_argument("--what", nargs="*", default=["time", "memory"])
    parser.add_argument("--scratch", type=Path, help="where to write; default: a temporary folder")
    parser.add_argument("--out", type=Path)
    parser.add_argument("--child", nargs=2, metavar=("KIND", "WHAT"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        kind, what = args.child
        if args.realtime:
            os.sched_setscheduler(0, os.SCHED_FIFO, os.sched_param(5))
        measure = {"time": functools.partial(time_both, runs=args.runs), "memory": peak_memory}
        print(json.dumps(measure[what](args.scratch, options_of(kind))))
        return
    results = {}
    for kind in args.kinds:
        with tempfile.TemporaryDirectory(dir=args.scratch) as folder:
            size = int(args.mb * 1e6 * KINDS[kind].get("fraction", 1))
            made = make(Path(folder), KINDS[kind]["name"] == "fp8", size, args.shards)
            results[kind] = made
            for what in args.what:
                options = ["--realtime"] if args.realtime and what == "time" else []
                results[kind] |= in_child(folder, kind, what, ["--runs", str(args.runs), *options])
        print(kind, json.dumps(results[kind]), file=sys.stderr)
    report = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "machine": {"device": describe_devices(), "load_average": os.getloadavg()[0]},
        "commit": source_commit(),
        "versions": versions(),
        "runs": args.runs,
        "realtime": args.realtime,
        "results": results,
    }
    text = json.dumps(report, indent=2)
    if args.out is not None:
        args.out.write_text(text + "\n")
    print(text)


def options_of(kind: str) -> dict[str, Any]:
    """Options of `load_hf` for one of `KINDS`; makes the devices that they name."""
    told = KINDS[kind]
    options = {name: told[name] for name in ("quantised", "layers") if name in told}
    if "mesh" in told:
        jax.config.update("jax_num_cpu_devices", math.prod(told["mesh"].values()))
        options["sharding"] = preset("train", make_mesh(**told["mesh"]))
    return options


def in_child(folder: str, kind: str, what: str, options: list[str]) -> dict[str, Any]:
    """One measurement, in a process that has done nothing else."""
    command = [sys.executable, __file__, "--child", kind, what, "--scratch", folder, *options]
    run = subprocess.run(command, stdout=subprocess.PIPE, check=True)
    return json.loads(run.stdout)


def make(folder: Path, fp8: bool, size: int, shards: int) -> dict[str, Any]:
    """Writes a checkpoint of about `size` bytes; its layers lie one after the other."""
    cfg = model_of(size if fp8 else size // 2)
    tensors = []
    for slot in sorted(names.slots(cfg), key=lambda slot: names.layer_of(slot.name)):
        quantised = fp8 and names.is_linear(slot.leaf)
        bits = np.dtype(ml_dtypes.float8_e4m3fn if quantised else ml_dtypes.bfloat16)
        tensors.append(random_bits(slot.name, bits, slot.shape))
        if quantised:
            shape = tuple(-(-n // BLOCK) for n in slot.shape)
            name = f"{slot.name}_scale_inv"
            ones = functools.partial(np.full, shape, 2.0**-9, np.float32)
            tensors.append(Pending(name, np.dtype(np.float32), shape, ones))
    total = sum(tensor.nbytes for tensor in tensors)
    weight_map, parts, end = {}, [[] for _ in range(shards)], 0
    for tensor in tensors:
        at = min(end * shards // total, shards - 1)
        parts[at].append(tensor)
        weight_map[tensor.name] = f"model-{at + 1:05d}-of-{shards:05d}.safetensors"
        end += tensor.nbytes
    for at, part in enumerate(parts):
        write(folder / f"model-{at + 1:05d}-of-{shards:05d}.safetensors", part, {"format": "pt"})
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": weight_map}))
    config = cfg.to_hf()
    if fp8:
        block = {"quant_method": "fp8", "fmt": "e4m3", "weight_block_size": [BLOCK, BLOCK]}
        config["quantization_config"] = block
    (folder / "config.json").write_text(json.dumps(config))
    files = [path.stat().st_size for path in folder.glob("*.safetensors")]
    return {
        "bytes": sum(files),
        "shards": len(files),
        "largest_shard_bytes": max(files),
        "largest_tensor_bytes": max(tensor.nbytes for tensor in tensors),
        "tensors": len(tensors),
        "layers": cfg.num_hidden_layers,
    }


def random_bits(name: str, dtype: np.dtype, shape: tuple[int, ...]) -> Pending:
    """A tensor of any bits but those of NaN and infinity; they are drawn when it is written."""
    seed = [len(name), *name.encode()]
    nbytes = math.prod(shape) * dtype.itemsize

    def draw() -> np.ndarray:
        drawn = np.frombuffer(np.random.default_rng(seed).bytes(nbytes), np.uint8) & 0xBE
        return drawn.view(dtype).reshape(shape)

    return Pending(name, dtype, shape, draw)


def model_of(values: int) -> ModelConfig:
    """A model of DeepSeek-V3's shape with about this many weights; larger ones have more layers."""
    width = 4096 if values > 500_000_000 else 512  # an expert's matrix: 8.4M values, V3's has 14.7M
    base = deepseek_v3()
    assert base.moe is not None
    cfg = dataclasses.replace(
        base,
        vocab_size=8192,
        hidden_size=width,
        intermediate_size=2 * width,
        num_attention_heads=width // 128,
        num_hidden_layers=2,
        first_k_dense_replace=1,
        mla=dataclasses.replace(base.mla, q_lora_rank=width // 2, kv_lora_rank=width // 4),
        moe=dataclasses.replace(
            base.moe,
            n_routed_experts=8,
            n_group=4,
            topk_group=2,
            num_experts_per_tok=2,
            moe_intermediate_size=width // 2,
        ),
    )
    sizes = [0, 0, 0]
    for slot in names.slots(cfg):
        layer = names.layer_of(slot.name)
        sizes[layer if layer in (0, 1) else 2] += math.prod(slot.shape)
    layers = max(1, round((values - sizes[0] - sizes[2]) / sizes[1]))
    return dataclasses.replace(cfg, num_hidden_layers=1 + layers)


def time_both(folder: Path, options: dict[str, Any], runs: int) -> dict[str, Any]:
    """Seconds from the page cache, and under `cold` from the disk."""
    warm = time_loads(folder, options, runs, cold=False)
    return warm | {"cold": time_loads(folder, options, runs, cold=True)}


def time_loads(folder: Path, options: dict[str, Any], runs: int, *, cold: bool) -> dict[str, Any]:
    """Seconds to load and to read, taken in turns after one of each that does not count; `cold`:
    each from the disk.
    """
    plain, load, buffer = [], [], bytearray(8 << 20)
    total = sum(path.stat().st_size for path in folder.glob("*.safetensors"))
    for _ in range(runs + 1):
        if cold:
            forget(folder)
        begun = time.perf_counter()
        read_all(folder, buffer)
        plain.append(time.perf_counter() - begun)
        if cold:
            forget(folder)
        begun = time.perf_counter()
        params, _ = load_hf(folder, **options)
        load.append(time.perf_counter() - begun)
        del params
    plain, load = plain[1:], load[1:]
    return {
        "load_s": spread(load),
        "load_gb_s": total / statistics.median(load) / 1e9,
        "plain_read_s": spread(plain),
        "plain_read_gb_s": total / statistics.median(plain) / 1e9,
        "ratio": statistics.median(load) / statistics.median(plain),
    }


def forget(folder: Path) -> None:
    """Drops the files from the page cache."""
    for path in folder.glob("*.safetensors"):
        with open(path, "rb") as file:
            os.fsync(file.fileno())  # what is not on the disk yet would stay
            os.posix_fadvise(file.fileno(), 0, 0, os.POSIX_FADV_DONTNEED)


def spread(seconds: list[float]) -> dict[str, float]:
    """Median and both ends."""
    return {"median": statistics.median(seconds), "min": min(seconds), "max": max(seconds)}


def read_all(folder: Path, buffer: bytearray) -> None:
    """Reads every file from front to back into one buffer."""
    for path in sorted(folder.glob("*.safetensors")):
        with open(path, "rb") as file:
            at = 0
            while got := os.preadv(file.fileno(), [buffer], at):
                at += got


def peak_memory(folder: Path, options: dict[str, Any]) -> dict[str, Any]:
    """Largest RssAnon of a load beyond what was there before and the part of the result that is in
    the host's memory, in bytes.
    """
    jax.block_until_ready(jax.device_put(np.zeros(8)))  # the backend's own memory comes first
    before = rss_anon()
    largest, done = before, threading.Event()

    def watch() -> None:
        nonlocal largest
        while not done.wait(0.002):
            largest = max(largest, rss_anon())

    watcher = threading.Thread(target=watch)
    watcher.start()
    params, _ = load_hf(folder, **options)
    done.set()
    watcher.join()
    arrays = jax.tree.leaves(params)
    in_host = sum(array.nbytes for array in arrays if is_on_host(array))
    return {
        "result_bytes": sum(array.nbytes for array in arrays),
        "peak_anon_above_result_bytes": max(largest, rss_anon()) - before - in_host,
    }


def is_on_host(array: jax.Array) -> bool:
    """Whether an array lies in the memory of this process."""
    return all(device.platform == "cpu" for device in array.sharding.device_set)


def rss_anon() -> int:
    """Anonymous memory of this process, in bytes; files in the page cache do not count."""
    with open("/proc/self/status", encoding="ascii") as file:
        (line,) = (line for line in file if line.startswith("RssAnon:"))
    return int(line.split()[1]) * 1024


if __name__ == "__main__":
    main()
