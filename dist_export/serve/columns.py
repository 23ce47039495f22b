"""Columns of a file as the inputs of a score program: numbers, lists of one length, and lists of any length."""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dist_export.errors import UserError
from dist_export.manifest import TensorEntry

LIST_PARTS = ("values", "weights", "lengths", "offsets", "bounds")
"""An input ``<column>_<part>`` takes a column of lists apart."""


class Lists(NamedTuple):
    """A column of lists: the values of all rows, and ``bounds`` (int64, (n + 1,)), where those of each row begin and end."""

    values: np.ndarray
    bounds: np.ndarray


Column = np.ndarray | Lists
_Reader = Callable[[str, int], Iterator[dict[str, Column]]]


def read_batches(path: str, batch_size: int, entries: Sequence[TensorEntry]) -> Iterator[dict[str, Column]]:
    """Yield the rows of a file in batches, as columns by name.

    ``entries``: the inputs of the program; an npz file may have them as they are.

    Raises:
        UserError: the file is missing, or is no parquet, jsonl or npz.
    """
    suffix = Path(path).suffix
    npz = functools.partial(_read_npz, shapes={entry.name: tuple(entry.shape) for entry in entries})
    readers: dict[str, _Reader] = {".parquet": _read_parquet, ".jsonl": _read_jsonl, ".npz": npz}
    if suffix not in readers:
        raise UserError(f"{path}: inputs are read from {', '.join(readers)}, by the end of the name")
    try:
        yield from readers[suffix](path, batch_size)
    except (FileNotFoundError, IsADirectoryError) as error:
        raise UserError(f"{path}: {error.strerror}") from None
    except (ValueError, TypeError, OverflowError, EOFError) as error:  # pyarrow's own errors are of these kinds
        raise UserError(
            f"{path} is no sound {suffix.removeprefix('.')} file: {next(iter(str(error).splitlines()), '')}"
        ) from None


def count_rows(columns: Mapping[str, Column]) -> int:
    """Return the number of rows of a batch."""
    return next((_count(column) for column in columns.values()), 0)


def to_inputs(columns: Mapping[str, Column], entries: Sequence[TensorEntry], *, where: str) -> dict[str, np.ndarray]:
    """Return the tensors that a score program takes, from the columns of a batch.

    An input has the column of its name. If there is none, the inputs ``<column>_values``, ``_weights``, ``_lengths``,
    ``_offsets`` (where each row begins) and ``_bounds`` (these, and the end) come from a column of lists.

    Raises:
        UserError: a column is missing, or does not have the dtype or the shape of its input.
    """
    return {entry.name: _check_kind(_find(columns, entry, where), entry, where) for entry in entries}


def _find(columns: Mapping[str, Column], entry: TensorEntry, where: str) -> np.ndarray:
    column = columns.get(entry.name)
    if isinstance(column, np.ndarray):
        return column
    stem, _, part = entry.name.rpartition("_")
    is_apart = part in LIST_PARTS and isinstance(columns.get(stem), Lists)
    if isinstance(column, Lists) and not (part == "weights" and is_apart):
        lengths = np.diff(column.bounds)
        width = entry.shape[1] if len(entry.shape) == 2 else None
        if width is None or (len(lengths) and (lengths != lengths[0]).any()):
            raise UserError(
                f"{where}: column {entry.name!r} has lists of several lengths, and the input has [{_say(entry)}]"
            )
        return column.values.reshape(
            len(lengths), int(lengths[0]) if len(lengths) else int(width) if isinstance(width, int) else 0
        )
    if is_apart:
        weights = columns.get(f"{stem}_weights")
        lists = weights if part == "weights" else columns.get(stem)
        if isinstance(lists, Lists):
            values = columns.get(stem)
            if part == "weights" and isinstance(values, Lists) and not np.array_equal(values.bounds, lists.bounds):
                raise UserError(f"{where}: the lists of {stem!r} and of '{stem}_weights' differ in length in some row")
            if part in ("values", "weights"):
                return lists.values
            if part == "lengths":
                return np.diff(lists.bounds)
            # a program that takes as many offsets as rows takes where each row begins
            return lists.bounds if part == "bounds" or entry.shape != ("batch",) else lists.bounds[:-1]
    raise UserError(f"{where}: no column for the input {entry.name!r}; the file has {', '.join(columns) or 'none'}")


def _check_kind(value: np.ndarray, entry: TensorEntry, where: str) -> np.ndarray:
    """Return a column as it is, of its own dtype: whoever casts it must refuse values that the input's dtype cannot hold."""
    dtype = np.dtype("float32" if entry.dtype == "bfloat16" else entry.dtype)
    if not value.size:
        return value.astype(dtype)
    if value.dtype.kind not in {"b": "b", "i": "iu", "u": "iu", "f": "iuf"}[dtype.kind]:
        raise UserError(f"{where}: column of the input {entry.name!r} is {value.dtype}, expected {entry.dtype}")
    return value


def _say(entry: TensorEntry) -> str:
    return ", ".join(map(str, entry.shape))


def _count(column: Column) -> int:
    return len(column) if isinstance(column, np.ndarray) else len(column.bounds) - 1


# ---- files ----


def _read_parquet(path: str, batch_size: int) -> Iterator[dict[str, Column]]:
    from pyarrow import parquet

    with parquet.ParquetFile(path) as file:
        for batch in file.iter_batches(batch_size):
            yield _from_arrow(batch, path)


def _read_jsonl(path: str, batch_size: int) -> Iterator[dict[str, Column]]:
    import pyarrow as pa

    decoder, rows = msgspec.json.Decoder(dict[str, Any]), []
    with open(path, "rb") as file:
        for number, line in enumerate(file, 1):
            if not line.strip():
                continue
            try:
                rows.append(decoder.decode(line))
            except msgspec.MsgspecError as error:
                raise UserError(f"{path}: line {number} is no JSON object: {error}") from None
            if len(rows) == batch_size:
                yield _from_arrow(pa.Table.from_pylist(rows), path)
                rows = []
    if rows:
        yield _from_arrow(pa.Table.from_pylist(rows), path)


def _read_npz(path: str, batch_size: int, shapes: Mapping[str, tuple[int | str, ...]]) -> Iterator[dict[str, Column]]:
    """Arrays are cut along their first dimension. ``x_values`` is cut by ``x_bounds``, ``x_lengths`` or ``x_offsets``.

    ``shapes``: of the program's inputs.
    """
    with np.load(path, allow_pickle=False) as file:
        arrays = {name: file[name] for name in file.files}
    columns: dict[str, Column] = {}
    for name, array in arrays.items():
        stem, _, part = name.rpartition("_")
        if part in ("values", "weights") and (bounds := _bounds_of(stem, name, arrays, shapes, path)) is not None:
            columns[stem if part == "values" else name] = Lists(array, bounds)
        elif not _is_part(name, arrays):
            columns[name] = array
    counts = {name: _count(column) for name, column in columns.items()}
    if len(set(counts.values())) > 1:
        raise UserError(f"{path}: arrays have different numbers of rows: {counts}")
    total = count_rows(columns)
    for first in range(0, total, batch_size):
        yield {name: _slice(column, first, min(first + batch_size, total)) for name, column in columns.items()}


def _is_part(name: str, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether an array says something of the lists ``<stem>_values``, and is no column."""
    stem, _, part = name.rpartition("_")
    return part in LIST_PARTS and f"{stem}_values" in arrays


def _bounds_of(
    stem: str, name: str, arrays: Mapping[str, np.ndarray], shapes: Mapping[str, tuple[int | str, ...]], path: str
) -> np.ndarray | None:
    """Return where the lists of an array ``name`` begin and end, None where no other array says so.

    Raises:
        UserError: they do not fit into the array, one after the other.
    """
    part = next((part for part in ("bounds", "lengths", "offsets") if f"{stem}_{part}" in arrays), None)
    if part is None:
        return None
    given = arrays[f"{stem}_{part}"]
    bounds = np.append(0, np.cumsum(given)) if part == "lengths" else given
    if part == "offsets" and not _has_end(given, shapes.get(f"{stem}_offsets"), arrays):
        bounds = np.append(given, len(arrays[name]))
    if (
        bounds.ndim != 1
        or not len(bounds)
        or bounds[0]
        or (np.diff(bounds) < 0).any()
        or bounds[-1] != len(arrays[name])
    ):
        told = " (the input of the program has the end behind them)" if part == "offsets" and bounds is given else ""
        raise UserError(
            f"{path}: '{stem}_{part}'{told} does not cut the {len(arrays[name]):,} elements of {name!r} into lists, one after "
            f"the other: it is {np.array2string(given, threshold=6, edgeitems=2, separator=', ')}"
        )
    return bounds


def _has_end(offsets: np.ndarray, shape: tuple[int | str, ...] | None, arrays: Mapping[str, np.ndarray]) -> bool:
    """Whether the last of offsets is the end of all lists: so the program's input says, else the rows of other arrays."""
    if shape in (("batch",), ("batch + 1",)):
        return shape == ("batch + 1",)
    return len(offsets) - 1 in {len(array) for name, array in arrays.items() if not _is_part(name, arrays)}


def _slice(column: Column, first: int, last: int) -> Column:
    if isinstance(column, np.ndarray):
        return column[first:last]
    bounds = column.bounds[first : last + 1]
    return Lists(column.values[bounds[0] : bounds[-1]], bounds - bounds[0])


def _from_arrow(batch: Any, path: str) -> dict[str, Column]:
    """Return the columns of a record batch or table of pyarrow."""
    import pyarrow as pa

    columns: dict[str, Column] = {}
    for name, column in zip(batch.schema.names, batch.columns, strict=True):
        if name in columns:
            raise UserError(f"{path}: two columns are called {name!r}; give each a name of its own")
        array = column.combine_chunks() if isinstance(column, pa.ChunkedArray) else column
        if array.null_count:
            raise UserError(f"{path}: column {name!r} has {array.null_count} rows without a value; give each row one")
        kind = array.type
        if pa.types.is_fixed_size_list(kind):
            array = array.cast(pa.list_(kind.value_type))
        if pa.types.is_list(array.type) or pa.types.is_large_list(array.type):
            lengths = array.value_lengths().to_numpy(zero_copy_only=False)
            bounds = np.append(0, np.cumsum(lengths)).astype(np.int64)
            values = array.flatten()
            if pa.types.is_null(values.type):
                values = values.cast(pa.int64())
            if values.null_count:
                raise UserError(f"{path}: column {name!r} has lists with {values.null_count} missing values")
            columns[name] = Lists(values.to_numpy(zero_copy_only=False), bounds)
        else:
            columns[name] = array.to_numpy(zero_copy_only=False)
    return columns
