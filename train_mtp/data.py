"""Packed batches for training.

`PackedDataset` cuts a token store into rows of `seq_len` tokens: batch number `step` is a pure
function of (store, arguments, step), so that a run resumes from its step number alone, and every
process of a job takes its own rows. Labels and loss masks are the loss's business (`segment_ids`
tell it where documents end).
"""

import hashlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import grain
import numpy as np
from jaxtyping import Int32

from train_mtp.token_store import TokenStore, build_store

__all__ = ["Batch", "PackedDataset", "TokenStore", "build_store", "read_ahead"]


class Batch(NamedTuple):
    """Rows of packed documents.

    Attributes:
        tokens: [B, S]; 0 where there is padding.
        segment_ids: [B, S]; 1, 2, ... per document in the row, 0 = padding.
        positions: [B, S]; from 0 in each segment. A document that goes on in another row starts
            there as a segment of its own.
        scored: [B, S]; 1 for tokens that count as labels, 0 for others; None if all do.
    """

    tokens: Int32[np.ndarray, "B S"]
    segment_ids: Int32[np.ndarray, "B S"]
    positions: Int32[np.ndarray, "B S"]
    scored: Int32[np.ndarray, "B S"] | None = None


class _Epoch(NamedTuple):
    documents: np.ndarray  # [documents] document at each place of the stream
    starts: np.ndarray  # [documents + 1] where it starts in the stream
    rows: np.ndarray  # [rows] order in which the stream's rows are served


class PackedDataset:
    """Batches of rows of `seq_len` tokens, by step number.

    An epoch is a permutation of the documents, laid end to end and cut every `seq_len` tokens; the
    rows are then served in a second permutation, lest the pieces of a long document fill a batch.
    Both derive from (seed, epoch). Each token is served once per epoch; only the last row of the
    stream is padded. Batches run on over the end of an epoch.

    Args:
        store: the corpus.
        seq_len: tokens per row.
        batch_size: rows per step, over all processes.
        seed: of both permutations.
        shuffle: False serves documents and rows in order (evaluation).
        epochs: after so many, rows are padding, and `n_steps` is the number of steps until then;
            None = no end.
        process_index, process_count: `batch` returns this process's consecutive part of the rows.
        answers_only: batches say which tokens count (`Batch.scored`): all of a text, of a
            conversation those of the last answer.
    """

    def __init__(
        self,
        store: TokenStore,
        *,
        seq_len: int,
        batch_size: int,
        seed: int = 0,
        shuffle: bool = True,
        epochs: int | None = None,
        process_index: int = 0,
        process_count: int = 1,
        answers_only: bool = False,
    ):
        if seq_len < 1 or batch_size < 1:
            raise ValueError(f"{seq_len=} and {batch_size=} must be positive")
        if not 0 <= process_index < process_count:
            raise ValueError(f"{process_index=} must be in 0..{process_count - 1}")
        if batch_size % process_count:
            raise ValueError(f"{batch_size=} must be a multiple of {process_count=}")
        self.store = store
        self.seq_len = seq_len
        self.batch_size = batch_size
        self.local_batch_size = batch_size // process_count
        self.rows_per_epoch = -(-store.n_tokens // seq_len)
        self.n_steps = None if epochs is None else -(-epochs * self.rows_per_epoch // batch_size)
        self._seed = seed
        self._shuffle = shuffle
        self._answers_only = answers_only
        self._epochs = epochs
        self._first_row = process_index * self.local_batch_size
        self._cache: dict[int, _Epoch] = {}

    def epoch(self, step: int) -> float:
        """Passes over the corpus completed before `step`."""
        return step * self.batch_size / self.rows_per_epoch

    def batch(self, step: int) -> Batch:
        """The rows of this process at `step`; the same arrays whenever it is asked for."""
        if step < 0:
            raise ValueError(f"{step=} must not be negative")
        b, s = self.local_batch_size, self.seq_len
        arrays = 4 if self._answers_only else 3
        out = Batch(*(np.zeros((b, s), np.int32) for _ in range(arrays)))
        first = step * self.batch_size + self._first_row
        row = 0
        while row < b:  # one turn per epoch in the batch
            epoch, in_epoch = divmod(first + row, self.rows_per_epoch)
            if self._epochs is not None and epoch >= self._epochs:
                break
            n = min(b - row, self.rows_per_epoch - in_epoch)
            order = self._epoch(epoch)
            part = Batch(*(a[row : row + n] for a in out if a is not None))
            _fill(part, self.store, order, order.rows[in_epoch : in_epoch + n])
            row += n
        return out

    def _epoch(self, epoch: int) -> _Epoch:
        # No lock: the dict holds pure values, and two threads at worst compute one twice.
        order = self._cache.get(epoch)
        if order is None:
            n, rows = self.store.n_documents, self.rows_per_epoch
            if self._shuffle:
                documents = _permutation(n, self._seed, epoch, 0)
                row_order = _permutation(rows, self._seed, epoch, 1)
            else:
                documents, row_order = np.arange(n), np.arange(rows)
            starts = np.zeros(n + 1, np.int64)
            np.cumsum(np.diff(self.store.offsets)[documents], out=starts[1:])
            order = _Epoch(documents, starts, row_order)
            self._cache = {**dict(list(self._cache.items())[-1:]), epoch: order}  # two are enough
        return order


class _Steps:
    """The batches of a data set as a source of `grain`."""

    def __init__(self, dataset: PackedDataset, stop: int):
        self._dataset, self._stop = dataset, stop

    def __len__(self) -> int:
        return self._stop

    def __getitem__(self, index: int) -> Batch:
        return self._dataset.batch(index)

    def __repr__(self) -> str:
        return f"batches 0..{self._stop - 1} of {self._dataset.store.n_tokens} tokens"


def read_ahead(
    dataset: PackedDataset,
    *,
    start: int,
    stop: int,
    place: Callable[[Batch], Any] = lambda batch: batch,
    depth: int = 2,
) -> Iterator[Any]:
    """The batches `start`, ..., `stop` - 1, made ahead by threads of `grain`.

    A batch is a function of its number, so the position in the data is the number of the next step
    and nothing else; what fails in a thread is raised where its batch would have come.

    Args:
        dataset: what to read.
        start, stop: step numbers.
        place: applied to each batch in the thread, e.g. the copy to the devices.
        depth: batches made ahead at most.
    """
    steps = grain.MapDataset.source(_Steps(dataset, stop)).slice(slice(start, stop)).map(place)
    options = grain.ReadOptions(num_threads=depth, prefetch_buffer_size=depth)
    return iter(steps.to_iter_dataset(options))


def _fill(out: Batch, store: TokenStore, order: _Epoch, rows: np.ndarray) -> None:
    """Writes the given rows of an epoch's stream; a segment is what a row and a document share."""
    s = out.tokens.shape[1]
    row_start = rows * s
    row_end = np.minimum(row_start + s, store.n_tokens)
    first = np.searchsorted(order.starts, row_start, side="right") - 1
    last = np.searchsorted(order.starts, row_end, side="left") - 1
    count = last - first + 1
    row, nth = np.repeat(np.arange(len(rows)), count), _ramps(count)
    place = first[row] + nth
    begin = np.maximum(order.starts[place], row_start[row])
    length = np.minimum(order.starts[place + 1], row_end[row]) - begin
    source = store.offsets[order.documents[place]] + begin - order.starts[place]
    target = row * s + begin - row_start[row]

    position = _ramps(length)
    at = np.repeat(source, length) + position
    filled = [store.tokens[at], np.repeat(nth + 1, length), position]
    if out.scored is not None:
        # A place in the document, which a segment may begin in the middle of.
        place_in_document = position + np.repeat(begin - order.starts[place], length)
        first_scored = store.answers[order.documents[place]]
        filled.append(place_in_document >= np.repeat(first_scored, length))
    if len(at) == out.tokens.size:
        where: Any = slice(None)  # no padding: targets are all cells in order
    else:
        where = np.repeat(target, length) + position
    for array, values in zip((a for a in out if a is not None), filled, strict=True):
        array.reshape(-1)[where] = values


def _ramps(lengths: np.ndarray) -> np.ndarray:
    """0, 1, ... for each length in turn."""
    ends = np.cumsum(lengths)
    return np.arange(ends[-1]) - np.repeat(ends - lengths, lengths)


def _permutation(n: int, seed: int, epoch: int, use: int) -> np.ndarray:
    """A permutation that no NumPy release may change: raw bits of Philox and a stable sort."""
    entropy = hashlib.blake2b(f"{seed} {epoch} {use}".encode(), digest_size=16).digest()
    bits = np.random.Philox(key=int.from_bytes(entropy, "little")).random_raw(n)
    return np.argsort(bits, kind="stable")
