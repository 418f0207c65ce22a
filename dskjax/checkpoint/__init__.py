"""Checkpoints: load, save, convert, find on the hub; `checkpoint.store` keeps training states."""

from dskjax.checkpoint.convert import Conversion, convert
from dskjax.checkpoint.hf import load_config, load_hf
from dskjax.checkpoint.load import load
from dskjax.checkpoint.orbax_params import load_params, save_params
from dskjax.checkpoint.safetensors import CheckpointError
from dskjax.checkpoint.save import save_hf

__all__ = [
    "CheckpointError",
    "Conversion",
    "convert",
    "load",
    "load_config",
    "load_hf",
    "load_params",
    "save_hf",
    "save_params",
]
