"""Commands on a model: info, logits, generate, demo."""

from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console
from rich.table import Table

from dskjax.cli.common import (
    DequantiseOption,
    DtypeOption,
    ImplOption,
    ModelDir,
    RevisionOption,
    RuleOption,
    app,
    chosen_rule,
    err,
    find,
    load,
    write,
)


@app.command()
def info(
    model: Annotated[
        str, typer.Argument(help="A preset, a checkpoint folder, or org/name on the hub.")
    ],
    gpu: Annotated[
        str | None, typer.Option(help="Bound decode steps: h20, h800, h100, h200.")
    ] = None,
    mesh: Annotated[
        str,
        typer.Option(help='Memory and traffic of a GPU of a mesh, as "dp=2,ep=16,tp=1".'),
    ] = "",
    redundant: Annotated[
        int, typer.Option(help="With --mesh: further copies of experts in each layer.")
    ] = 0,
    compare: Annotated[
        bool,
        typer.Option("--compare", help="Decode steps at ep=8 to 320, on --gpu or on all of them."),
    ] = False,
    batch: Annotated[
        int, typer.Option(help="With --mesh or --compare: sequences per GPU, to count bytes.")
    ] = 32,
    context: Annotated[
        int, typer.Option(help="Of decode steps: cached tokens per sequence.")
    ] = 4096,
    drafts: Annotated[int, typer.Option(help="Of decode steps: drafts verified in each.")] = 0,
    experts: Annotated[str, typer.Option(help="Experts held in int4, fp8 or bf16.")] = "int4",
    cache: Annotated[
        str, typer.Option(help="Cache held in fp8_tensor, fp8_tile or bf16.")
    ] = "fp8_tensor",
    payload: Annotated[str, typer.Option(help="Rows go to experts in fp8 or bf16.")] = "fp8",
    exchange: Annotated[
        str,
        typer.Option(
            help="padded: the all_to_all that dskjax does. As DeepEP, once: a row once per rank "
            "(throughput); copies: once per expert (low latency)."
        ),
    ] = "padded",
    plot: Annotated[Path | None, typer.Option(help="With --gpu: draw the bounds, .png.")] = None,
    revision: RevisionOption = None,
) -> None:
    """Parameter counts, memory and cache size of a model.

    With --gpu, the least time of a decode step; with --mesh, what a GPU of it holds and sends.
    """
    from dskjax.checkpoint.hf import load_config
    from dskjax.commands import mesh_tables
    from dskjax.commands.info import describe, plot_roofline, roofline_rows, roofline_table
    from dskjax.mesh import parse_mesh
    from dskjax.presets import PRESETS, preset
    from dskjax.roofline import GPUS
    from dskjax.traffic import MeshSize

    if model not in PRESETS and not Path(model).exists() and "/" not in model:
        raise ValueError(
            f"{model!r} is neither a folder nor a preset; presets: {', '.join(PRESETS)}"
        )
    if model in PRESETS:
        cfg = preset(model)
    else:
        cfg = load_config(find(Path(model), revision, weights=False))
    table = Table(title=model, show_header=False)
    for what, value in describe(cfg):
        table.add_row(what, value)
    Console().print(table)
    size = MeshSize(**parse_mesh(mesh), redundant=redundant)
    forms: dict[str, Any] = {
        "context": context,
        "drafts": drafts,
        "experts": experts,
        "cache": cache,
    }
    plan = mesh_tables.checked_plan(cfg, gpu, size, payload=payload, exchange=exchange, **forms)
    cards = list(GPUS) if gpu is None else [gpu]
    if mesh:
        Console().print(mesh_tables.memory_table(cfg, plan, cards))
        Console().print(mesh_tables.collectives_table(cfg, plan, batch))
    if gpu is not None and (mesh or not compare):
        floors = roofline_rows(cfg, gpu, ep=size.ep, tp=size.tp, redundant=redundant, **forms)
        Console().print(roofline_table(floors, f"{gpu}, {size}, {context} cached tokens"))
        if mesh:
            Console().print(mesh_tables.steps_table(cfg, plan, gpu))
        if plot is not None:
            err.print(f"plot: {plot_roofline(floors, plot)}", soft_wrap=True)
    if compare:
        for card in cards:
            Console().print(mesh_tables.compare_table(cfg, plan, card, batch))


@app.command()
def logits(
    model: ModelDir,
    ids: Annotated[Path, typer.Option(help="Integer ids [B, T], .npy.")],
    out: Annotated[Path, typer.Option(help="Where to write fp32 logits [B, T, V], .npy.")],
    dtype: DtypeOption = None,
    dequantise: DequantiseOption = False,
    revision: RevisionOption = None,
    mtp_depth: Annotated[int, typer.Option(help="Logits of this MTP depth, [B, T-K, V].")] = 0,
    hidden: Annotated[
        Path | None, typer.Option(help="Also write hidden states and chosen experts, .npz.")
    ] = None,
    impl: ImplOption = "auto",
) -> None:
    """Logits of given ids, for comparing implementations."""
    from dskjax.commands.ids import load_ids, save_atomically
    from dskjax.commands.logits import compute

    params, cfg = load(model, dtype, dequantise=dequantise, revision=revision)
    tokens = load_ids(ids, cfg)
    values, states = compute(
        params, cfg, tokens, mtp_depth=mtp_depth, hidden=hidden is not None, impl=impl
    )
    save_atomically(out, values)
    if hidden is not None:
        save_atomically(hidden, states)
    err.print(f"wrote logits {list(values.shape)} to {out}", soft_wrap=True)


@app.command()
def generate(
    model: ModelDir,
    prompt: Annotated[str | None, typer.Option(help="Text to continue (bos is put first).")] = None,
    chat: Annotated[
        str | None, typer.Option(help="A user's message; the chat template is applied.")
    ] = None,
    ids: Annotated[
        Path | None, typer.Option(help="Equal-length prompts, int ids [B, P], .npy.")
    ] = None,
    max_tokens: Annotated[int, typer.Option(help="Most new tokens.")] = 128,
    temperature: Annotated[float, typer.Option(help="0 is greedy.")] = 0.0,
    top_p: Annotated[float, typer.Option(help="1 is off.")] = 1.0,
    top_k: Annotated[int, typer.Option(help="0 is off.")] = 0,
    min_p: Annotated[float, typer.Option(help="0 is off.")] = 0.0,
    seed: Annotated[int, typer.Option(help="Same seed, same text.")] = 0,
    speculate: Annotated[
        int, typer.Option(help="Tokens drafted a step by the MTP modules; 0 is off.")
    ] = 0,
    rule: RuleOption = "auto",
    thinking: Annotated[bool, typer.Option(help="With --chat: let the model think first.")] = False,
    ignore_eos: Annotated[bool, typer.Option(help="Never stop at an eos.")] = False,
    out_ids: Annotated[
        Path | None, typer.Option(help="With --ids: write new ids [B, N], .npy.")
    ] = None,
    dtype: DtypeOption = None,
    dequantise: DequantiseOption = False,
    revision: RevisionOption = None,
    impl: ImplOption = "auto",
    mesh: Annotated[
        str, typer.Option(help="Like dp=2,ep=4,tp=1: prompts over dp and ep, experts over ep.")
    ] = "dp=1",
    expert_loads: Annotated[
        Path | None, typer.Option(help="Write rows per expert [layers, experts], .npy, for eplb.")
    ] = None,
    mtp_expert_loads: Annotated[
        Path | None, typer.Option(help="The same of the MTP modules that draft.")
    ] = None,
) -> None:
    """Continue a text, a chat or rows of ids; text streams to stdout, figures go to stderr."""
    import jax

    from dskjax.commands import generate as command
    from dskjax.commands.ids import load_ids, save_atomically
    from dskjax.decode import SamplingParams
    from dskjax.mesh import sharding_of
    from dskjax.tokenizer import Tokenizer

    if sum(x is not None for x in (prompt, chat, ids)) != 1:
        raise ValueError("give exactly one of --prompt, --chat and --ids")
    if out_ids is not None and ids is None:
        raise ValueError("--out-ids needs --ids")
    if mtp_expert_loads is not None and not speculate:
        raise ValueError("--mtp-expert-loads needs --speculate: without drafts no module runs")
    model, where = find(model, revision), sharding_of(mesh, "decode")
    params, cfg = load(model, dtype, dequantise=dequantise, sharding=where)
    options: dict[str, Any] = {
        "sharding": where,
        "count_experts": (expert_loads or mtp_expert_loads) is not None,
        "max_tokens": max_tokens,
        "drafts": speculate,
        "accept": chosen_rule(rule, temperature),
        "ignore_eos": ignore_eos,
        "impl": impl,
    }

    def sampling(rows: int) -> SamplingParams:
        # Rows of one call differ in seed, or equal prompts would give equal samples.
        seeds = [(seed + row) % 2**32 for row in range(rows)]
        return SamplingParams.make(
            rows, temperature=temperature, top_p=top_p, top_k=top_k, min_p=min_p, seed=seeds
        )

    if ids is not None:
        tokens = load_ids(ids, cfg)
        rows, result = command.continue_rows(
            params, cfg, tokens, sampling=sampling(len(tokens)), **options
        )
        if out_ids is None:
            for row in result.tokens:
                print(*row)
        elif jax.process_index() == 0:  # all processes have the same
            save_atomically(out_ids, rows)
    else:
        tokenizer = Tokenizer.load(model)
        if chat is not None:
            text = tokenizer.apply_chat_template(
                [{"role": "user", "content": chat}], thinking=thinking, add_generation_prompt=True
            )
            start = tokenizer.encode(text, bos=False)
        else:
            assert prompt is not None
            start = tokenizer.encode(prompt, bos=True)
        result = command.continue_text(
            params, cfg, tokenizer, start, write, sampling=sampling(1), **options
        )
        print()
    for file, loads in (
        (expert_loads, result.expert_loads),
        (mtp_expert_loads, result.mtp_expert_loads),
    ):
        if file is not None and loads is not None and jax.process_index() == 0:
            save_atomically(file, loads)
    err.print(command.summary(result, speculate), soft_wrap=True, highlight=False)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/demo"),
) -> None:
    """A server of the shipped small model answers, with and without drafts; a table and a plot."""
    from serve.demo import run

    try:
        run(Console(), out)
    except RuntimeError as error:
        err.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        raise typer.Exit(1) from error
