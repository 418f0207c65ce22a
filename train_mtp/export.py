"""A trained model as a folder for others: HF layout, tokenizer, and how it came about."""

import importlib.metadata
import json
import platform
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dskjax.checkpoint import save_hf
from dskjax.config import ModelConfig
from dskjax.params import Params

TOKENIZER_FILES = (
    "tokenizer.json",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
"""What of a tokenizer's folder goes along, where present."""

_PACKAGES = ("jax", "jaxlib", "flax", "optax", "orbax-checkpoint", "numpy", "tokenizers")


def export(
    folder: Path,
    params: Params,
    cfg: ModelConfig,
    *,
    tokenizer: str | Path,
    record: Mapping[str, Any],
) -> Path:
    """Writes the checkpoint folder, in place of an older one.

    Args:
        folder: where.
        params: weights in the dtype to ship.
        cfg: the model.
        tokenizer: folder of the tokenizer.
        record: what `training.json` says; devices and versions are added.
    """
    save_hf(folder, params, cfg, overwrite=True)
    for name in TOKENIZER_FILES:
        if (file := Path(tokenizer) / name).is_file():
            shutil.copyfile(file, folder / name)
    versions = {name: importlib.metadata.version(name) for name in _PACKAGES}
    versions["python"] = platform.python_version()
    here = {"devices": describe_devices(), "versions": versions}
    text = json.dumps({**record, **here}, indent=2, default=str)
    (folder / "training.json").write_text(text + "\n")
    return folder


def describe_devices() -> str:
    """Number and kind of the devices, for example "1 x NVIDIA H100 80GB HBM3"."""
    return f"{len(jax.devices())} x {jax.devices()[0].device_kind}"
