"""Token id files: `.npy` arrays of shape [B, T], read without pickle and checked."""

from collections.abc import Mapping
from pathlib import Path

import numpy as np

from dskjax.config import ModelConfig


def load_ids(path: Path, cfg: ModelConfig) -> np.ndarray:
    """Reads int ids [B, T] as int32.

    Raises:
        ValueError: not a readable `.npy` file, not a non-empty integer matrix, an id outside the
            vocabulary, or rows longer than the model's context; the message names the file.
    """
    ids = load_array(path, "a .npy array of integers [B, T]")
    if ids.ndim != 2 or not np.issubdtype(ids.dtype, np.integer) or not ids.size:
        raise ValueError(
            f"{path} holds {ids.dtype} {ids.shape}; expected a non-empty integer array [B, T]"
        )
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or high >= cfg.vocab_size:
        raise ValueError(
            f"{path} has id {low if low < 0 else high}, "
            f"outside 0..{cfg.vocab_size - 1} (vocab_size)"
        )
    if ids.shape[1] > cfg.max_position_embeddings:
        raise ValueError(
            f"{path} has rows of {ids.shape[1]} tokens, more than {cfg.max_position_embeddings=}"
        )
    return ids.astype(np.int32)


def load_array(path: Path, wanted: str) -> np.ndarray:
    """Reads one array.

    Raises:
        ValueError: not a readable `.npy` file; the message names it and what is `wanted`.
    """
    if not path.is_file():
        raise ValueError(f"{path}: no such file; expected {wanted}")
    try:
        array = np.load(path, allow_pickle=False)
    except (ValueError, EOFError, OSError) as error:
        raise ValueError(f"{path} is not a .npy array: {error}") from error
    if not isinstance(array, np.ndarray):
        raise ValueError(f"{path} holds an archive of arrays; expected {wanted}")
    return array


def save_atomically(path: Path, value: np.ndarray | Mapping[str, np.ndarray]) -> None:
    """Writes an array as `.npy`, named ones as `.npz`; the target appears whole or not at all."""
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(path.name + ".partial")
    with open(partial, "wb") as file:
        if isinstance(value, np.ndarray):
            np.save(file, value)
        else:
            np.savez(file, allow_pickle=False, **value)
    partial.replace(path)
