"""Checkpoints: Hugging Face folders in and out; `checkpoint.store` keeps training states."""

from dskjax.checkpoint.hf import load_config, load_hf
from dskjax.checkpoint.safetensors import CheckpointError
from dskjax.checkpoint.save import save_hf

__all__ = ["CheckpointError", "load_config", "load_hf", "save_hf"]
