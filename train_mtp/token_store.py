"""A corpus as one flat array of token ids in a memory-mapped file, made once and found again."""

import dataclasses
import hashlib
import json
import shutil
import tempfile
from collections.abc import Iterable, Iterator, Sequence
from pathlib import Path
from typing import BinaryIO

import numpy as np
import rich.progress

from dskjax.document_tokens import tokenise
from dskjax.documents import Document, form, iter_file, list_files
from dskjax.tokenizer import Tokenizer

_FORMAT = 2  # of the cache; part of its key


@dataclasses.dataclass(frozen=True)
class TokenStore:
    """A tokenised corpus.

    Attributes:
        tokens: [N] uint16 or uint32, all documents one after another, bos and eos included.
        offsets: [documents + 1] int64; document d is tokens[offsets[d]:offsets[d + 1]], not empty.
        answers: [documents] int64, where in each document its answer begins: the first token after
            the prompt of a conversation, 0 in plain text.
        n_bytes: UTF-8 bytes of text behind the tokens.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    answers: np.ndarray
    n_bytes: int = 0

    def __post_init__(self):
        if len(self.answers) != len(self.offsets) - 1:
            raise ValueError(
                f"{len(self.answers)} answers for {len(self.offsets) - 1} documents of the store"
            )
        bounds = self.offsets
        if len(bounds) < 2 or bounds[0] != 0 or bounds[-1] != len(self.tokens):
            raise ValueError(
                f"offsets must run from 0 to {len(self.tokens)} over at least one document"
            )
        if np.any(np.diff(bounds) <= 0):
            raise ValueError("a document of the token store is empty")

    @property
    def n_documents(self) -> int:
        """Number of documents."""
        return len(self.offsets) - 1

    @property
    def n_tokens(self) -> int:
        """Number of tokens, bos and eos included."""
        return len(self.tokens)

    @classmethod
    def from_documents(
        cls, documents: Iterable[Sequence[int]], answers: Sequence[int] | None = None
    ) -> "TokenStore":
        """A store in memory from ids, and where each document's answer begins (0 if None)."""
        arrays = [np.asarray(d, np.uint32) for d in documents]
        lengths = [len(a) for a in arrays]
        begin = np.zeros(len(arrays), np.int64) if answers is None else np.asarray(answers)
        return cls(np.concatenate(arrays), np.cumsum([0, *lengths], dtype=np.int64), begin)

    @classmethod
    def open(cls, directory: str | Path) -> "TokenStore":
        """Maps the files that `build_store` left in `directory`."""
        directory = Path(directory)
        try:
            meta = json.loads((directory / "meta.json").read_text())
            tokens = np.load(directory / "tokens.npy", mmap_mode="r", allow_pickle=False)
            tokens = tokens.view(np.ndarray)  # still mapped; plain indexing is faster
            offsets = np.load(directory / "offsets.npy", allow_pickle=False)
            answers = np.load(directory / "answers.npy", allow_pickle=False)
            return cls(tokens, offsets, answers, meta["n_bytes"])
        except (OSError, EOFError, ValueError, KeyError, TypeError) as error:
            raise ValueError(
                f"{directory}: not a usable token store ({error}); delete it to have it rebuilt"
            ) from error


def build_store(
    paths: Sequence[str | Path],
    tokenizer: Tokenizer,
    cache_dir: str | Path,
    *,
    progress: bool = True,
) -> TokenStore:
    """Tokenises files and folders (`dskjax.documents`), or finds the result of an earlier call.

    Each document gets bos in front and eos behind, once. The cache folder's name is a hash of the
    tokenizer and of the files' contents in order, so a moved file is found again and an edited one
    is not. It appears in one rename: a killed build leaves nothing that looks finished, and two
    builds at a time do no harm.
    """
    files = list_files(paths)
    final = Path(cache_dir) / store_key(files, tokenizer)
    if not final.is_dir():
        final.parent.mkdir(parents=True, exist_ok=True)
        work = Path(tempfile.mkdtemp(prefix=f"{final.name}.tmp-", dir=final.parent))
        try:
            work.chmod(0o755)
            _write_store(files, tokenizer, work, progress)
            try:
                work.rename(final)
            except OSError:
                if not final.is_dir():  # else another process was first, with the same content
                    raise
        finally:
            shutil.rmtree(work, ignore_errors=True)
    return TokenStore.open(final)


def store_key(files: Sequence[Path], tokenizer: Tokenizer) -> str:
    """Name of the cache folder: changes with the tokenizer, a file's content, the files' order."""
    digest = hashlib.blake2b(digest_size=12)
    digest.update(f"{_FORMAT} {tokenizer.fingerprint}".encode())
    for path in files:
        with path.open("rb") as file:
            content = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=32))
        digest.update(form(path).encode())
        digest.update(content.digest())
    return digest.hexdigest()


def _write_store(files: Sequence[Path], tokenizer: Tokenizer, out: Path, progress: bool) -> None:
    dtype = np.dtype(np.uint16 if tokenizer.vocab_size <= 1 << 16 else np.uint32)
    lengths: list[int] = []
    answers: list[int] = []
    n_tokens = n_bytes = 0
    columns = (*rich.progress.Progress.get_default_columns(), "{task.fields[note]}")
    with (
        rich.progress.Progress(*columns, disable=not progress) as bar,
        (out / "tokens.npy").open("wb") as file,
    ):
        task = bar.add_task("tokenising", total=sum(f.stat().st_size for f in files), note="")

        def documents() -> Iterator[Document]:
            for path in files:
                yield from iter_file(
                    path, tokenizer=tokenizer, on_read=lambda n: bar.advance(task, n)
                )

        _write_header(file, dtype, 0)
        header = file.tell()
        for document, ids, answer in tokenise(documents(), tokenizer):
            file.write(ids.tobytes())
            lengths.append(len(ids))
            answers.append(answer)
            n_tokens += len(ids)
            n_bytes += len(document.text.encode())
            if len(lengths) % 256 == 0:
                bar.update(task, note=f"{n_tokens / 1e6:.1f}M tokens")
        bar.update(task, note=f"{n_tokens / 1e6:.1f}M tokens")
        file.seek(0)
        _write_header(file, dtype, n_tokens)
        assert file.tell() == header
    if not lengths:
        raise ValueError(
            f"no training text: all documents are blank in {', '.join(map(str, files))}"
        )
    np.save(out / "offsets.npy", np.cumsum([0, *lengths], dtype=np.int64))
    np.save(out / "answers.npy", np.asarray(answers, np.int64))
    meta = {
        "n_tokens": n_tokens,
        "n_documents": len(lengths),
        "n_bytes": n_bytes,
        "files": [f.name for f in files],
    }
    (out / "meta.json").write_text(json.dumps(meta, indent=2) + "\n")


def _write_header(file: BinaryIO, dtype: np.dtype, length: int) -> None:
    """The .npy header; NumPy pads it so that its length does not depend on `length`."""
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (length,),
    }
    np.lib.format.write_array_header_1_0(file, header)
