"""Training steps of a slice of a published model on one GPU: tokens a second, MFU, kernels, memory.

    XLA_PYTHON_CLIENT_MEM_FRACTION=.94 python -m benchmarks.train_step \
        --model deepseek-v2-lite --layers 5 --remat nothing_saveable none --heads 1 --out STEP.json
    scripts/aot.sh --module benchmarks.train_step --compile-only ...    for an H100, without one

Parts are measured one after the other: pre-training with every `--impl` and `--remat`, then, with
`--heads`, MTP modules over the same slice, frozen, in bf16. Compute is bf16, masters and moments
are fp32. The batch stays on the device; its ids, and all weights, are random. MFU counts what
`train_mtp.flops` counts, in two shares: of the datasheet's peak and of large products on this card
in this run. A part that fails is a row with `failed`.
"""

import argparse
import contextlib
import dataclasses
import datetime
import functools
import inspect
import json
import re
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import numpy as np
from jax.sharding import Mesh, NamedSharding, PartitionSpec

from benchmarks.decode_step import by_kernel
from benchmarks.kernel_shares import rates, scopes, shares
from benchmarks.random_weights import param_shapes, random_like
from dskjax.checkpoint import load_config
from dskjax.config import ModelConfig, MtpConfig
from dskjax.params import count, nbytes
from dskjax.presets import PRESETS, preset
from dskjax.provenance import describe_devices, source_commit, versions
from dskjax.roofline import GPUS
from pallas_kernels.select import for_hopper
from pallas_kernels.testing.aot import AXIS, h100s
from pallas_kernels.testing.bench import Ceilings, Spread, measure_ceilings
from train_mtp import flops, loss
from train_mtp.data import Batch
from train_mtp.heads.recipe import HeadsRecipe
from train_mtp.heads.start import first_weights
from train_mtp.heads.step import head_step, teach
from train_mtp.optim import AdamW
from train_mtp.recipe import StepRecipe
from train_mtp.state import TrainState, abstract_state, make_state
from train_mtp.step import COMPILER_OPTIONS, Recipe, init_state, train_step

ATTENTION = "mla_prefill"
RUNS, WARM_UP = 25, 4
"""Steps of each method, and before them."""


@dataclasses.dataclass(frozen=True, kw_only=True)
class Part:
    """A kind of step.

    Attributes:
        name: what is trained.
        recipe: of the step.
        speed: what it counts, per token.
        kinds: operations of `speed` by kind of kernel; empty if they are not told apart.
        frozen: shapes of weights that are used and not trained.
        step: (state, frozen, batch) -> (state, metrics).
        start: the first state, from the frozen weights.
        options: what else sets it apart.
    """

    name: str
    recipe: StepRecipe
    speed: flops.Speed
    kinds: dict[str, float]
    frozen: Any
    step: Callable[[TrainState, Any, Batch], tuple[TrainState, dict[str, Any]]]
    start: Callable[[Any], TrainState]
    options: dict[str, Any]

    @property
    def facts(self) -> dict[str, Any]:
        """What a row says of the part before anything ran."""
        cfg, state = self.recipe.cfg, abstract_state(self.recipe)
        return {
            "part": self.name,
            "impl": self.recipe.impl,
            "remat": self.recipe.remat,
            "layers": cfg.num_hidden_layers,
            "dense_layers": cfg.num_dense_layers,
            **self.options,
            "trained_parameters": count(self.recipe.specs()),
            "state_bytes": nbytes(vars(state)),
            "frozen_bytes": nbytes(self.frozen),
            "flops_per_token": self.speed.flops,
        }


def main() -> None:
    """Runs every part, and writes the figures after each piece of one."""
    args = arguments()
    if args.chunk_mib is not None:
        loss.CHUNK_BYTES = args.chunk_mib << 20
    head = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": "compiled for one H100" if args.compile_only else describe_devices(),
        "commit": source_commit(),
        "versions": versions(),
        "command": " ".join(["python -m benchmarks.train_step", *sys.argv[1:]]),
        **{name: getattr(args, name) for name in ("model", "rows", "seq_len", "documents")},
        "logits_bytes": loss.CHUNK_BYTES,
    }
    look = compile_only
    if not args.compile_only:
        ceilings = measure_ceilings()  # while memory is free
        head["ceilings"] = dataclasses.asdict(ceilings)
        look = functools.partial(measure, ceilings=ceilings)
    rows: list[dict[str, Any]] = []

    def write() -> None:
        if args.out is not None:
            args.out.write_text(json.dumps(head | {"rows": rows}, indent=1) + "\n")

    for part in parts(args):
        row = part.facts
        rows.append(row)
        try:
            for found in look(part, args):
                row |= found
                write()
        except Exception as error:  # the parts after it may fit
            traceback.print_exc()
            row["failed"] = f"{type(error).__name__}: {error}"[:400]
            write()
        shown = {name: value for name, value in row.items() if name != "by_kernel"}
        print(json.dumps(shown), flush=True)
    failed = [row["failed"] for row in rows if "failed" in row]
    if any("RESOURCE_EXHAUSTED" not in message for message in failed):
        sys.exit("\n".join(failed))


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--model", default="deepseek-v2-lite", help="preset, or a folder")
    parser.add_argument(
        "--layers", type=int, default=4, help="of these as many are dense as in the model"
    )
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--seq-len", type=int, default=4096)
    parser.add_argument("--documents", type=int, default=1, help="of equal length, a row")
    parser.add_argument("--mtp", type=int, default=0, help="modules trained with the trunk")
    parser.add_argument("--heads", type=int, default=0, help="depths trained over a frozen trunk")
    parser.add_argument("--weights", choices=["independent", "shared"], default="independent")
    parser.add_argument("--top-k", type=int, default=512, help="of the trunk's law, for heads")
    parser.add_argument("--no-pretraining", action="store_true", help="heads alone")
    parser.add_argument("--impl", nargs="+", default=["auto"])
    parser.add_argument("--remat", nargs="+", default=["nothing_saveable"], help="see StepRecipe")
    parser.add_argument("--chunk-mib", type=int, help="of fp32 logits at one time")
    parser.add_argument("--compile-only", action="store_true", help="for an H100: memory, no times")
    parser.add_argument(
        "--once",
        action="store_true",
        help="with it: fail if XLA repeats kernels of the forward pass",
    )
    parser.add_argument("--out", type=Path)
    args = parser.parse_args()
    if args.seq_len % args.documents:
        parser.error(f"--seq-len {args.seq_len} is no multiple of --documents {args.documents}")
    if args.no_pretraining and not args.heads:
        parser.error("--no-pretraining without --heads leaves nothing to measure")
    return args


# ------------------------------------------------------------------ parts


def parts(args: argparse.Namespace) -> Iterator[Part]:
    """What the command line asks for."""
    cfg = preset(args.model) if args.model in PRESETS else load_config(Path(args.model))
    dense = min(cfg.first_k_dense_replace, 1)  # V3's three would be nearly all of a slice
    if args.layers < cfg.num_hidden_layers:
        cfg = dataclasses.replace(cfg, num_hidden_layers=args.layers, first_k_dense_replace=dense)
    for impl in args.impl:
        for remat in args.remat:
            how = {"impl": impl, "remat": remat, "optimizer": AdamW(lr=1e-4, warmup=8, steps=1000)}
            if not args.no_pretraining:
                yield pretraining(with_modules(cfg, args.mtp), args, how)
            if args.heads:
                yield heads(cfg, args, how)


def with_modules(cfg: ModelConfig, modules: int, **scheme: Any) -> ModelConfig:
    """The model with so many MTP modules."""
    mtp = MtpConfig(num_nextn_predict_layers=modules, **scheme)
    return dataclasses.replace(cfg, mtp=mtp)


def pretraining(cfg: ModelConfig, args: argparse.Namespace, how: dict[str, Any]) -> Part:
    """All weights learn."""
    recipe, length = Recipe(cfg=cfg, **how), args.seq_len // args.documents
    kinds = {} if args.mtp else flops.trunk_kinds(cfg, length)
    return Part(
        name="pretraining",
        recipe=recipe,
        speed=flops.pretraining(cfg, length, recipe.precision),
        kinds={kind: 3 * each for kind, each in kinds.items()},
        frozen={},
        # Options of the compiler are for the outermost program.
        step=lambda state, _, batch: inspect.unwrap(train_step)(state, batch, recipe=recipe),
        start=lambda _: init_state(recipe, 0),
        options={"modules": args.mtp},
    )


def heads(cfg: ModelConfig, args: argparse.Namespace, how: dict[str, Any]) -> Part:
    """Modules learn from a frozen trunk: its pass and theirs in one program."""
    shared = args.weights == "shared"
    scheme = "recycled" if shared else "chain"
    trained = with_modules(cfg, 1 if shared else args.heads, mtp_scheme=scheme)
    recipe = HeadsRecipe(
        cfg=trained, depths=args.heads, weights=args.weights, top_k=args.top_k, **how
    )
    trunk = with_modules(cfg, 0)

    def step(state: TrainState, frozen: Any, batch: Batch) -> Any:
        taught = teach(frozen, batch, recipe=recipe)
        return head_step(state, frozen, batch, taught, recipe=recipe)

    def start(frozen: Any) -> TrainState:
        options: Any = {"trunk": trunk, "recipe": recipe, "init": "random"}
        return make_state(recipe, first_weights, frozen, jax.random.key(0), **options)

    length = args.seq_len // args.documents
    return Part(
        name="heads",
        recipe=recipe,
        speed=flops.heads(trained, args.heads, length, recipe.precision),
        kinds={},
        frozen=param_shapes(trunk, "bf16"),
        step=step,
        start=start,
        options={"depths": args.heads, "weights": args.weights, "top_k": args.top_k},
    )


def random_batch(cfg: ModelConfig, rows: int, seq_len: int, documents: int) -> Batch:
    """Rows full of documents of one length, of random ids."""
    shape, length = (rows, seq_len), seq_len // documents
    tokens = np.random.default_rng(0).integers(0, cfg.vocab_size, shape, np.int32)
    column = np.arange(seq_len)
    segments = np.broadcast_to(column // length + 1, shape).astype(np.int32)
    positions = np.broadcast_to(column % length, shape).astype(np.int32)
    return Batch(tokens, segments, positions)


# ------------------------------------------------------------------ compiling


def compiled(part: Part, batch: Batch, mesh: Mesh | None = None) -> tuple[Any, dict[str, Any]]:
    """The step's program, and what compiling it told.

    Args:
        part: what to compile.
        batch: arrays or shapes.
        mesh: of a device that is not there; None is the default device.
    """
    args, step = (abstract_state(part.recipe), part.frozen, batch), part.step
    if mesh is not None:
        # Kernels in Triton learn from the mesh what they are compiled for.
        spec = PartitionSpec()
        there = NamedSharding(mesh, spec)
        step = jax.shard_map(step, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False)
        args = jax.tree.map(lambda x: jax.ShapeDtypeStruct(x.shape, x.dtype, sharding=there), args)
    begun = time.perf_counter()
    with for_hopper() if mesh is not None else contextlib.nullcontext():
        jitted = jax.jit(step, donate_argnums=0, compiler_options=COMPILER_OPTIONS)
        program = jitted.lower(*args).compile()
    memory: Any = program.memory_analysis()
    return program, {
        "compile_s": time.perf_counter() - begun,
        "temp_bytes": memory.temp_size_in_bytes,
        "argument_bytes": memory.argument_size_in_bytes,
        "aliased_bytes": memory.alias_size_in_bytes,
    }


def compile_only(part: Part, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Memory of the step on an H100, and which kernels it has. cuDNN cannot be asked without a GPU:
    what it would do for attention is in plain JAX there.
    """
    batch = random_batch(part.recipe.cfg, args.rows, args.seq_len, args.documents)
    mesh = Mesh(np.array(h100s(1)), (AXIS,))
    program, found = compiled(part, batch, mesh)
    calls = re.findall(r'custom_call_target="mosaic_gpu[^\n]*?/(\w+)/mpmd_map', program.as_text())
    needed = found["temp_bytes"] + found["argument_bytes"]
    kernels = {name: calls.count(name) for name in sorted(set(calls))}
    yield found | {"fits_h100": needed < GPUS["h100"].memory, "kernels": kernels}
    stacks = bool(part.recipe.cfg.num_dense_layers) + bool(part.recipe.cfg.moe)
    if args.once and kernels.get(ATTENTION) != stacks:
        sys.exit(f"{stacks} stacks of layers have {ATTENTION} once each, but there are {kernels}")


# ------------------------------------------------------------------ measuring


def measure(part: Part, args: argparse.Namespace, ceilings: Ceilings) -> Iterator[dict[str, Any]]:
    """Compiles and times a part; what is found comes piece by piece.

    Args:
        part: what to measure.
        args: sizes.
        ceilings: of the device.
    """
    batch = random_batch(part.recipe.cfg, args.rows, args.seq_len, args.documents)
    # Before there are weights: XLA tries products out, and needs memory for that.
    program, found = compiled(part, batch)
    yield found
    frozen, batch = random_like(part.frozen), jax.device_put(batch)
    state, metrics = part.start(frozen), {}

    def run(steps: int, state: Any) -> Any:
        nonlocal metrics
        for _ in range(steps):
            state, metrics = program(state, frozen, batch)
        return jax.block_until_ready(state)

    state = run(WARM_UP, state)
    times = []
    for _ in range(RUNS):
        begun = time.perf_counter()
        state = run(1, state)
        times.append(1e6 * (time.perf_counter() - begun))
    begun = time.perf_counter()
    state = run(RUNS, state)
    together = 1e6 * (time.perf_counter() - begun) / RUNS
    yield timed(part, times, together, batch.tokens.size, ceilings) | {
        "peak_bytes_in_use": (jax.devices()[0].memory_stats() or {}).get("peak_bytes_in_use"),
        "metrics": {name: np.asarray(value).tolist() for name, value in metrics.items()},
    }
    if jax.default_backend() == "gpu":
        kernels = by_kernel(functools.partial(run, 1), state)
        found = shares(kernels, scopes(program.as_text()))
        kinds = {kind: each * batch.tokens.size for kind, each in part.kinds.items()}
        yield found | {
            "tflops_by_kind": rates(kinds, found["by_kind_us"]),
            "by_kernel": kernels[:60],
        }


def timed(
    part: Part, times: list[float], together: float, tokens: int, ceilings: Ceilings
) -> dict[str, Any]:
    """Times in microseconds, and rates of steps that were enqueued one after the other."""
    rate = 1e6 * tokens / together
    reached = rate * part.speed.flops
    return {
        "step_us": dataclasses.asdict(Spread.of(times)),
        "back_to_back_us": together,
        "tokens_per_s": rate,
        "tflops": reached / 1e12,
        "mfu": part.speed.mfu(rate),
        "mfu_of_ceiling": reached / (ceilings.matmul_tflops * 1e12),
    }


if __name__ == "__main__":
    main()
