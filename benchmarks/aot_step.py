"""Compiles decode steps of published models for an H100 without one, and checks that none copies
weights or the cache.

    scripts/aot.sh --module benchmarks.aot_step

A step is new tokens through a few layers over a paged cache, up to the last hidden states; its
cache is donated. What it needs beside its arguments must be less than a layer's experts, and less
than a hundredth of the cache. What XLA puts into command buffers is recorded.
"""

import dataclasses
import functools
import json
import math
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks import thunks
from benchmarks.random_weights import Precision, param_shapes
from dskjax import paged
from dskjax.batch import RaggedBatch
from dskjax.cache import init_cache
from dskjax.config import ModelConfig, MtpConfig
from dskjax.presets import preset
from pallas_kernels.select import for_hopper
from pallas_kernels.testing.aot import AXIS, h100s

RESULTS = Path(__file__).parent / "results" / "aot-step.json"
LAYERS, BATCH, QUERIES, CONTEXT, PAGE = 4, 64, 2, 65536, 64
STEPS: dict[str, tuple[str, Precision, str]] = {
    "deepseek-v3 w4afp8": ("deepseek-v3", "w4afp8", "fp8"),
    "deepseek-v3 fp8": ("deepseek-v3", "fp8", "fp8"),
    "deepseek-v2-lite bf16": ("deepseek-v2-lite", "bf16", "auto"),
}
"""Preset, format of the weights, of the cache."""


def main() -> None:
    """Compiles, prints and records; fails if a step needs too much."""
    rows, problems = [], []
    for name, (model, precision, kv_dtype) in STEPS.items():
        moe = preset(model).moe
        assert moe is not None
        cfg = dataclasses.replace(
            preset(model),
            num_hidden_layers=LAYERS,
            first_k_dense_replace=1,
            mtp=MtpConfig(num_nextn_predict_layers=0),
        )
        row = {"step": name} | compiled(cfg, precision, kv_dtype)
        rows.append(row)
        print(json.dumps(row), flush=True)
        for what, limit in (
            ("a layer's experts", row["experts_bytes"]),
            ("a hundredth of the cache", row["cache_bytes"] / 100),
        ):
            if row["temp_bytes"] >= limit:
                problems.append(f"{name}: {row['temp_bytes']} bytes, {what} {limit:.0f}")
    if problems:
        sys.exit("\n".join(problems))
    shape = {"layers": LAYERS, "batch": BATCH, "queries": QUERIES, "context": CONTEXT}
    for row in rows:
        del row["seconds"]
    text = {"target": "one H100", "jax": jax.__version__} | shape | {"rows": rows}
    RESULTS.write_text(json.dumps(text, indent=1) + "\n")
    print(f"{len(rows)} steps copy neither weights nor caches; wrote {RESULTS}")


def compiled(cfg: ModelConfig, precision: Precision, kv_dtype: str) -> dict[str, Any]:
    """What one step needs, in bytes, and what it launches."""
    width = CONTEXT // PAGE
    cache = jax.eval_shape(
        functools.partial(
            init_cache,
            cfg,
            num_pages=BATCH * width,
            page_size=PAGE,
            dtype=jnp.bfloat16,
            kv_dtype=kv_dtype,
        )
    )
    mesh = Mesh(np.array(h100s(1)), (AXIS,))
    whole = NamedSharding(mesh, PartitionSpec())
    params = param_shapes(cfg, precision, unrolled=True)
    shape = jax.ShapeDtypeStruct
    rows = [shape(sizes, jnp.int32) for sizes in ((BATCH, QUERIES), (BATCH, width), (BATCH,))]
    args = jax.tree.map(lambda x: shape(x.shape, x.dtype, sharding=whole), (params, cache, *rows))

    def step(params: Any, cache: Any, tokens: Any, pages: Any, lens: Any) -> Any:
        new = RaggedBatch.uniform(tokens, pages, lens, "absorbed")
        return paged.forward(params, cache, new, cfg=cfg)

    # Kernels in Triton learn from the mesh what they are compiled for.
    spec = PartitionSpec()
    there = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
    begun = time.perf_counter()
    with for_hopper():
        lowered = jax.jit(there, donate_argnums=1).lower(*args)
    with tempfile.TemporaryDirectory() as folder:
        program = lowered.compile({"xla_dump_to": folder, "xla_dump_hlo_as_text": True})
        launches = thunks.of_dump(Path(folder))
    memory: Any = program.memory_analysis()
    return {
        "temp_bytes": memory.temp_size_in_bytes,
        "experts_bytes": _bytes(params["moe_layers"][0]["mlp"]["experts"]),
        "cache_bytes": _bytes(cache),
        "aliased_bytes": memory.alias_size_in_bytes,
        "launches": launches,
        "seconds": time.perf_counter() - begun,
    }


def _bytes(tree: Any) -> int:
    return sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(tree))


if __name__ == "__main__":
    main()
