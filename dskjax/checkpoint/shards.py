"""The tensors of a Hugging Face folder, whichever file each of them lies in.

One `model.safetensors`, or an index `model.safetensors.index.json` with
{"weight_map": {tensor: file}} beside its shards; the tensors of a layer may lie in any of them.
"""

import contextlib
from collections.abc import Iterator
from pathlib import Path
from types import TracebackType
from typing import Any

import numpy as np

from dskjax.checkpoint.safetensors import CheckpointError, Entry, SafetensorsFile, parse_object

SINGLE = "model.safetensors"
INDEX = "model.safetensors.index.json"
PICKLED = (".bin", ".pt", ".pth", ".ckpt", ".pkl")


def read_json(path: Path) -> dict[str, Any]:
    """The JSON object in a file of an untrusted folder.

    Raises:
        CheckpointError: no such file, or no JSON object in it.
    """
    try:
        raw = path.read_bytes()
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror})") from error
    return parse_object(raw, str(path))


def check_folder(folder: Path) -> None:
    """Raises CheckpointError when there is no such directory."""
    if not folder.is_dir():
        found = "a file" if folder.exists() else "nothing"
        raise CheckpointError(f"{folder}: expected a checkpoint directory, found {found}")


class Shards:
    """All tensors of a folder under their names. Headers are read and checked when it is opened.

    Attributes:
        folder: the directory.
    """

    def __init__(self, folder: Path):
        check_folder(folder)
        self.folder = folder
        self._of: dict[str, SafetensorsFile] = {}
        with contextlib.ExitStack() as stack:
            index = folder / INDEX
            if index.exists():
                self._open_index(index, stack)
            elif (folder / SINGLE).exists():
                file = stack.enter_context(SafetensorsFile(folder / SINGLE))
                self._of = dict.fromkeys(file.entries, file)
            else:
                raise CheckpointError(f"{folder}: {_what_is_there(folder)}")
            self._stack = stack.pop_all()

    def __enter__(self) -> "Shards":
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        at: TracebackType | None,
    ) -> None:
        self._stack.close()

    def __contains__(self, name: str) -> bool:
        return name in self._of

    def __iter__(self) -> Iterator[str]:
        return iter(self._of)

    def file(self, name: str) -> Path:
        """The file that holds a tensor."""
        return self._of[name].path

    def entry(self, name: str) -> Entry:
        """Dtype, shape and place of a tensor."""
        return self._of[name].entries[name]

    def place(self, name: str) -> tuple[str, int]:
        """Where a tensor begins; in this order files are read from front to back."""
        file = self._of[name]
        return file.path.name, file.entries[name].offset

    def read(
        self, name: str, start: int = 0, stop: int | None = None, out: np.ndarray | None = None
    ) -> np.ndarray:
        """Reads a tensor or some of its rows; see `SafetensorsFile.read`."""
        return self._of[name].read(name, start, stop, out)

    def _open_index(self, index: Path, stack: contextlib.ExitStack) -> None:
        weight_map = read_json(index).get("weight_map")
        if not isinstance(weight_map, dict) or not weight_map:
            raise CheckpointError(
                f"{index}: expected a non-empty object 'weight_map', found {weight_map!r}"
            )
        for name, file in weight_map.items():
            _check_file_name(index, name, file)
        if SINGLE not in weight_map.values() and (self.folder / SINGLE).exists():
            raise CheckpointError(
                f"{self.folder}: has both {SINGLE} and {INDEX}, which does not mention it; "
                "remove the one that is out of date"
            )
        files = {}
        for name, file in weight_map.items():
            if file not in files:
                if not (self.folder / file).exists():
                    raise CheckpointError(
                        f"{index}: tensor {name!r} should be in {file}, but that file is missing"
                    )
                files[file] = stack.enter_context(SafetensorsFile(self.folder / file))
            if name not in files[file].entries:
                raise CheckpointError(
                    f"{index}: tensor {name!r} should be in {file}, which does not hold it"
                )
            self._of[name] = files[file]
        for opened in files.values():
            _check_indexed(index, opened, weight_map)


def _check_file_name(index: Path, name: str, file: Any) -> None:
    # A plain name only: no way out of the folder, on any system. The file itself may be a symbolic
    # link, as all of them are in Hugging Face's cache.
    plain = isinstance(file, str) and file.endswith(".safetensors")
    if not plain or any(c in "/\\:" or ord(c) < 32 for c in file):
        raise CheckpointError(
            f"{index}: tensor {name!r} points to {file!r}; "
            "expected the name of a .safetensors file in the same folder"
        )


def _check_indexed(index: Path, file: SafetensorsFile, known: dict[str, str]) -> None:
    for name in file.entries:
        if known.get(name, file.path.name) != file.path.name:
            raise CheckpointError(
                f"{index}: tensor {name!r} should be in {known[name]}, but {file.path.name} holds "
                "one, too; remove the one that is out of date"
            )
    extra = sorted(set(file.entries) - set(known))
    if extra:
        raise CheckpointError(
            f"{index}: does not mention tensor {extra[0]!r} of {file.path.name}"
            + (f", nor {len(extra) - 1} more" if len(extra) > 1 else "")
        )


def _what_is_there(folder: Path) -> str:
    names = sorted(path.name for path in folder.iterdir())
    if found := [name for name in names if name.endswith(PICKLED)]:
        return (
            f"has pickled weights ({found[0]}) but no {SINGLE}. A pickle can run any code, "
            "so none is ever loaded: convert the checkpoint to safetensors first"
        )
    if found := [name for name in names if name.endswith(".safetensors")]:
        return (
            f"has {', '.join(found[:3])} but neither {SINGLE} nor {INDEX}; "
            f"rename a single file to {SINGLE}, or add the index of several"
        )
    return f"has no weights: expected {SINGLE}, or {INDEX} with its shards"
