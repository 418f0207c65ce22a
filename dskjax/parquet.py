"""Rows of a Parquet file as records, one row group after another (the extra `parquet`)."""

from collections.abc import Callable, Collection, Iterator
from pathlib import Path
from typing import Any

from dskjax.extras import require

_ROWS = 256  # made into Python objects at a time


def iter_rows(
    path: Path, fields: Collection[str], *, on_read: Callable[[int], Any] | None = None
) -> Iterator[tuple[int, dict[str, Any]]]:
    """(row number from 1, record) of a file. What is null is left out of the record, at any depth.

    Args:
        path: the file.
        fields: columns that are wanted; others are not read, unless the file has none of these.
        on_read: told after each row group how many more bytes of the file lie behind.

    Raises:
        ValueError: pyarrow is missing, or the file is damaged or not Parquet.
    """
    pyarrow, parquet = (require(name, str(path)) for name in ("pyarrow", "pyarrow.parquet"))
    number = told = 0
    with path.open("rb") as raw:
        try:
            file = parquet.ParquetFile(raw)
            columns = [name for name in file.schema_arrow.names if name in fields] or None
            for group in range(file.num_row_groups):
                for batch in file.iter_batches(_ROWS, row_groups=[group], columns=columns):
                    for row in batch.to_pylist():
                        number += 1
                        yield number, _without_nulls(row)
                if on_read is not None:
                    size = _bytes_on_disk(file.metadata.row_group(group))
                    on_read(size)
                    told += size
        except (pyarrow.ArrowException, OSError, UnicodeDecodeError) as error:
            raise ValueError(
                f"{path}: cannot be read as Parquet after row {number}: {error}"
            ) from error
    if on_read is not None:
        on_read(path.stat().st_size - told)  # header and footer


def _bytes_on_disk(group: Any) -> int:
    return sum(group.column(n).total_compressed_size for n in range(group.num_columns))


def _without_nulls(value: Any) -> Any:
    """A column is there for all rows, so null is how Parquet says that a row has no such field."""
    if isinstance(value, dict):
        return {name: _without_nulls(item) for name, item in value.items() if item is not None}
    if isinstance(value, list):
        return [_without_nulls(item) for item in value]
    return value
