"""What a run is told; validated at birth."""

import dataclasses
import typing
from collections.abc import Sequence
from pathlib import Path
from typing import Any, ClassVar, Literal

from train_mtp.optim import AdamW
from train_mtp.recipe import Precision, RematName

ShardingName = Literal["replicated", "data", "fsdp", "tensor", "train"]


@dataclasses.dataclass(frozen=True, kw_only=True)
class RunConfig:
    """What every kind of run is told.

    Attributes:
        data: text files and folders (`dskjax.documents`).
        out: folder of the run: checkpoints, metrics and the exported model.
        seq_len: tokens per row.
        batch_size: rows per step, over all devices.
        steps: steps of the whole run; the schedule is spread over them.
        lr: peak learning rate.
        warmup: steps of linear warm-up.
        min_lr_ratio: last learning rate over the peak.
        beta1, beta2: decay of Adam's moments.
        weight_decay: decoupled, on matrices only.
        clip: largest global norm of the gradient.
        bias_update_rate: step u of the router biases.
        seed: of the weights and of the order of the data.
        precision: compute dtype; master weights are fp32.
        remat: `jax.checkpoint` policy of each layer, "none" keeps all activations.
        impl: implementation of every op.
        mesh: "dp=4,tp=2"; empty for all devices on dp.
        sharding: rules of `dskjax.mesh.preset`.
        save_every: steps between checkpoints; one is written at the end in any case.
        keep_last: checkpoints kept.
        log_every: steps between lines of metrics.
        eval_every: steps between evaluations, 0 for one at the end.
        eval_data: held-out files, "KIND=PATH" or plain (`dskjax.evaluation.kinds`).
        eval_index: kinds of the plain files' documents, `docs.jsonl.xz` of a corpus.
        eval_max_tokens: tokens per kind in the evaluations on the way; the last one takes all.
        max_minutes: stop after so many minutes, save and export; the schedule does not know.
        cache_dir: where tokenised text is kept, `out/tokens` when None.
        progress: show bars.
        tensorboard: also write the metrics for TensorBoard, to `out/tensorboard`.
    """

    data: Sequence[str | Path]
    out: str | Path
    seq_len: int = 512
    batch_size: int = 64
    steps: int = 1000
    lr: float = 1e-3
    warmup: int = 100
    min_lr_ratio: float = 0.1
    beta1: float = 0.9
    beta2: float = 0.95
    weight_decay: float = 0.1
    clip: float = 1.0
    bias_update_rate: float = 0.001
    seed: int = 0
    precision: Precision = "bfloat16"
    remat: RematName = "none"
    impl: str = "auto"
    mesh: str = ""
    sharding: ShardingName = "data"
    save_every: int = 1000
    keep_last: int = 2
    log_every: int = 10
    eval_every: int = 0
    eval_data: Sequence[str | Path] = ()
    eval_index: str | Path | None = None
    eval_max_tokens: int | None = None
    max_minutes: float | None = None
    cache_dir: str | Path | None = None
    progress: bool = True
    tensorboard: bool = False

    elsewhere: ClassVar[frozenset[str]] = frozenset(
        "out data cache_dir progress max_minutes save_every keep_last log_every eval_every "
        "eval_data eval_index eval_max_tokens mesh sharding tensorboard".split()
    )
    """Fields that do not decide what is learned. Data are compared by content."""

    def __post_init__(self) -> None:
        if not self.data or isinstance(self.data, str):
            raise ValueError(f"data={self.data!r} must list at least one file or folder of text")
        for name in ("seq_len", "batch_size", "steps", "save_every", "keep_last", "log_every"):
            self.check(name, getattr(self, name) >= 1, "at least 1")
        for name in ("lr", "clip"):
            self.check(name, getattr(self, name) > 0, "positive")
        for name in ("weight_decay", "bias_update_rate", "seed"):
            self.check(name, getattr(self, name) >= 0, "at least 0")
        for name in ("beta1", "beta2"):
            self.check(name, 0 <= getattr(self, name) < 1, "in [0, 1)")
        self.check("seq_len", self.seq_len >= 2, "at least 2: a row predicts its next tokens")
        self.check("min_lr_ratio", 0 <= self.min_lr_ratio <= 1, "between 0 and 1")
        self.check("warmup", 0 <= self.warmup < self.steps, f"in 0..{self.steps - 1} (steps - 1)")
        self.check("eval_every", self.eval_every >= 0, "at least 0 (0: at the end only)")
        for name in ("eval_max_tokens", "max_minutes"):
            value = getattr(self, name)
            self.check(name, value is None or value > 0, "positive")
        if self.eval_every and not self.eval_data:
            raise ValueError(f"{self.eval_every=} needs eval_data: give held-out files")
        for name, known in (
            ("precision", Precision),
            ("remat", RematName),
            ("sharding", ShardingName),
        ):
            if getattr(self, name) not in typing.get_args(known):
                choices = ", ".join(typing.get_args(known))
                raise ValueError(f"{name}={getattr(self, name)!r} must be one of {choices}")

    @property
    def optimizer(self) -> AdamW:
        """The optimizer's part."""
        names = {field.name for field in dataclasses.fields(AdamW)}
        mine = {field.name for field in dataclasses.fields(self)}
        return AdamW(**{name: getattr(self, name) for name in names & mine})

    @property
    def trajectory(self) -> dict[str, Any]:
        """Every field that decides what is learned: what a resumed run must have in common."""
        fields = dataclasses.asdict(self)
        return {name: value for name, value in fields.items() if name not in self.elsewhere}

    def check(self, name: str, holds: bool, meaning: str) -> None:
        """Raises ValueError with the field's value unless `holds`."""
        if not holds:
            raise ValueError(f"{name}={getattr(self, name)!r} must be {meaning}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PretrainConfig(RunConfig):
    """A pre-training run.

    Attributes:
        model: name of a preset, or path of a `config.json` or of the folder that holds it.
        tokenizer: folder with `tokenizer.json`.
        mtp_weight: lambda of the MTP loss; L = L_0 + lambda / K * sum_k L_k.
        z_loss: weight of the squared log-sum-exp of the logits.
    """

    model: str
    tokenizer: str | Path
    mtp_weight: float = 0.3
    z_loss: float = 0.0

    # Model and tokenizer are compared by content.
    elsewhere: ClassVar[frozenset[str]] = RunConfig.elsewhere | {"model", "tokenizer"}

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("mtp_weight", "z_loss"):
            self.check(name, getattr(self, name) >= 0, "at least 0")
