"""The command line: the one place that may import every package, each lazily inside its command."""

import enum
import sys
from pathlib import Path
from typing import Annotated, Any, NoReturn

import typer
from rich.console import Console
from rich.table import Table

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="DeepSeek-V3 family models in JAX: inspect, compare, pre-train, generate with MTP drafts.",
)
train_mtp = typer.Typer(no_args_is_help=True, help="MTP heads: evaluate drafts on held-out text.")
app.add_typer(train_mtp, name="train-mtp")
_err = Console(stderr=True)


class Dtype(enum.StrEnum):
    """Compute dtypes."""

    float32 = "float32"
    bfloat16 = "bfloat16"


class RuleName(enum.StrEnum):
    """Acceptance rules; auto is strict for greedy decoding and rejection otherwise."""

    auto = "auto"
    strict = "strict"
    rejection = "rejection"
    block = "block"


ModelDir = Annotated[Path, typer.Argument(help="Checkpoint folder: config.json and safetensors.")]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Compute dtype. Default: float32 on a CPU, bfloat16 on a GPU.")
]
ImplOption = Annotated[
    str, typer.Option(help="Implementation of every op: auto, reference or xla.")
]


@app.command()
def info(
    model: Annotated[str, typer.Argument(help="A preset, or a checkpoint folder.")],
    gpu: Annotated[
        str | None, typer.Option(help="Bound decode steps: h20, h800, h100, h200.")
    ] = None,
    mesh: Annotated[str, typer.Option(help='With --gpu: "ep=16" GPUs share the experts.')] = "",
    context: Annotated[int, typer.Option(help="With --gpu: cached tokens per sequence.")] = 4096,
    drafts: Annotated[int, typer.Option(help="With --gpu: drafts verified a step.")] = 0,
    experts: Annotated[str, typer.Option(help="With --gpu: int4, fp8 or bf16.")] = "int4",
    plot: Annotated[Path | None, typer.Option(help="With --gpu: draw the bounds, .png.")] = None,
) -> None:
    """Parameter counts, memory and cache size of a model; with --gpu, its roofline."""
    from dskjax.checkpoint.hf import load_config
    from dskjax.commands.info import describe
    from dskjax.presets import PRESETS, preset

    if model not in PRESETS and not Path(model).exists():
        raise ValueError(
            f"{model!r} is neither a folder nor a preset; presets: {', '.join(PRESETS)}"
        )
    cfg = preset(model) if model in PRESETS else load_config(model)
    table = Table(title=model, show_header=False)
    for what, value in describe(cfg):
        table.add_row(what, value)
    Console().print(table)
    if gpu is not None:
        from dskjax.commands.info import plot_roofline, roofline_rows, roofline_table
        from dskjax.mesh import expert_ways

        ep = expert_ways(mesh)
        floors = roofline_rows(cfg, gpu, ep=ep, context=context, drafts=drafts, experts=experts)
        Console().print(roofline_table(floors, f"{gpu}, ep={ep}, {context} cached tokens"))
        if plot is not None:
            _err.print(f"plot: {plot_roofline(floors, plot)}", soft_wrap=True)


@app.command()
def logits(
    model: ModelDir,
    ids: Annotated[Path, typer.Option(help="Integer ids [B, T], .npy.")],
    out: Annotated[Path, typer.Option(help="Where to write fp32 logits [B, T, V], .npy.")],
    dtype: DtypeOption = None,
    mtp_depth: Annotated[int, typer.Option(help="Logits of this MTP depth, [B, T-K, V].")] = 0,
    hidden: Annotated[
        Path | None, typer.Option(help="Also write hidden states and chosen experts, .npz.")
    ] = None,
    impl: ImplOption = "auto",
) -> None:
    """Logits of given ids, for comparing implementations."""
    from dskjax.commands.ids import load_ids, save_atomically
    from dskjax.commands.logits import compute

    params, cfg = _load(model, dtype)
    tokens = load_ids(ids, cfg)
    values, states = compute(
        params, cfg, tokens, mtp_depth=mtp_depth, hidden=hidden is not None, impl=impl
    )
    save_atomically(out, values)
    if hidden is not None:
        save_atomically(hidden, states)
    _err.print(f"wrote logits {list(values.shape)} to {out}", soft_wrap=True)


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
    rule: Annotated[RuleName, typer.Option(help="Acceptance rule of speculation.")] = RuleName.auto,
    thinking: Annotated[bool, typer.Option(help="With --chat: let the model think first.")] = False,
    ignore_eos: Annotated[bool, typer.Option(help="Never stop at an eos.")] = False,
    out_ids: Annotated[
        Path | None, typer.Option(help="With --ids: write new ids [B, N], .npy.")
    ] = None,
    dtype: DtypeOption = None,
    impl: ImplOption = "auto",
) -> None:
    """Continue a text, a chat or rows of ids; text streams to stdout, figures go to stderr."""
    from dskjax.commands import generate as command
    from dskjax.commands.ids import load_ids, save_atomically
    from dskjax.decode import SamplingParams
    from dskjax.tokenizer import Tokenizer

    if sum(x is not None for x in (prompt, chat, ids)) != 1:
        raise ValueError("give exactly one of --prompt, --chat and --ids")
    if out_ids is not None and ids is None:
        raise ValueError("--out-ids needs --ids")
    params, cfg = _load(model, dtype)
    options: dict[str, Any] = {
        "max_tokens": max_tokens,
        "drafts": speculate,
        "rule": _rule(rule, temperature),
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
        if out_ids is not None:
            save_atomically(out_ids, rows)
        else:
            for row in result.tokens:
                print(*row)
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
            params, cfg, tokenizer, start, _write, sampling=sampling(1), **options
        )
        print()
    _err.print(command.summary(result, speculate), soft_wrap=True, highlight=False)


@app.command()
def pretrain(
    data: Annotated[list[Path], typer.Option(help="Text files or folders; repeat for more.")],
    tokenizer: Annotated[Path, typer.Option(help="Folder with tokenizer.json.")],
    out: Annotated[Path, typer.Option(help="Folder of the run; an interrupted run goes on.")],
    model: Annotated[str, typer.Option(help="Preset, config.json or its folder.")] = "tiny-v3",
    steps: Annotated[int, typer.Option(help="Steps of the whole run.")] = 1000,
    batch_size: Annotated[int, typer.Option(help="Rows a step, over all devices.")] = 64,
    seq_len: Annotated[int, typer.Option(help="Tokens a row.")] = 512,
    lr: Annotated[float, typer.Option(help="Peak learning rate (warm-up, then cosine).")] = 1e-3,
    warmup: Annotated[int, typer.Option(help="Steps of warm-up.")] = 100,
    weight_decay: Annotated[float, typer.Option(help="On matrices only.")] = 0.1,
    mtp_weight: Annotated[float, typer.Option(help="Weight of the MTP loss.")] = 0.3,
    precision: Annotated[
        Dtype | None, typer.Option(help="Compute dtype. Default: float32 on a CPU, else bfloat16.")
    ] = None,
    remat: Annotated[str, typer.Option(help="jax.checkpoint policy per layer, or none.")] = "none",
    mesh: Annotated[str, typer.Option(help='Like "dp=4,tp=2"; all devices on dp if empty.')] = "",
    sharding: Annotated[
        str, typer.Option(help="replicated, data, fsdp, tensor or train (fsdp and tensor).")
    ] = "data",
    eval_data: Annotated[
        list[str] | None, typer.Option(help="Held-out files, KIND=PATH or plain; repeat.")
    ] = None,
    eval_every: Annotated[int, typer.Option(help="Steps between evaluations; 0: at the end.")] = 0,
    save_every: Annotated[int, typer.Option(help="Steps between checkpoints.")] = 1000,
    log_every: Annotated[int, typer.Option(help="Steps between lines of metrics.")] = 10,
    max_minutes: Annotated[
        float | None, typer.Option(help="Stop, save and export after so many minutes.")
    ] = None,
    seed: Annotated[int, typer.Option(help="Of weights and data order.")] = 0,
    impl: ImplOption = "auto",
) -> None:
    """Train a model and its MTP modules on text; resumes by itself, exports to OUT/model."""
    import jax

    from train_mtp.config import PretrainConfig
    from train_mtp.loop import Interrupted, NonFiniteLossError
    from train_mtp.pretrain import pretrain as run

    if precision is None:
        precision = Dtype.float32 if jax.default_backend() == "cpu" else Dtype.bfloat16
    config = PretrainConfig(
        model=model,
        data=data,
        tokenizer=tokenizer,
        out=out,
        steps=steps,
        batch_size=batch_size,
        seq_len=seq_len,
        lr=lr,
        warmup=warmup,
        weight_decay=weight_decay,
        mtp_weight=mtp_weight,
        precision=precision.value,
        remat=remat,  # pyright: ignore[reportArgumentType] - checked by PretrainConfig
        mesh=mesh,
        sharding=sharding,  # pyright: ignore[reportArgumentType] - checked by PretrainConfig
        eval_data=eval_data or (),
        eval_every=eval_every,
        save_every=save_every,
        log_every=log_every,
        max_minutes=max_minutes,
        seed=seed,
        impl=impl,
    )
    try:
        folder = run(config)
    except Interrupted as stop:
        _err.print(str(stop), soft_wrap=True, markup=False)
        raise typer.Exit(128 + stop.signum) from stop
    except NonFiniteLossError as error:
        raise ValueError(str(error)) from error
    _err.print(f"exported {folder}", soft_wrap=True)


@app.command()
def demo(
    out: Annotated[Path, typer.Option(help="Folder for the plot.")] = Path("runs/demo"),
) -> None:
    """The shipped small model answers, with and without speculation; a table and a plot."""
    from dskjax.demo import run

    run(Console(), out)


@train_mtp.command()
def evaluate(
    model: ModelDir,
    text: Annotated[list[str], typer.Option(help="Held-out files, KIND=PATH or plain; repeat.")],
    drafts: Annotated[int, typer.Option(help="Tokens drafted a step.")] = 1,
    temperature: Annotated[float, typer.Option(help="Of target and drafts.")] = 0.6,
    rule: Annotated[RuleName, typer.Option(help="Acceptance rule.")] = RuleName.auto,
    prompts: Annotated[int, typer.Option(help="Prompts per kind of text.")] = 32,
    prompt_tokens: Annotated[int, typer.Option(help="Tokens of each prompt.")] = 64,
    max_tokens: Annotated[int, typer.Option(help="New tokens per prompt.")] = 64,
    seed: Annotated[int, typer.Option(help="Of the sampling.")] = 0,
    json_out: Annotated[
        Path | None, typer.Option("--json", help="Write the figures here, not to stdout.")
    ] = None,
    dtype: DtypeOption = None,
    impl: ImplOption = "auto",
) -> None:
    """Acceptance of drafts on held-out text, by real speculative decoding, by kind of text."""
    import json

    import jax

    from dskjax.tokenizer import Tokenizer
    from train_mtp.acceptance import measure, prompts_of
    from train_mtp.evaluation import documents_by_kind

    params, cfg = _load(model, dtype)
    tokenizer = Tokenizer.load(model)
    kinds = {
        kind: prompts_of(documents, tokenizer, count=prompts, length=prompt_tokens)
        for kind, documents in documents_by_kind(text, tokenizer=tokenizer).items()
    }
    name = _rule(rule, temperature)
    figures = measure(
        params,
        cfg,
        kinds,
        drafts=drafts,
        temperature=temperature,
        rule=name,
        max_tokens=max_tokens,
        seed=seed,
        impl=impl,
    )
    settings = {"model": model.name, "drafts": drafts, "temperature": temperature, "rule": name}
    report = json.dumps({**settings, "device": jax.devices()[0].device_kind, **figures}, indent=2)
    if json_out is None:
        print(report)
    else:
        json_out.parent.mkdir(parents=True, exist_ok=True)
        json_out.write_text(report + "\n")


def _rule(rule: RuleName, temperature: float) -> str:
    if rule is RuleName.auto:
        return "strict" if temperature == 0 else "rejection"
    return rule.value


def _write(text: str) -> None:
    sys.stdout.write(text)
    sys.stdout.flush()


def _load(path: Path, dtype: Dtype | None) -> tuple[Any, Any]:
    import jax

    from dskjax.checkpoint.hf import load_hf

    if dtype is None:
        dtype = Dtype.float32 if jax.default_backend() == "cpu" else Dtype.bfloat16
    if dtype is Dtype.float32:
        # A GPU multiplies fp32 in tf32 unless told otherwise.
        jax.config.update("jax_default_matmul_precision", "highest")
    return load_hf(path, dtype=dtype.value, progress=_err.is_terminal)


@app.callback()
def _main(
    cpu_devices: Annotated[
        int, typer.Option(help="Simulate this many devices on the CPU; 0 uses what is there.")
    ] = 0,
) -> None:
    import jax

    if cpu_devices < 0:
        raise ValueError(f"--cpu-devices {cpu_devices} must be 0 or more")
    if cpu_devices:
        jax.config.update("jax_platforms", "cpu")
        jax.config.update("jax_num_cpu_devices", cpu_devices)


def main(command: typer.Typer = app) -> NoReturn:
    """Entry point: a user's mistake ends with one line and exit code 2, a defect with a
    traceback.
    """
    try:
        command(standalone_mode=True)
    except (ValueError, NotImplementedError, FileNotFoundError) as error:
        _err.print(f"error: {error}", style="red", soft_wrap=True, highlight=False, markup=False)
        raise SystemExit(2) from error
    raise SystemExit(0)
