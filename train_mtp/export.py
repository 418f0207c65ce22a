"""A trained model as a folder for others: HF layout, tokenizer, and how it came about."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import jax

from dskjax.checkpoint import save_hf
from dskjax.config import ModelConfig
from dskjax.distributed import fetch, meet
from dskjax.params import Params
from dskjax.provenance import describe_devices, versions

TOKENIZER_FILES = (
    "tokenizer.json",
    "tiktoken.model",
    "tokenizer_config.json",
    "chat_template.jinja",
    "special_tokens_map.json",
    "generation_config.json",
)
"""What of a tokenizer's folder goes along, where present."""


def export(
    folder: Path,
    params: Params,
    cfg: ModelConfig,
    *,
    tokenizer: str | Path,
    record: Mapping[str, Any],
) -> Path:
    """Writes the checkpoint folder, in place of an older one.

    Of several processes all must call: each gathers the weights, whole, in its host's memory, the
    first one writes, and all return when it has.

    Args:
        folder: where.
        params: weights in the dtype to ship.
        cfg: the model.
        tokenizer: folder of the tokenizer.
        record: what `training.json` says; devices and versions are added.
    """
    if jax.process_count() > 1:
        params = fetch(params)
    if jax.process_index() == 0:
        _write(folder, params, cfg, Path(tokenizer), record)
    meet(f"{folder} is written")
    return folder


def _write(
    folder: Path, params: Params, cfg: ModelConfig, tokenizer: Path, record: Mapping[str, Any]
) -> None:
    save_hf(folder, params, cfg, overwrite=True)
    for name in TOKENIZER_FILES:
        if (file := tokenizer / name).is_file():
            shutil.copyfile(file, folder / name)
    here = {"devices": describe_devices(), "versions": versions()}
    text = json.dumps({**record, **here}, indent=2, default=str)
    (folder / "training.json").write_text(text + "\n")
