"""A folder made piece by piece, that another process goes on with when the first one is killed.

    .NAME.part/        beside the folder's place
        job.json       what is made, and of what
        done.jsonl     a line for each piece that is done: name, bytes, SHA-256
        new/           the pieces; becomes the folder when all are there
        old/           what it replaces, between two renames

A piece is a file or a folder of files. It is done once it is flushed to the disk and written down;
all else that lies in `new` when a process takes over is thrown away, and so is a piece whose bytes
are no longer those that were written down.
"""

import contextlib
import dataclasses
import fcntl
import hashlib
import json
import logging
import os
import shutil
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

from dskjax.checkpoint.folder import check_free, sync, write_text

_LOG = logging.getLogger(__name__)
_CHUNK = 1 << 20
_OTHER = "repeat that command to finish it, or pass overwrite=True (--overwrite) to begin anew"


@dataclasses.dataclass(frozen=True)
class Piece:
    """What is known of the bytes of a file, or of all files of a folder.

    Attributes:
        nbytes: how many.
        sha256: their hash; a folder's covers the names and sizes of its files too.
    """

    nbytes: int
    sha256: str


def fingerprint(path: Path, *, report: Callable[[int], object] = lambda count: None) -> Piece:
    """Hashes a file or a folder, and flushes it to the disk.

    Args:
        path: what to read.
        report: called with numbers of bytes as they are read.
    """
    total, digest, buffer = 0, hashlib.sha256(), memoryview(bytearray(_CHUNK))
    folder = path.is_dir()
    files = sorted(p for p in path.rglob("*") if p.is_file()) if folder else [path]
    for file in files:
        with open(file, "rb", buffering=0) as stream:
            os.fsync(stream.fileno())
            if folder:
                size = os.fstat(stream.fileno()).st_size
                digest.update(f"{file.relative_to(path).as_posix()}\0{size}\0".encode())
            while count := stream.readinto(buffer):
                digest.update(buffer[:count])
                total += count
                report(count)
    for inner in [p for p in path.rglob("*") if p.is_dir()] + [path] if folder else []:
        sync(inner)
    return Piece(total, digest.hexdigest())


class Pieces:
    """The folder that is being made.

    Attributes:
        folder: where pieces are written, under the names they will have.
        done: those that are done.
        complete: there is nothing left to do, the folder is in its place.
    """

    def __init__(self, work: Path, done: Mapping[str, Piece], *, complete: bool = False):
        self.folder = work / "new"
        self.done = dict(done)
        self.complete = complete
        self._journal = work / "done.jsonl"
        self._hashing = ThreadPoolExecutor(max_workers=1, thread_name_prefix="hash")
        self._waiting: list[Future[None]] = []

    def finish(self, name: str) -> None:
        """Tells that a piece is written. It is hashed and written down meanwhile."""
        self._waiting.append(self._hashing.submit(self._write_down, name))

    def wait(self) -> None:
        """Returns when all that `finish` was told of is written down."""
        for future in self._waiting:
            future.result()
        self._waiting.clear()

    def close(self) -> None:
        """Frees the thread."""
        self._hashing.shutdown()

    def _write_down(self, name: str) -> None:
        piece = fingerprint(self.folder / name)
        sync(self.folder)
        with open(self._journal, "a", encoding="utf-8") as file:
            file.write(json.dumps({"name": name, **dataclasses.asdict(piece)}) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.done[name] = piece


@contextlib.contextmanager
def resuming(
    path: str | Path,
    job: Mapping[str, Any],
    *,
    overwrite: bool,
    report: Callable[[int], object] = lambda count: None,
) -> Iterator[Pieces]:
    """A folder to write pieces into; it takes its place at `path` when the block ends well.

    When it ends otherwise, pieces that are done stay, and the next call with the same job begins
    with them.

    Args:
        path: the place.
        job: a JSON object; equal jobs make equal pieces.
        overwrite: replace a checkpoint folder at `path`, and begin anew if another job was begun.
        report: called with numbers of bytes of pieces that were there, as they are checked.

    Raises:
        FileExistsError: `path` holds something, and `overwrite` is false or it is no checkpoint
            folder.
        ValueError: another job for this place was begun, or one is being done.
    """
    place = Path(path).resolve()
    work = _work_of(place)
    if not work.exists():
        check_free(place, overwrite=overwrite)
    place.parent.mkdir(parents=True, exist_ok=True)
    work.mkdir(exist_ok=True)
    with _locked(work):
        pieces = _take_over(work, place, job, overwrite, report)
        try:
            yield pieces
            if not pieces.complete:
                pieces.wait()
                _move(work, place, taken=check_free(place, overwrite=overwrite))
        finally:
            pieces.close()
        _remove(work)


def bytes_there(place: Path) -> int:
    """Bytes that an interrupted call left for the folder at `place`."""
    new = _work_of(place) / "new"
    return sum(path.stat().st_size for path in new.rglob("*") if path.is_file())


def _work_of(place: Path) -> Path:
    return place.with_name(f".{place.name}.part")


def _take_over(
    work: Path,
    place: Path,
    job: Mapping[str, Any],
    overwrite: bool,
    report: Callable[[int], object],
) -> Pieces:
    file, new = work / "job.json", work / "new"
    wanted = json.loads(json.dumps(job))
    begun = json.loads(file.read_text(encoding="utf-8")) if file.exists() else None
    if begun is not None and begun != wanted:
        if not overwrite:
            raise ValueError(f"{work} was begun with {_difference(begun, wanted)}; {_OTHER}")
        begun = None
    if begun is not None and not new.exists():
        return Pieces(work, {}, complete=True)  # moved to its place by the process before
    check_free(place, overwrite=overwrite)
    if begun is None:
        _clear(work)
        new.mkdir()
        write_text(work / "job.tmp", json.dumps(wanted, indent=2) + "\n")
        (work / "job.tmp").rename(file)  # from here on there is something to go on with
        sync(work)
    done = _check_done(work, report)
    for path in new.iterdir():
        if path.name not in done:
            _delete(path)
    return Pieces(work, done)


def _check_done(work: Path, report: Callable[[int], object]) -> dict[str, Piece]:
    journal, done = work / "done.jsonl", {}
    lines = journal.read_text(encoding="utf-8").splitlines() if journal.exists() else []
    for line in lines:
        if not line.endswith("}"):
            continue  # the last process was killed while it wrote this one
        fields = json.loads(line)
        name, piece = fields["name"], Piece(fields["nbytes"], fields["sha256"])
        path = work / "new" / name
        if path.exists() and fingerprint(path, report=report) == piece:
            done[name] = piece
        else:
            _LOG.warning("%s: %s is not as it was written; making it again", work, name)
    _delete(work / "done.tmp")
    entries = [{"name": name, **dataclasses.asdict(piece)} for name, piece in done.items()]
    write_text(work / "done.tmp", "".join(json.dumps(entry) + "\n" for entry in entries))
    (work / "done.tmp").rename(journal)
    return done


def _move(work: Path, place: Path, *, taken: bool) -> None:
    new, old = work / "new", work / "old"
    sync(new)
    if taken:
        _delete(old)
        place.rename(old)
    try:
        new.rename(place)
    except BaseException:
        if taken:
            old.rename(place)
        raise
    sync(place.parent)


def _clear(work: Path) -> None:
    _delete(work / "job.json")  # first: without it the rest means nothing
    for path in work.iterdir():
        _delete(path)


def _remove(work: Path) -> None:
    for path in work.iterdir():
        if path.name != "job.json":
            _delete(path)
    _delete(work / "job.json")
    work.rmdir()


def _delete(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _difference(begun: Any, wanted: Any, name: str = "") -> str:
    if not isinstance(begun, dict) or not isinstance(wanted, dict):
        return f"{name} = {begun!r}, which is {wanted!r} now"
    for key in begun | wanted:
        if begun.get(key) != wanted.get(key):
            return _difference(begun.get(key), wanted.get(key), f"{name}.{key}" if name else key)
    raise AssertionError((begun, wanted))


@contextlib.contextmanager
def _locked(work: Path) -> Iterator[None]:
    handle = os.open(work, os.O_RDONLY)  # the kernel drops the lock when the process is gone
    try:
        try:
            fcntl.flock(handle, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ValueError(f"{work}: another process is writing there; wait for it") from error
        yield
    finally:
        os.close(handle)
