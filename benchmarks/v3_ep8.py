"""The whole DeepSeek-V3 on the GPUs of one host: attention-DP, experts split over all of them.

    python -m benchmarks.v3_ep8 --plan                            memory, bytes sent, floors
    python -m benchmarks.v3_ep8 --out benchmarks/results          all measurements
    python -m benchmarks.v3_ep8 --layers 4 --parts decode check   a slice, on 2 GPUs say
    scripts/aot.sh --module benchmarks.v3_ep8 --compile 8         for 8 H100s, without one

Weights are random, of the true shapes, made on the devices: experts in int4, the rest in fp8, the
latent cache in fp8. Whether drafts are accepted is simulated. Parts:

    check     tokens of the mesh beside those of one GPU, on 4 layers
    decode    steps of 0, 1 and 2 drafts, by batch and context, with the times of their kernels
    prefill   prompts in chunks
    eplb      Zipf-like loads of experts, with and without redundant experts placed by plan
    pd        rates within 20 to 100 ms a token: halves for prefill and decode, or all for both
"""

import argparse
import dataclasses
import datetime
import json
import math
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jax.sharding import Mesh
from rich.console import Console

from benchmarks import goodput
from benchmarks.mesh_slice import Slice, config_of
from benchmarks.mesh_times import Load, measure, same_tokens
from benchmarks.v3_report import draw
from dskjax.commands.mesh_tables import Plan, collectives_table, memory_table, mesh_step
from dskjax.decode.ranks import Ranks
from dskjax.eplb import Layout, gpu_loads, imbalance, plain_loads, plan
from dskjax.expert_parallel.replicas import default_plan, tables
from dskjax.mesh import make_mesh, parse_mesh, preset
from dskjax.provenance import describe_devices, source_commit, versions
from dskjax.roofline import GPUS, Experts
from dskjax.traffic import MeshSize
from pallas_kernels.select import for_hopper
from pallas_kernels.testing.aot import h100s

PARTS = ("check", "decode", "prefill", "eplb", "pd")
CHECKED_LAYERS = 4
LIMITS = (20, 30, 40, 50, 75, 100)
"""Milliseconds a token."""
REQUESTS = goodput.Requests(prompt=4096, output=1024)
ZIPF = 1.0


def main() -> None:
    """Runs the parts and writes the figures after each."""
    args = arguments()
    if args.compile:
        compile_ahead(args)
        return
    if args.plan:
        show_plan(args)
        return
    report: dict[str, Any] = {
        "date": datetime.datetime.now(datetime.UTC).isoformat(timespec="seconds"),
        "device": describe_devices(),
        "commit": source_commit(),
        "versions": versions(),
        "command": " ".join(["python -m benchmarks.v3_ep8", *sys.argv[1:]]),
        "mesh": args.mesh or f"ep={jax.device_count()}",
        "preset": args.preset,
        "layers": args.layers or config_of(args.preset, None).num_hidden_layers,
        "impl": args.impl,
        "acceptance_simulated": args.acceptance,
        "rows": [],
    }
    for part in args.parts:
        for row in rows_of(part, args):
            report["rows"].append({"part": part} | row)
            print(json.dumps(report["rows"][-1]), flush=True)
            if args.out is not None:
                path = args.out / f"{args.name}.json"
                path.write_text(json.dumps(report, indent=1) + "\n")
    if args.out is not None:
        draw(report, args.out / f"{args.name}.png")


def rows_of(part: str, args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """What a part measures; if its weights do not fit, a row that says so."""
    try:
        yield from RUN[part](args)
    except jax.errors.JaxRuntimeError as error:
        yield too_large(error)


def too_large(error: Exception) -> dict[str, Any]:
    """A row for what does not fit; other errors are raised again."""
    if "RESOURCE_EXHAUSTED" not in str(error):
        raise error
    return {"failed": str(error).splitlines()[0][:200]}


def arguments() -> argparse.Namespace:
    """Of the command line."""
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    add = parser.add_argument
    add("--preset", default="deepseek-v3")
    add("--layers", type=int, help="fewer, where memory is short")
    add("--mesh", default="", help='as "ep=8"; all GPUs on ep if empty')
    add("--impl", default="auto")
    add("--precision", default="w4afp8", choices=("bf16", "fp8", "w4afp8"))
    add("--batch", type=int, nargs="+", default=[1, 8, 32, 64, 128, 256], help="a GPU")
    add("--context", type=int, nargs="+", default=[2048, 4096])
    add("--drafts", type=int, nargs="+", default=[0, 1, 2])
    add("--chunk", type=int, default=2048, help="prompt tokens a GPU and step")
    add("--acceptance", type=float, default=0.85, help="simulated, of a draft")
    add("--redundant", type=int, default=32, help="experts more in each layer, for eplb")
    add("--parts", nargs="+", default=PARTS, choices=PARTS)
    add("--plan", action="store_true", help="no measurement")
    add("--gpus", type=int, default=8, help="of the plan")
    add("--gpu", default="h100", choices=GPUS, help="of the plan")
    add("--compile", type=int, default=0, metavar="GPUS", help="for so many H100s, without them")
    add("--out", type=Path, metavar="DIR")
    add("--name", default="v3-ep8", help="of the files in DIR")
    return parser.parse_args()


def slice_on(
    args: argparse.Namespace,
    *,
    layers: int | None,
    redundant: int = 0,
    devices: list[Any] | None = None,
) -> Slice:
    """The model on a mesh: `--mesh`, or all of `devices` on ep."""
    found = list(jax.devices() if devices is None else devices)
    sizes = parse_mesh(args.mesh) if devices is None and args.mesh else {"ep": len(found)}
    mesh = make_mesh(**sizes, devices=found)
    return slice_over(args, mesh, layers=layers, redundant=redundant)


def slice_over(
    args: argparse.Namespace, mesh: Mesh, *, layers: int | None, redundant: int = 0
) -> Slice:
    """The model on this mesh."""
    return Slice(
        cfg=config_of(args.preset, layers, redundant),
        ranks=Ranks(preset("decode", mesh)),
        precision=args.precision,
        impl=args.impl,
    )


# ---------------------------------------------------------------------- parts


def check(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """One GPU and all of them choose the same tokens."""
    layers = min(args.layers or CHECKED_LAYERS, CHECKED_LAYERS)
    model = slice_on(args, layers=layers)
    yield same_tokens(model, model.params(), batch=16, context=1024) | {"layers": layers}


def decode(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Every load that fits."""
    model = slice_on(args, layers=args.layers)
    params = model.params()
    for context in args.context:
        for drafts in args.drafts:
            for batch in args.batch:
                load = Load(batch=batch, context=context, drafts=drafts)
                yield timed(model, params, load, args, kernels=True) | bound(args, model, load)


def prefill(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """A chunk at the end of a prompt of each context."""
    model = slice_on(args, layers=args.layers)
    params = model.params()
    for context in args.context:
        load = Load(context=context, chunk=min(args.chunk, context))
        yield timed(model, params, load, args, kernels=True)


def eplb(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """The same step under uneven loads: experts as they are, then placed by their counts."""
    load = Load(batch=max(args.batch), context=min(args.context))
    model = slice_on(args, layers=args.layers)
    params = with_bias(model, model.params())
    counts = count_experts(model, params, load)
    even = plain_loads(counts, model.ranks.count)
    assert even is not None  # the mesh has been accepted
    row = timed(model, params, load, args)
    yield row | {"redundant": 0, "max_over_mean": float(imbalance(even).mean())}
    placed = slice_on(args, layers=args.layers, redundant=args.redundant)
    moe = placed.cfg.moe
    assert moe is not None
    layout = Layout(num_replicas=moe.num_slots, num_gpus=placed.ranks.count)
    found = plan(counts, layout)
    params = with_maps(placed, with_bias(placed, placed.params()), found.phy2log)
    planned = imbalance(gpu_loads(counts, found.phy2log, layout.num_gpus))
    row = timed(placed, params, load, args)
    yield row | {"redundant": args.redundant, "max_over_mean": float(planned.mean())}


def pd(args: argparse.Namespace) -> Iterator[dict[str, Any]]:
    """Times on half of the GPUs, and of mixed steps on all of them; the rates they allow."""
    devices = list(jax.devices())
    if len(devices) < 2:
        raise ValueError("--parts pd needs 2 GPUs or more, a half for each role")
    drafts, context = max(args.drafts), REQUESTS.prompt
    half = slice_on(args, layers=args.layers, devices=devices[: len(devices) // 2])
    whole = slice_on(args, layers=args.layers)
    good: dict[str, list[dict[str, Any]]] = {"half": [], "prefill": [], "whole": [], "mixed": []}
    for model in (half, whole):
        params = model.params()
        for name, load in loads_of("half" if model is half else "whole", args, drafts, context):
            row = timed(model, params, load, args)
            yield {"on": name} | row
            if "step_us" in row:
                good[name].append(row)
        del params
    for limit in LIMITS:
        yield {
            "limit_ms": limit,
            **dataclasses.asdict(REQUESTS),
            "apart": goodput.apart(good["half"], good["prefill"], REQUESTS, limit)._asdict(),
            "together": goodput.together(good["whole"], good["mixed"], REQUESTS, limit)._asdict(),
        }


def loads_of(
    on: str, args: argparse.Namespace, drafts: int, context: int
) -> Iterator[tuple[str, Load]]:
    """(what it is for, load): prefill and decode apart on half of the GPUs, or mixed on all."""
    if on == "half":
        yield "prefill", Load(context=context, chunk=args.chunk)
    for batch in args.batch:
        load = Load(batch=batch, context=context, drafts=drafts)
        yield on, load
        if on == "whole":
            yield "mixed", dataclasses.replace(load, chunk=args.chunk)


RUN: dict[str, Callable[[argparse.Namespace], Iterator[dict[str, Any]]]] = {
    "check": check,
    "decode": decode,
    "prefill": prefill,
    "eplb": eplb,
    "pd": pd,
}


def timed(
    model: Slice, params: Any, load: Load, args: argparse.Namespace, *, kernels: bool = False
) -> dict[str, Any]:
    """A measurement, or why there is none: larger loads may not fit."""
    try:
        return measure(model, params, load, acceptance=args.acceptance, kernels=kernels)
    except jax.errors.JaxRuntimeError as error:
        return dataclasses.asdict(load) | too_large(error)


# ---------------------------------------------------------------------- loads of experts


def with_bias(model: Slice, params: Any) -> Any:
    """Gates that prefer some experts: a bias that falls like a Zipf law over a random order."""
    moe = model.cfg.moe
    assert moe is not None
    rng = np.random.default_rng(4)
    where = model.where_params()["moe_layers"][0]["mlp"]["gate"]["e_score_correction_bias"]

    def layer(weights: Any) -> Any:
        law = (1 + rng.permutation(moe.n_routed_experts)) ** -ZIPF
        bias = jax.device_put(jnp.asarray(law, jnp.float32), where)
        gate = weights["mlp"]["gate"] | {"e_score_correction_bias": bias}
        return weights | {"mlp": weights["mlp"] | {"gate": gate}}

    return params | {"moe_layers": tuple(map(layer, params["moe_layers"]))}


def with_maps(model: Slice, params: Any, phy2log: np.ndarray) -> Any:
    """Says which slots hold an expert: in the trunk by plan, in MTP modules the first ones."""
    moe, mtp = model.cfg.moe, model.cfg.mtp
    assert moe is not None
    trunk, rest = tables(phy2log, moe), default_plan(mtp.num_nextn_predict_layers, moe)
    modules = tuple(
        module | {"block": _mapped(module["block"], tables(rest, moe), i)}
        for i, module in enumerate(params["mtp_layers"])
    )
    layers = tuple(_mapped(layer, trunk, i) for i, layer in enumerate(params["moe_layers"]))
    return params | {"moe_layers": layers, "mtp_layers": modules}


def _mapped(layer: Any, maps: dict[str, np.ndarray], row: int) -> Any:
    experts = layer["mlp"]["experts"]
    put = {name: jax.device_put(x[row], experts[name].sharding) for name, x in maps.items()}
    return layer | {"mlp": layer["mlp"] | {"experts": experts | put}}


def count_experts(model: Slice, params: Any, load: Load) -> np.ndarray:
    """float64 [L, E]: rows that chose each expert, in one step of all ranks."""
    config = model.config(0, None)
    state = model.state(config, load.batch, load.context, counted=True)
    rows = model.decode_rows(config, load.batch, load.context)
    state, _ = model.program(config)(params, state, rows, None)
    return np.asarray(state.loads).sum(axis=0).astype(np.float64)


# ---------------------------------------------------------------------- without GPUs


def plan_of(args: argparse.Namespace, model_mesh: MeshSize, load: Load) -> Plan:
    """How `dskjax info` describes it."""
    formats: dict[str, Experts] = {"w4afp8": "int4", "fp8": "fp8", "bf16": "bf16"}
    return Plan(
        mesh=model_mesh,
        context=load.context,
        drafts=load.drafts,
        experts=formats[args.precision],
        cache="fp8_tile",
        payload="bf16",
    )


def bound(args: argparse.Namespace, model: Slice, load: Load) -> dict[str, float]:
    """Least milliseconds of a step by the data sheet of the card, without and with its traffic."""
    name = jax.devices()[0].device_kind.lower()
    card = next((gpu for gpu in GPUS if gpu in name), args.gpu)
    mesh = MeshSize(**dict(model.ranks.sharding.mesh.shape))
    step = mesh_step(model.cfg, plan_of(args, mesh, load), card, load.batch)
    return {"floor_us": 1e6 * step.floor.step, "floor_with_exchange_us": 1e6 * step.apart}


def show_plan(args: argparse.Namespace) -> None:
    """What a GPU holds and sends, and the least time of its steps."""
    cfg, console = config_of(args.preset, args.layers), Console()
    mesh = MeshSize(**(parse_mesh(args.mesh) or {"ep": args.gpus}))
    load = Load(context=max(args.context))
    console.print(memory_table(cfg, plan_of(args, mesh, load), [args.gpu]))
    console.print(collectives_table(cfg, plan_of(args, mesh, load), max(args.batch)))
    for drafts in args.drafts:
        plan_ = plan_of(args, mesh, dataclasses.replace(load, drafts=drafts))
        for batch in args.batch:
            step = mesh_step(cfg, plan_, args.gpu, batch)
            fits = "" if step.fits else "  the cache does not fit"
            console.print(
                f"{drafts} drafts, batch {batch:3} a GPU: a step takes at least "
                f"{1e3 * step.floor.step:6.2f} ms, with its traffic {1e3 * step.apart:6.2f}{fits}"
            )


def compile_ahead(args: argparse.Namespace) -> None:
    """Compiles the step of every batch for H100s that are not there: its memory."""
    mesh = make_mesh(**(parse_mesh(args.mesh) or {"ep": args.compile}), devices=h100s(args.compile))
    model, context = slice_over(args, mesh, layers=args.layers), max(args.context)
    rows = []
    for drafts in args.drafts:
        config = model.config(drafts, args.acceptance)
        for batch in args.batch:
            shapes = model.abstract(config, batch, context)
            begun = time.perf_counter()
            with for_hopper():
                lowered = model.program(config).lower(*shapes, None)
            memory = lowered.compile().memory_analysis()
            pool = sum(math.prod(x.shape) * x.dtype.itemsize for x in jax.tree.leaves(shapes[1]))
            row = {
                **dataclasses.asdict(Load(batch=batch, context=context, drafts=drafts)),
                "argument_bytes": memory.argument_size_in_bytes,
                "temp_bytes": memory.temp_size_in_bytes,
                "slots_bytes": pool // model.ranks.count,
                "seconds": time.perf_counter() - begun,
            }
            rows.append(row)
            print(json.dumps(row), flush=True)
            if args.out is not None:
                facts = {
                    "target": f"{args.compile} x H100, nothing tuned",
                    "commit": source_commit(),
                    "versions": versions(),
                    "preset": args.preset,
                    "layers": model.cfg.num_hidden_layers,
                    "mesh": dict(mesh.shape),
                    "rows": rows,
                }
                path = args.out / f"{args.name}-compile.json"
                path.write_text(json.dumps(facts, indent=1) + "\n")


if __name__ == "__main__":
    main()
