"""Score the rows of a file with a package: ``python -m dist_export score PATH --input FILE --output FILE``."""

from __future__ import annotations

import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np

from dist_export.errors import ConfigError, UserError
from dist_export.package.reader import Package
from dist_export.serve.columns import Column, Lists, count_rows, read_batches, to_inputs


def score_file(
    package: Package,
    source: str,
    target: str,
    *,
    batch_size: int,
    keep: Sequence[str] = (),
    note_rows: Callable[[int], object] = lambda _: None,
) -> int:
    """Score the rows of a file in batches, and write a parquet file with a column for each output. Returns the rows.

    Args:
        package: a package with a score program.
        source: a parquet, jsonl or npz file.
        target: the parquet file to write. It appears whole, or not at all.
        batch_size: the rows that are scored at once.
        keep: columns of the source that are written too.
        note_rows: is called with the number of rows after each batch.

    Raises:
        UserError: a file or a column is not what is needed; the target exists.
        PackageError: the package has no score program, or was replaced.
    """
    try:
        import pyarrow as pa
        from pyarrow import parquet
    except ImportError:
        raise ConfigError("score needs the package pyarrow: pip install 'dist_export[parquet]'") from None
    if batch_size < 1:
        raise ConfigError(f"--batch_size is {batch_size}; give a number from 1 up")
    if os.path.lexists(target):
        raise ConfigError(f"{target}: File exists. Nothing was written; give another --output")
    if Path(target).suffix != ".parquet":
        raise ConfigError(f"--output is {target!r}; give a name that ends in .parquet")
    entries = package.manifest.score.inputs if package.manifest.score is not msgspec.UNSET else ()
    _refuse_taken_names(package, keep)
    from dist_export.package.score_inputs import read_inputs  # it imports torch

    partial, writer, total = f"{target}.partial", None, 0
    try:
        for columns in read_batches(source, batch_size, entries):
            missing = [name for name in keep if name not in columns]
            if missing:
                raise UserError(f"{source}: no column {missing[0]!r} to keep; the file has {', '.join(columns)}")
            # here, so that the error of a value that its input cannot hold names the file
            scores = package.score(read_inputs(entries, to_inputs(columns, entries, where=source), where=source))
            rows = count_rows(columns)
            table = pa.table(
                {name: _to_arrow(columns[name]) for name in keep}
                | {name: _to_arrow(_as_column(value, rows, name)) for name, value in scores.items()}
            )
            if writer is None:
                writer = _open_writer(parquet, partial, table.schema, target)
            writer.write_table(_as_before(table, writer.schema, source))
            total += rows
            note_rows(rows)
        if writer is None:
            raise UserError(f"{source} has no rows")
        writer.close()
        os.replace(partial, target)
    finally:
        if writer is not None and writer.is_open:
            writer.close()
        if os.path.lexists(partial):
            os.unlink(partial)
    return total


def _refuse_taken_names(package: Package, keep: Sequence[str]) -> None:
    outputs = package.manifest.score.outputs if package.manifest.score is not msgspec.UNSET else ()
    taken = [output.name for output in outputs if output.name in keep]
    if taken:
        raise ConfigError(f"--keep {taken[0]}: an output of the package has this name; give the column another one")


def _open_writer(parquet: Any, partial: str, schema: Any, target: str) -> Any:
    try:
        return parquet.ParquetWriter(partial, schema)
    except OSError as error:
        raise ConfigError(
            f"--output {target} cannot be written: {os.strerror(error.errno) if error.errno else error}; give another --output"
        ) from None


def _as_before(table: Any, schema: Any, source: str) -> Any:
    """Return a table with the types of the batches before it. UserError if a column that is kept has another type."""
    for place, field in enumerate(schema):
        found = table.schema.field(place).type
        if found == field.type:
            continue
        is_empty = hasattr(found, "value_type") and not len(table.column(place).combine_chunks().flatten())
        if not (is_empty and hasattr(field.type, "value_type")):
            raise UserError(
                f"{source}: column {field.name!r} is {field.type} in the first rows and {found} in later ones; give all its rows "
                "one type"
            )
        table = table.set_column(place, field, table.column(place).cast(field.type))
    return table


def _as_column(value: np.ndarray, rows: int, name: str) -> Column:
    """Return an output as a column: a number for each row, or a list of them."""
    if value.shape[:1] != (rows,):
        raise UserError(f"output {name!r} has the shape {list(value.shape)} for {rows:,} rows, so it is no column")
    flat = value.reshape(rows, -1)
    if flat.shape[1] == 1:
        return flat[:, 0]
    return Lists(flat.ravel(), np.arange(rows + 1) * flat.shape[1])


def _to_arrow(column: Column) -> Any:
    import pyarrow as pa

    if isinstance(column, np.ndarray):
        return pa.array(column) if column.ndim == 1 else pa.array(list(column))
    return pa.ListArray.from_arrays(pa.array(column.bounds, pa.int32()), pa.array(column.values))
