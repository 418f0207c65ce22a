"""Loading a model from whatever names it: a folder of either kind, or its id on the hub."""

from pathlib import Path
from typing import Any

from dskjax.axes import Sharding
from dskjax.checkpoint import hub
from dskjax.checkpoint.hf import load_hf
from dskjax.checkpoint.orbax_index import INDEX
from dskjax.checkpoint.orbax_params import load_params
from dskjax.config import ModelConfig
from dskjax.params import Params


def load(
    model: str | Path,
    *,
    dtype: Any | None = None,
    quantised: str = "keep",
    sharding: Sharding | None = None,
    layers: str = "stacked",
    revision: str | None = None,
    progress: bool = False,
) -> tuple[Params, ModelConfig]:
    """Loads a model: params and config.

    Args:
        model: a Hugging Face folder, an Orbax folder that `save_params` or `dskjax convert` made,
            or `org/name` on the Hugging Face hub, which is downloaded once (`hub`).
        dtype: bfloat16, float16 or float32 for floats; None takes that of the stored embedding.
            Weights that fix their dtype (the gate's bias) keep it.
        quantised: what becomes of quantized weights. "keep": a `QTensor`. "dequantise": floats.
        sharding: where the parts go; a process reads no more than its own. None: the first device.
        layers: "stacked", or "separate": what `dskjax.params.unstack` makes of that.
        revision: branch, tag or commit on the hub.
        progress: draw progress bars.

    Raises:
        CheckpointError: there is no such model, or it is damaged; says what and where.
        NotImplementedError: a model or checkpoint of a kind that is recognised and not supported.
        ValueError: an option that is none of its values, or a revision of a folder.
    """
    folder = hub.find(model, revision=revision, progress=progress)
    reader = load_params if (folder / INDEX).is_file() else load_hf
    return reader(
        folder,
        dtype=dtype,
        quantised=quantised,
        sharding=sharding,
        layers=layers,
        progress=progress,
    )
