"""Folders that appear complete or not at all."""

import contextlib
import os
import secrets
import shutil
from collections.abc import Iterator
from pathlib import Path

WEIGHTS = (
    "config.json",
    "*.safetensors",
    "*.safetensors.index.json",
    "hf_quant_config.json",
    "quant_cfg.json",
    "dskjax-params.json",
    "top",
    "layer-[0-9]*",
)
"""Names in a checkpoint folder that belong to its weights; all else goes along when they change."""


@contextlib.contextmanager
def replacing(path: str | Path, *, overwrite: bool) -> Iterator[Path]:
    """A new folder to write into; it takes its place at `path` when the block ends well.

    It lies beside its place until then, under a hidden name that ends in `.tmp`; a killed process
    leaves it there, and nothing at `path`. With `overwrite`, files of the old folder that are
    neither weights nor their config are carried over.

    Raises:
        FileExistsError: `path` holds something, and `overwrite` is false or it is no checkpoint
            folder.
    """
    place = Path(path).resolve()
    taken = check_free(place, overwrite=overwrite)
    place.parent.mkdir(parents=True, exist_ok=True)
    tag = secrets.token_hex(4)
    new, old = (place.with_name(f".{place.name}.{tag}.{kind}") for kind in ("tmp", "old"))
    new.mkdir()
    try:
        yield new
        if taken:
            ignore = shutil.ignore_patterns(*WEIGHTS)
            shutil.copytree(place, new, symlinks=True, ignore=ignore, dirs_exist_ok=True)
        sync(new)
        if taken:
            place.rename(old)
        try:
            new.rename(place)
        except BaseException:
            if taken:
                old.rename(place)
            raise
        sync(place.parent)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    if taken:
        shutil.rmtree(old)


def check_free(place: Path, *, overwrite: bool) -> bool:
    """Whether a folder that may be replaced lies at `place`.

    Raises:
        FileExistsError: something else lies there, or `overwrite` is false.
    """
    if not place.exists() or (place.is_dir() and not any(place.iterdir())):
        return False
    if not (overwrite and (place / "config.json").is_file()):
        fix = "pass overwrite=True (--overwrite) to replace it"
        if overwrite:
            fix = "it is not a checkpoint folder"
        raise FileExistsError(f"{place} exists already; {fix}")
    return True


def write_text(path: Path, text: str) -> None:
    """Writes a new file and flushes it to the disk."""
    with open(path, "x", encoding="utf-8") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())


def copy_file(source: Path, target: Path) -> None:
    """Copies a file's content to a new file and flushes it to the disk."""
    with open(source, "rb") as old, open(target, "xb") as new:
        shutil.copyfileobj(old, new)
        new.flush()
        os.fsync(new.fileno())


def sync(folder: Path) -> None:
    """Flushes a folder's list of names to the disk."""
    handle = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)
