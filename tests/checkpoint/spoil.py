"""Ways to spoil a checkpoint folder of three files, each a function of the folder."""

import dataclasses
import json
import os
from collections.abc import Callable
from pathlib import Path

import numpy as np

from dskjax.checkpoint import CheckpointError
from tests.checkpoint.build import read_file, write_file

INDEX = "model.safetensors.index.json"
FILES = [f"model-{i:05d}-of-00003.safetensors" for i in (1, 2, 3)]

Spoil = Callable[[Path], object]


@dataclasses.dataclass(frozen=True)
class Damage:
    """What is done to a folder, and the error that must name it."""

    do: Spoil
    says: tuple[str, ...]
    error: type[Exception] = CheckpointError


def damage(do: Spoil, *says: str, error: type[Exception] = CheckpointError) -> Damage:
    return Damage(do, says, error)


def weight_map(folder: Path) -> dict[str, str]:
    return json.loads((folder / INDEX).read_text())["weight_map"]


def set_map(folder: Path, mapping: object) -> None:
    (folder / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": mapping}))


def edit(folder: Path, change: Callable[[dict[str, np.ndarray]], None]) -> None:
    """Changes the tensors wherever they lie; new ones go to the first file. The index follows."""
    mapping = weight_map(folder)
    tensors = {name: w for file in FILES for name, w in read_file(folder / file).items()}
    change(tensors)
    mapping = {name: mapping.get(name, FILES[0]) for name in tensors}
    for file in FILES:
        write_file(folder / file, {n: w for n, w in tensors.items() if mapping[n] == file})
    set_map(folder, mapping)


def put(name: str, value: np.ndarray | None) -> Spoil:
    """Sets one tensor, or takes it away."""

    def change(tensors: dict[str, np.ndarray]) -> None:
        tensors.pop(name, None)
        if value is not None:
            tensors[name] = value

    return lambda folder: edit(folder, change)


def copied(name: str) -> Spoil:
    """A second copy of a tensor, in a file that the index does not give it."""

    def change(folder: Path) -> None:
        own = weight_map(folder)[name]
        other = next(file for file in FILES if file != own)
        tensor = read_file(folder / own)[name]
        write_file(folder / other, read_file(folder / other) | {name: tensor})

    return change


def config(**changes: object) -> Spoil:
    def change(folder: Path) -> None:
        old = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(old | changes))

    return change


def text(name: str, content: str | bytes) -> Spoil:
    content = content.encode() if isinstance(content, str) else content
    return lambda folder: (folder / name).write_bytes(content) and None


def remap(name: str, file: object) -> Spoil:
    return lambda folder: set_map(folder, weight_map(folder) | {name: file})


def remove(*patterns: str) -> Spoil:
    def change(folder: Path) -> None:
        for pattern in patterns:
            for path in folder.glob(pattern):
                path.unlink()

    return change


def then(*steps: Spoil) -> Spoil:
    def change(folder: Path) -> None:
        for step in steps:
            step(folder)

    return change


def cut(name: str, length: int) -> Spoil:
    return lambda folder: os.truncate(folder / name, length)
