"""A trained model as a folder for others: HF layout, tokenizer, and how it came about."""

import json
import shutil
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from dskjax.checkpoint import save_hf
from dskjax.config import ModelConfig
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
    here = {"devices": describe_devices(), "versions": versions()}
    text = json.dumps({**record, **here}, indent=2, default=str)
    (folder / "training.json").write_text(text + "\n")
    return folder
