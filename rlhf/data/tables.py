"""Rows of Parquet and Arrow files, in batches of bounded size."""

from collections import Counter
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

from rlhf.config.errors import DataError
from rlhf.config.regular import open_regular
from rlhf.config.terminal import shown_name
from rlhf.data.arrow_sizes import check_batches
from rlhf.data.conversation import Struct
from rlhf.data.json_rows import JsonError, parsed
from rlhf.data.parquet_pages import RowGroup, row_groups
from rlhf.data.text_files import Rows, bad_row, too_long

_BATCH = 1000
# Bytes of a batch of rows; and of one page or cell, which must be in memory whole before it can be looked at.
_BATCH_BYTES = 64 * 1024**2
_LARGEST_PAGE = 256 * 1024**2
# A table of so many rows for each of its file's bytes was made to keep a reader busy.
_ROWS_PER_BYTE, _FREE_ROWS = 100, 1_000_000
# So is one whose rows have so many times the bytes of the file. Values that repeat are written once.
_EXPANSION, _FREE = 1000, 8 * 1024**3


def parquet_rows(path: Path, limit: int) -> Rows:
    """The rows of a Parquet file."""
    import pyarrow
    import pyarrow.parquet

    size, groups = _regular_size(path), row_groups(path)
    try:
        # Pages are read one after the other instead of whole columns.
        with pyarrow.parquet.ParquetFile(path, buffer_size=1024**2, pre_buffer=False) as file:
            _check_table(file.schema_arrow.names, sum(group.rows for group in groups), size, path)
            number, spend = 0, _budget(path, size)
            for index, group in enumerate(groups):
                if group.largest > max(_LARGEST_PAGE, limit):
                    reason = f"stands beside a cell of up to {group.largest} bytes: {too_long(limit)}"
                    for one in range(group.rows):
                        yield bad_row(f"{shown_name(path)}: row {number + one + 1}", reason)
                else:
                    batches = file.iter_batches(batch_size=_batch_size(group), row_groups=[index])
                    yield from batch_rows(batches, limit, place=f"{shown_name(path)}: row", first=number, spend=spend)
                number += group.rows
    except (pyarrow.ArrowException, UnicodeDecodeError, MemoryError) as error:
        raise DataError(f"{shown_name(path)}: not valid Parquet ({_first_line(error)})") from error


def _batch_size(group: RowGroup) -> int:
    """How many rows fit into _BATCH_BYTES, where a value that stands once in a dictionary may be in every row."""
    return max(1, min(_BATCH, _BATCH_BYTES // max(1, group.size // max(1, group.rows), group.dictionary)))


def _regular_size(path: Path) -> int:
    with open_regular(path) as file:
        return file.seek(0, 2)


def _check_table(names: list[str], rows: int, size: int, path: Path) -> None:
    """Raise DataError where two columns have one name, of which one would be lost, or rows have nearly no bytes."""
    twice = [name for name, number in Counter(names).items() if number > 1]
    if twice:
        raise DataError(f"{shown_name(path)}: the column {twice[0]!r:.80} occurs twice")
    if rows > _FREE_ROWS and rows > _ROWS_PER_BYTE * size:
        raise DataError(f"{shown_name(path)}: says that it has {rows} rows in {size} bytes, which cannot be")


def arrow_rows(path: Path, limit: int) -> Rows:
    """The rows of an Arrow file, in the form of a stream or with an index at its end."""
    import pyarrow

    size = _regular_size(path)
    try:
        check_batches(path, free=max(_LARGEST_PAGE, limit))
        # Not memory-mapped: a file that shrinks meanwhile would end the process.
        with pyarrow.OSFile(str(path)) as file:
            reader: Any
            try:
                reader = pyarrow.ipc.open_stream(file)
                schema = reader.schema
            except pyarrow.ArrowInvalid:
                whole = pyarrow.ipc.open_file(file)
                schema = whole.schema
                reader = (whole.get_batch(index) for index in range(whole.num_record_batches))
            _check_table(schema.names, 0, size, path)
            number, spend = 0, _budget(path, size)
            for batch in reader:
                number += batch.num_rows
                _check_table(schema.names, number, size, path)
                first = number - batch.num_rows
                yield from batch_rows([batch], limit, place=f"{shown_name(path)}: row", first=first, spend=spend)
    except (pyarrow.ArrowException, UnicodeDecodeError, MemoryError) as error:
        raise DataError(f"{shown_name(path)}: not valid Arrow ({_first_line(error)})") from error


def _budget(path: Path, size: int) -> Callable[[int], None]:
    """What counts the bytes of a file's rows, and raises DataError beyond what a file of `size` can mean to hold."""
    spent = 0

    def spend(number: int) -> None:
        nonlocal spent
        spent += number
        if spent > max(_FREE, _EXPANSION * size):
            raise DataError(
                f"{shown_name(path)}: its rows have more than {spent} bytes, though the file has only {size}"
            )

    return spend


def batch_rows(
    batches: Iterable[Any],
    limit: int,
    *,
    place: str,
    first: int = 0,
    spend: Callable[[int], None] = lambda number: None,
) -> Rows:
    """The rows of record batches; the one after `first` others is called `place` and its number.

    `spend` is told how many bytes are read.
    """
    number = first
    for batch in batches:
        _check_buffers(batch)
        decoders = list(_decoders(batch.schema))
        large = batch.nbytes > limit
        spend(0 if large else _batch_bytes(batch))
        for index in range(batch.num_rows):
            number += 1
            where = f"{place} {number}"
            one = batch.slice(index, 1)
            if large:
                spend(length := _row_bytes(one))
                if length > limit:
                    yield bad_row(where, too_long(limit))
                    continue
            try:
                row = one.to_pylist()[0]
                for name, decode in decoders:
                    row[name] = decode(row[name])
            except UnicodeDecodeError as error:
                yield bad_row(where, f"not valid UTF-8 ({error.reason})")
            except JsonError as error:
                yield bad_row(where, str(error))
            except (ValueError, OverflowError) as error:
                yield bad_row(where, f"a value that Python does not have ({error})")
            else:
                yield where, row


def _batch_bytes(batch: Any) -> int:
    """What the rows of a batch take together; a value of a dictionary counts as its average does."""
    import pyarrow

    total = 0
    for column in batch.columns:
        values = column.dictionary if pyarrow.types.is_dictionary(column.type) else column
        total += len(column) * values.nbytes // max(1, len(values))
    return total


def _row_bytes(row: Any) -> int:
    """What one row takes: of a column with a dictionary the value, not the dictionary."""
    import pyarrow

    total = 0
    for column in row.columns:
        plain = column.dictionary_decode() if pyarrow.types.is_dictionary(column.type) else column
        total += plain.nbytes
    return total


def _decoders(schema: Any) -> Iterator[tuple[str, Callable[[Any], Any]]]:
    """The columns with JSON in them, as `datasets` writes values of several kinds, or structs, and what reads each."""
    for column in schema:
        if (decode := _decoder(column.type)) is not None:
            yield column.name, decode


def _decoder(kind: Any) -> Callable[[Any], Any] | None:
    """What reads the JSON in a value of a type and tells its structs from JSON's objects; None: there is neither."""
    import pyarrow

    if isinstance(kind, pyarrow.BaseExtensionType):
        if kind.extension_name == "arrow.json":
            return lambda value: value if value is None else parsed(value)
        return _decoder(kind.storage_type)
    types = pyarrow.types
    lists = (
        types.is_list,
        types.is_large_list,
        types.is_fixed_size_list,
        types.is_list_view,
        types.is_large_list_view,
    )
    if any(is_list(kind) for is_list in lists):
        inner = _decoder(kind.value_type)
        return None if inner is None else lambda value: value if value is None else [inner(entry) for entry in value]
    if types.is_struct(kind):
        fields = {field.name: decode for field in kind if (decode := _decoder(field.type)) is not None}
        return lambda value: value if value is None else _struct(value, fields)
    return None


def _struct(value: dict[str, Any], fields: dict[str, Callable[[Any], Any]]) -> Struct:
    return Struct({key: fields[key](entry) if key in fields else entry for key, entry in value.items()})


def _check_buffers(batch: Any) -> None:
    """Raise ArrowInvalid where offsets point outside their buffers: reading such rows would end the process.

    A column of texts may hold what is not UTF-8: that is found row by row.
    """
    import pyarrow

    try:
        batch.validate(full=True)
    except pyarrow.ArrowInvalid as error:
        if "UTF8" not in str(error):
            raise
        for column in batch.columns:
            if pyarrow.types.is_string(column.type):
                column = column.view(pyarrow.binary())
            elif pyarrow.types.is_large_string(column.type):
                column = column.view(pyarrow.large_binary())
            column.validate(full=True)


def _first_line(error: BaseException) -> str:
    return str(error).strip().split("\n")[0][:300] or type(error).__name__
