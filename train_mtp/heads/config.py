"""What a run that trains draft heads is told; validated at birth."""

import dataclasses
import typing
from pathlib import Path
from typing import ClassVar

from dskjax.config import ModelConfig, MtpConfig
from train_mtp.config import RunConfig
from train_mtp.heads.objective import Objective
from train_mtp.heads.recipe import Weights
from train_mtp.heads.start import Init


@dataclasses.dataclass(frozen=True, kw_only=True)
class HeadsConfig(RunConfig):
    """A run that trains MTP modules over a frozen trunk.

    Attributes:
        trunk: checkpoint folder or hub id; its tokenizer is used.
        layers: K, drafts that are trained for.
        weights: "independent" modules or one "shared" module.
        init: where the modules' weights begin (`train_mtp.heads.start`).
        ce, kl, lk, tv, kl_decay, temperature: the objective (`train_mtp.heads.objective`).
        depth_decay: weight of depth k is depth_decay^(k-1).
        detach: stop gradients between depths.
        top_k: tokens of the trunk's law that are kept a row.
        watch: temperatures at which acceptance is reported besides.
        accumulate: batches whose gradients make one step; `batch_size` rows are cut in so many.
        answers_only: of conversations only the last answer counts.
        dequantise: run a quantized trunk from plain weights.
        keep_best: also keep the checkpoint with the longest expected accepted length on the
            held-out text.
    """

    trunk: str
    layers: int = 1
    weights: Weights = "independent"
    init: Init = "last"
    ce: float = 0.1
    kl: float = 0.9
    lk: float = 0.0
    tv: float = 0.0
    kl_decay: float = 0.0
    temperature: float = 1.0
    depth_decay: float = 0.8
    detach: bool = False
    top_k: int = 512
    watch: tuple[float, ...] = (0.6,)
    accumulate: int = 1
    answers_only: bool = True
    dequantise: bool = False
    keep_best: bool = True

    # The trunk is compared by content.
    elsewhere: ClassVar[frozenset[str]] = RunConfig.elsewhere | {
        "trunk",
        "dequantise",
        "keep_best",
    }

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("layers", "accumulate", "top_k"):
            self.check(name, getattr(self, name) >= 1, "at least 1")
        for name, known in (("weights", Weights), ("init", Init)):
            choices = typing.get_args(known)
            self.check(name, getattr(self, name) in choices, f"one of {', '.join(choices)}")
        self.check("depth_decay", 0 < self.depth_decay <= 1, "in (0, 1]")
        self.check("watch", all(t > 0 for t in self.watch), "positive temperatures")
        self.check(
            "accumulate",
            self.batch_size % self.accumulate == 0,
            f"a divisor of batch_size={self.batch_size}",
        )
        assert self.objective  # its own checks

    @property
    def objective(self) -> Objective:
        """The loss of one depth."""
        names = [field.name for field in dataclasses.fields(Objective)]
        return Objective(**{name: getattr(self, name) for name in names})

    def model(self, trunk: ModelConfig) -> ModelConfig:
        """The trunk with the modules that this run trains.

        Raises:
            ValueError: a trunk without experts, which MTP modules need.
        """
        if trunk.moe is None:
            raise ValueError(
                f"{self.trunk} has no experts, and MTP modules are mixture-of-experts layers; use "
                "a trunk with n_routed_experts"
            )
        shared = self.weights == "shared"
        mtp = MtpConfig(
            num_nextn_predict_layers=1 if shared else self.layers,
            mtp_scheme="recycled" if shared else "chain",
        )
        return dataclasses.replace(trunk, mtp=mtp)

    @property
    def model_folder(self) -> Path:
        """Where the trained model is exported."""
        return Path(self.out) / "model"
