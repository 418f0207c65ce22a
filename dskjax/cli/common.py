"""What the commands share: the app, options with a meaning of their own, and loading a model."""

import enum
import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
from rich.console import Console

app = typer.Typer(
    no_args_is_help=True,
    pretty_exceptions_enable=False,
    help="DeepSeek-V3 family models in JAX: inspect, compare, pre-train, generate, serve.",
)
train_mtp = typer.Typer(no_args_is_help=True, help="MTP heads: train, evaluate, export.")
bench = typer.Typer(no_args_is_help=True, help="Measure: a server, acceptance rules, kernels.")
app.add_typer(train_mtp, name="train-mtp")
app.add_typer(bench, name="bench")
err = Console(stderr=True)


class Dtype(enum.StrEnum):
    """Compute dtypes."""

    float32 = "float32"
    bfloat16 = "bfloat16"


ModelDir = Annotated[Path, typer.Argument(help="Checkpoint folder, or org/name on the hub.")]
RevisionOption = Annotated[
    str | None, typer.Option(help="Branch, tag or commit of a model on the hub.")
]
DequantiseOption = Annotated[
    bool, typer.Option("--dequantise", help="Make floats of quantized weights while loading.")
]
DtypeOption = Annotated[
    Dtype | None, typer.Option(help="Compute dtype. Default: float32 on a CPU, bfloat16 on a GPU.")
]
ImplOption = Annotated[
    str, typer.Option(help="Implementation of every op: auto, reference or xla.")
]
DeterministicOption = Annotated[
    bool,
    typer.Option(
        "--deterministic",
        help="On one GPU too, the same bits in every run: sums in one order, nothing autotuned.",
    ),
]
RuleOption = Annotated[
    str,
    typer.Option(
        help="Acceptance rule: strict, rejection, block, typical, relaxed or hybrid, with "
        "parameters as in relaxed:top_n=10,delta=0.6. auto: strict if greedy, else rejection."
    ),
]


def chosen_rule(rule: str, temperature: float) -> Any:
    """The `RuleOptions` that a rule's text stands for."""
    from dskjax.decode import RuleOptions

    if rule == "auto":
        rule = "strict" if temperature == 0 else "rejection"
    return RuleOptions.parse(rule)


def compile_one_way(mesh: str) -> None:
    """Has a program take the same kernels in every process, and none that adds in the order of
    arrival: products by cuBLAS, the first way it names. To be called before the first array.

    Args:
        mesh: as for `dskjax.mesh.sharding_of`.

    Raises:
        ValueError: several GPUs, which add up gradients in an order of their own.
    """
    import jax

    from dskjax.mesh import sharding_of
    from pallas_kernels.select import keep_order

    flags = ("--xla_gpu_autotune_level=0", "--xla_gpu_enable_triton_gemm=false")
    os.environ["XLA_FLAGS"] = " ".join([os.environ.get("XLA_FLAGS", ""), *flags]).strip()
    keep_order()
    sharding = sharding_of(mesh, "data")
    if sharding is not None and jax.default_backend() == "gpu":
        raise ValueError(
            f"--deterministic holds on one GPU, and the mesh has {sharding.mesh.size}: give "
            "--mesh dp=1, or leave it out"
        )


def write(text: str) -> None:
    """To stdout, at once."""
    sys.stdout.write(text)
    sys.stdout.flush()


def find(model: Path, revision: str | None = None, *, weights: bool = True) -> Path:
    """The folder of a model; one on the hub is downloaded first, if need be without its weights."""
    from dskjax.checkpoint import hub

    return hub.find(model, revision=revision, weights=weights, progress=err.is_terminal)


def load(
    path: Path,
    dtype: Dtype | None,
    *,
    dequantise: bool = False,
    revision: str | None = None,
    sharding: Any = None,
) -> tuple[Any, Any]:
    """(params, config) of a model in the compute dtype of the machine, or the given; each device
    reads its own part of the files.
    """
    import jax

    from dskjax.checkpoint import load

    if dtype is None:
        dtype = Dtype.float32 if jax.default_backend() == "cpu" else Dtype.bfloat16
    if dtype is Dtype.float32:
        # A GPU multiplies fp32 in tf32 unless told otherwise.
        jax.config.update("jax_default_matmul_precision", "highest")
    return load(
        path,
        dtype=dtype.value,
        quantised="dequantise" if dequantise else "keep",
        revision=revision,
        sharding=sharding,
        progress=err.is_terminal,
    )
