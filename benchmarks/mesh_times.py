"""Times of the steps of a `mesh_slice.Slice`, and what its GPUs spend them on."""

import dataclasses
import functools
import time
from collections.abc import Callable
from typing import Any

import jax
import numpy as np

from benchmarks.decode_step import by_kernel
from benchmarks.mesh_slice import Slice
from dskjax.axes import Sharding
from dskjax.decode.ranks import Ranks
from dskjax.mesh import make_mesh
from dskjax.params import Params
from pallas_kernels.testing.bench import Spread

RUNS, TOGETHER = 15, 4
"""Samples, and steps of a sample."""
KINDS = {
    "exchange": ("nccl", "peer_exchange", "all_to_all"),
    "attention": ("mla", "attention", "flash"),
    "experts": ("grouped_matmul", "swiglu", "act_quant", "permute", "combine", "router", "route"),
}
"""Words in the names of kernels; the others are "rest": dense products, norms, sampling, copies."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Load:
    """What every GPU has to do in a step.

    Attributes:
        batch: sequences that decode; 0 decodes nothing.
        context: their cached tokens.
        drafts: tokens that each drafts and verifies.
        chunk: prompt tokens that are prefilled beside; 0 prefills nothing.
    """

    batch: int = 0
    context: int = 4096
    drafts: int = 0
    chunk: int = 0


def measure(
    model: Slice, params: Params, load: Load, *, acceptance: float, kernels: bool = False
) -> dict[str, Any]:
    """Compiles a step and times it.

    Args:
        model: the slice.
        params: its weights.
        load: of every GPU.
        acceptance: simulated, of a draft.
        kernels: also sum the times of kernels, which takes a second profiler.

    Returns:
        The load, `step_us` (of steps enqueued one after the other), `tokens` (new ones of a
        sequence and step, counted), rates a GPU and second, and bytes.
    """
    config = model.config(load.drafts, acceptance)
    slots = max(load.batch, 1)
    state = model.state(config, slots, load.context)
    decode = model.decode_rows(config, slots, load.context) if load.batch else None
    prefill = model.prefill_rows(config, load.chunk, load.context) if load.chunk else None
    program = model.program(config).lower(params, state, decode, prefill).compile()
    counts: list[jax.Array] = []

    def run(steps: int, state: Any) -> Any:
        for _ in range(steps):
            state, output = program(params, state, decode, prefill)
            if output is not None:
                counts.append(output.count)
        return jax.block_until_ready(state)

    state = run(3, state)
    counts.clear()
    samples = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        state = run(TOGETHER, state)
        samples.append(1e6 * (time.perf_counter() - begun) / TOGETHER)
    step = Spread.of(samples)
    tokens = float(np.mean([np.asarray(count).mean() for count in counts])) if counts else 0.0
    gpus, ranks = model.gpus, model.ranks.count
    found = {
        **dataclasses.asdict(load),
        "step_us": dataclasses.asdict(step),
        "tokens": tokens,
        "decoded_per_second_per_gpu": 1e6 * tokens * load.batch * ranks / gpus / step.median,
        "prefilled_per_second_per_gpu": 1e6 * load.chunk * ranks / gpus / step.median,
        "temp_bytes": program.memory_analysis().temp_size_in_bytes,
        "bytes_in_use": in_use(model),
    }
    if kernels:
        found["kernels_us"] = by_kind(functools.partial(run, 1), state, model.gpus)
    return found


def in_use(model: Slice) -> int | None:
    """The most bytes that a GPU of the mesh has held so far; None where it does not say."""
    stats = [device.memory_stats() or {} for device in model.ranks.sharding.mesh.devices.flat]
    return max((s.get("peak_bytes_in_use", 0) for s in stats), default=0) or None


def by_kind(run: Callable[[Any], Any], state: Any, gpus: int) -> dict[str, Any]:
    """Microseconds of one step a GPU, by what they are spent on, and the longest kernels. The time
    of an exchange includes waiting for the others.
    """
    found = by_kernel(run, state)
    kinds = dict.fromkeys((*KINDS, "rest"), 0.0)
    for name, us, _ in found:
        words = ((kind, word) for kind, all_words in KINDS.items() for word in all_words)
        kind = next((kind for kind, word in words if word in name.lower()), "rest")
        kinds[kind] += us / gpus
    longest = [[name, us / gpus, count / gpus] for name, us, count in found[:12]]
    return kinds | {"longest": longest}


def same_tokens(model: Slice, params: Params, *, batch: int, context: int) -> dict[str, float]:
    """Part of the tokens and drafts of a mesh's step that one GPU chooses too, with the same
    weights, caches and sequences. Random weights leave many choices to rounding; an exchange that
    loses rows leaves none.
    """
    mesh = model.ranks.sharding.mesh
    alone_mesh = make_mesh(devices=list(mesh.devices.flat[:1]))
    one = dataclasses.replace(model, ranks=Ranks(Sharding(alone_mesh, model.ranks.sharding.rules)))
    config = model.config(1, None)
    state = model.state(config, batch, context, temperature=0.0)
    rows = model.decode_rows(config, batch, context)
    ranks = model.ranks.count
    pages = batch * model.width(context)
    offsets = np.repeat(np.arange(ranks, dtype=np.int32), batch)[:, None] * pages
    alone = dataclasses.replace(
        rows,
        slots=np.arange(batch * ranks, dtype=np.int32),
        page_table=np.asarray(rows.page_table) + offsets,
        draft_scale=np.asarray(rows.draft_scale),
    )
    there = jax.device_put(state, one.ranks.state(state))
    few, _ = one.program(config)(
        jax.device_put(params, one.where_params()), there, one.ranks.place(alone), None
    )
    all_, _ = model.program(config)(params, state, rows, None)
    equal = lambda name: float(  # noqa: E731
        (np.asarray(getattr(all_, name)) == np.asarray(getattr(few, name))).mean()
    )
    return {"tokens": equal("last_token"), "drafts": equal("drafts")}
