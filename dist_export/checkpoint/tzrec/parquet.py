"""Read a parquet file of a TorchEasyRec dump in batches of bounded size, through pyarrow.

Rows are float32 values, or uint8: the values, then scale and offset as float16. The latter two are widened to float32, which
loses nothing and makes the row one of ``int8_rowwise``.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

import numpy as np

from dist_export.checkpoint.tzrec.files import DumpFile
from dist_export.errors import CheckpointError, ConfigError
from dist_export.formats.row_encodings import TAIL_BYTES
from dist_export.redact import first_line
from dist_export.storage.directory import Directory
from dist_export.storage.range_file import RangeFile

FLOAT, QUANTIZED = "float32", "uint8"
"""The kinds of rows."""

_HALF_TAIL = 4
"""Bytes of scale and offset as float16."""
_BATCH_ROWS = 8192
_BUFFER_BYTES = 1 << 20
"""Read ahead of each column."""
_COLUMNS = ("global_step", "rank", "world_size", "table_fqn", "key_id", "embedding")


class Batch(NamedTuple):
    """Rows of one table."""

    table: str
    """As the dump names it."""
    kind: str
    keys: np.ndarray
    """int64."""
    rows: np.ndarray
    """uint8, (n, row_bytes)."""


def need_pyarrow() -> None:
    """Raise ConfigError if pyarrow is not there."""
    try:
        import pyarrow.parquet  # noqa: F401
    except ImportError:
        raise ConfigError(
            "format is tzrec_delta, whose dumps are parquet files, which need the package pyarrow: "
            "pip install 'dist_export[parquet]'"
        ) from None


def read_batches(directory: Directory, file: DumpFile) -> Iterator[Batch]:
    """Yield the rows of a file. CheckpointError where it is damaged, or is not what its name says."""
    import pyarrow as pa
    from pyarrow import parquet

    where = directory.describe(file.path)
    size = directory.stat(file.path).size
    with directory.open_reader(file.path) as reader:
        try:
            opened = parquet.ParquetFile(RangeFile(reader, 0, size), buffer_size=_BUFFER_BYTES, pre_buffer=False)
            kind = _check_schema(opened.schema_arrow, where)
            for batch in opened.iter_batches(_BATCH_ROWS, columns=list(_COLUMNS), use_threads=False):
                _check_origin(batch, file, where)
                yield from _split(batch, kind, where)
        except (pa.ArrowException, ValueError, EOFError, OSError) as error:
            if isinstance(error, OSError) and error.errno is not None:
                raise  # of the disk; arrow's own have no number
            raise CheckpointError(
                f"{where} is no parquet file that can be read: {first_line(error)}. Copy the dump again"
            ) from error


def _check_schema(schema: Any, where: str) -> str:
    """Return the kind of the rows. CheckpointError if the columns are not those of a dump."""
    import pyarrow as pa

    lacking = [name for name in _COLUMNS if schema.get_field_index(name) < 0]
    if lacking:
        raise CheckpointError(
            f"{where} lacks the columns {', '.join(lacking)}, so it is no dump of TorchEasyRec; it has {', '.join(schema.names)}"
        )
    kind = schema.field("embedding").type
    of_values = kind.value_type if pa.types.is_list(kind) or pa.types.is_large_list(kind) else None
    if of_values not in (pa.float32(), pa.uint8()):
        raise CheckpointError(
            f"{where}: embedding is {kind}; expected a list of float32 or of uint8; give another dump"
        )
    if schema.field("key_id").type != pa.int64():
        raise CheckpointError(f"{where}: key_id is {schema.field('key_id').type}; expected int64; give another dump")
    return FLOAT if of_values == pa.float32() else QUANTIZED


def _check_origin(batch: Any, file: DumpFile, where: str) -> None:
    """Compare step, rank and world size of the rows with those in the file's name. CheckpointError."""
    from pyarrow import compute

    for column, expected in (("global_step", file.step), ("rank", file.rank), ("world_size", file.world_size)):
        ends = compute.min_max(batch.column(column)).as_py()
        for found in ends.values():
            if batch.num_rows and found != expected:
                raise CheckpointError(
                    f"{where}: its rows have {column} {found}, and its name says {expected}. Give it back the name that it had"
                )


def _split(batch: Any, kind: str, where: str) -> Iterator[Batch]:
    """Yield the rows of each table of a batch."""
    if any(batch.column(name).null_count for name in ("table_fqn", "key_id", "embedding")):
        raise CheckpointError(f"{where}: a row lacks its table, its key or its embedding; give another dump")
    names = batch.column("table_fqn").dictionary_encode()
    codes = names.indices.to_numpy(zero_copy_only=False)
    keys = batch.column("key_id").to_numpy(zero_copy_only=False)
    embedding = batch.column("embedding")
    for code, name in enumerate(names.dictionary.to_pylist()):
        chosen = np.flatnonzero(codes == code)
        its = embedding if len(chosen) == len(codes) else embedding.take(_to_arrow(chosen))
        yield Batch(name, kind, keys[chosen], _to_rows(its, kind, f"{where}: table {name!r}"))


def _to_arrow(numbers: np.ndarray) -> Any:
    import pyarrow as pa

    return pa.array(numbers)


def _to_rows(embedding: Any, kind: str, where: str) -> np.ndarray:
    """Return embeddings as bytes of rows. CheckpointError if they are not all of one width."""
    widths = np.unique(np.diff(embedding.offsets.to_numpy(zero_copy_only=False)))
    values = embedding.flatten()
    if len(widths) != 1 or not widths[0] or values.null_count:
        what = "values are missing" if values.null_count else f"rows have {widths[0]} and {widths[-1]} values"
        raise CheckpointError(f"{where}: {what}; expected as many in each row; give another dump")
    rows = values.to_numpy(zero_copy_only=False).reshape(len(embedding), int(widths[0]))
    if kind == FLOAT:
        return np.ascontiguousarray(rows, "<f4").view(np.uint8).reshape(len(rows), -1)
    dim = rows.shape[1] - _HALF_TAIL
    if dim < 1:
        raise CheckpointError(
            f"{where}: rows of {rows.shape[1]} bytes have no room for values, scale and offset; give another dump"
        )
    wide = np.empty((len(rows), dim + TAIL_BYTES), np.uint8)
    wide[:, :dim] = rows[:, :dim]
    halves = np.ascontiguousarray(rows[:, dim:]).view("<f2")
    wide[:, dim:] = halves.astype("<f4").view(np.uint8)
    return wide
