"""Read lists of ids from files: npy, parquet (through pyarrow), or text with one id per line. Memory is limited."""

from __future__ import annotations

import io
import os
from collections.abc import Iterator
from typing import Any

import numpy as np

from dist_export.errors import ConfigError, PlanError
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import RangeReader
from dist_export.storage.urls import open_directory

PARQUET_COLUMN = "id"

_NPY = b"\x93NUMPY"
_PARQUET = b"PAR1"
_PIECE_BYTES = 1 << 20
_MAX_HEADER_BYTES = 1 << 16
_MAX_LINE_BYTES = 1 << 12
_BATCH_ROWS = 1 << 16
_ID_BYTES = 8


def read_id_list(
    path: str,
    *,
    most_bytes: int,
    setting: str,
    storage_options: dict[str, Any] | None = None,
    piece_bytes: int = _PIECE_BYTES,
) -> np.ndarray:
    """Return the ids of a file (int64, sorted, without duplicates). Any rank, for itself.

    The first bytes of the file decide its format. Unsigned 64-bit numbers become the signed ones with the same bits, as in RecIS.

    Args:
        path: a local file, or an fsspec URL of one.
        most_bytes: limit of the list, at 8 bytes per id; reading it takes as much memory again.
        setting: the setting that names the file, for messages.
        storage_options: for the file system of a URL.
        piece_bytes: how much of npy and of text is read at once.

    Raises:
        ConfigError: the file cannot be read, or contains something other than ids.
        PlanError: it contains more ids than the limit allows.
    """
    where = f"{setting}: {path}"
    scheme, is_url, rest = path.partition("://")
    folder, name = os.path.split(rest if is_url else path)
    folder = f"{scheme}://{folder}" if is_url else folder
    directory = open_directory(
        folder or ".", storage_options if is_url else None, follow_links=True
    )  # the user has named this file, so it may be a link
    try:
        size = directory.stat(name).size
        reader = directory.open_reader(name)
        try:
            head = bytearray(min(size, 8))
            reader.read_into(memoryview(head), 0)
            room = _Room(where, most_bytes)
            if head.startswith(_NPY):
                ids = _read_npy(reader, size, room, piece_bytes)
            elif head.startswith(_PARQUET):
                ids = _read_parquet(directory, name, room)
            else:
                ids = _read_text(reader, size, room, piece_bytes)
        finally:
            reader.close()
    except OSError as error:
        raise ConfigError(f"{where} cannot be read: {error.strerror or error}") from error
    ids.sort()
    if len(ids) and (ids[1:] == ids[:-1]).any():
        ids = ids[np.concatenate([[True], ids[1:] != ids[:-1]])]
    return ids


class _Room:
    """A limit on the number of ids."""

    def __init__(self, where: str, most_bytes: int) -> None:
        self.where = where
        self._most = most_bytes // _ID_BYTES

    def take(self, count: int, *, is_all: bool = True) -> None:
        """Refuse more ids than the limit. PlanError."""
        if count > self._most:
            least = "" if is_all else "at least "
            raise PlanError(
                f"{self.where} holds {least}{count:,} ids of {_ID_BYTES} bytes; lists of ids may take a quarter of max_memory "
                f"together, which leaves room for {self._most:,}. Raise max_memory"
            )


def _read_npy(reader: RangeReader, size: int, room: _Room, piece_bytes: int) -> np.ndarray:
    head = bytearray(min(size, _MAX_HEADER_BYTES))
    reader.read_into(memoryview(head), 0)
    stream = io.BytesIO(head)
    try:
        version = np.lib.format.read_magic(stream)
        read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
        shape, _, dtype = read(stream)
    except Exception as error:  # noqa: BLE001 -- numpy parses the header as Python, which can raise any exception
        said = next(iter(str(error).strip().splitlines()), "") or type(error).__name__
        raise ConfigError(f"{room.where} is no npy file that can be read: {said}") from None
    if dtype.kind not in "iu" or len(shape) != 1:
        raise ConfigError(f"{room.where} holds {dtype} of shape {list(shape)}; expected integers of shape [n]")
    begin, count = stream.tell(), shape[0]
    if begin + count * dtype.itemsize != size:
        raise ConfigError(f"{room.where} has {size:,} bytes, its header says {begin + count * dtype.itemsize:,}")
    room.take(count)
    ids = np.empty(count, np.int64)
    step = piece_bytes // dtype.itemsize
    for first in range(0, count, step):
        piece = np.empty(min(step, count - first), dtype)
        reader.read_into(piece.view(np.uint8).data, begin + first * dtype.itemsize)
        ids[first : first + len(piece)] = _signed(piece)
    return ids


def _read_parquet(directory: Directory, name: str, room: _Room) -> np.ndarray:
    try:
        import pyarrow as pa
        import pyarrow.parquet as pq
    except ImportError:
        raise ConfigError(
            f"{room.where} is a parquet file, which needs the package pyarrow: pip install pyarrow"
        ) from None
    with directory.open_stream(name) as stream:
        try:
            file = pq.ParquetFile(stream)
            schema, count = file.schema_arrow, file.metadata.num_rows
            if PARQUET_COLUMN not in schema.names or not pa.types.is_integer(schema.field(PARQUET_COLUMN).type):
                told = ", ".join(f"{field.name} ({field.type})" for field in schema)
                raise ConfigError(f"{room.where} has no column {PARQUET_COLUMN!r} of integers; it has {told or 'none'}")
            room.take(count)
            ids = np.empty(count, np.int64)
            filled = 0
            for batch in file.iter_batches(batch_size=_BATCH_ROWS, columns=[PARQUET_COLUMN]):
                column = batch.column(0)
                if column.null_count:
                    raise ConfigError(f"{room.where} has a null in its column {PARQUET_COLUMN!r}")
                ids[filled : filled + len(column)] = _signed(column.to_numpy(zero_copy_only=False))
                filled += len(column)
        except (pa.ArrowException, ValueError) as error:
            if isinstance(error, ConfigError):
                raise
            raise ConfigError(f"{room.where} is no parquet file that can be read: {error}") from None
    return ids[:filled]


def _read_text(reader: RangeReader, size: int, room: _Room, piece_bytes: int) -> np.ndarray:
    pieces = [np.zeros(0, np.int64)]
    count = 0
    for number, lines in _read_lines(reader, size, room.where, piece_bytes):
        ids = _parse(number, [line.strip() for line in lines], room.where)
        count += len(ids)
        room.take(count, is_all=False)
        pieces.append(ids)
    return np.concatenate(pieces)


def _read_lines(reader: RangeReader, size: int, where: str, piece_bytes: int) -> Iterator[tuple[int, list[bytes]]]:
    """Yield the lines of a file, many at a time, each time with the number of the first line, counted from 1."""
    rest, number = b"", 1
    for first in range(0, size, piece_bytes):
        piece = bytearray(min(piece_bytes, size - first))
        reader.read_into(memoryview(piece), first)
        *lines, rest = (rest + piece).split(b"\n")
        yield number, lines
        number += len(lines)
        if len(rest) > _MAX_LINE_BYTES:
            raise ConfigError(f"{where} is neither npy nor parquet, and line {number} is no id")
    yield number, [rest]


def _parse(number: int, lines: list[bytes], where: str) -> np.ndarray:
    values: list[int] = []
    for place, line in enumerate(lines):
        if not line:
            continue
        digits = line[1:] if line[:1] == b"-" else line
        if not digits.isdigit() or len(digits) > 20 or not -(1 << 63) <= int(line) < 1 << 64:
            raise ConfigError(
                f"{where}: line {number + place} is {line[:40].decode(errors='replace')!r}; expected one id a line, a whole "
                "number of 64 bits"
            )
        values.append(int(line))
    try:
        return np.array(values, np.int64)
    except OverflowError:
        return np.array([value - (1 << 64) if value >= 1 << 63 else value for value in values], np.int64)


def _signed(values: np.ndarray) -> np.ndarray:
    native: np.ndarray = values.astype(values.dtype.newbyteorder("="))
    return native.view(np.int64) if native.dtype == np.uint64 else native
