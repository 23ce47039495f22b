"""The entries of all headers as columns: what the ranks exchange instead of a million objects."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from dist_export.formats.interning import Numbering
from dist_export.formats.safetensors import Header


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class HeaderColumns:
    """The entries of the headers of some files, as parallel columns of length n, in the order of files and headers."""

    place: np.ndarray
    """int32: the block's name, as its place among the names that every rank has read from the checkpoint's index."""
    is_row_indexed: np.ndarray
    """bool: the header has the name without the suffix of dense tensors that the index gives it."""
    file: np.ndarray
    """int32: number of the file."""
    dtype: np.ndarray
    """int8: index into ``layout.dtypes.DTYPES``."""
    rows: np.ndarray
    """int64: the first dimension, -1 for a scalar."""
    inner: np.ndarray
    """int32: the other dimensions, a place in ``inner_shapes``."""
    inner_shapes: tuple[tuple[int, ...], ...]
    begin: np.ndarray
    end: np.ndarray
    """int64: absolute positions in the file, in bytes."""
    with_metadata: tuple[int, ...]
    """Files with a ``__metadata__`` entry."""
    with_lower_bool: tuple[int, ...]
    """Files with a tensor of dtype ``bool``."""

    def __len__(self) -> int:
        return len(self.place)

    def shape(self, row: int) -> tuple[int, ...]:
        """Return the shape of one block."""
        rows = int(self.rows[row])
        return (rows, *self.inner_shapes[self.inner[row]]) if rows >= 0 else ()


def to_columns(
    header: Header, *, file: int, place: np.ndarray, is_row_indexed: np.ndarray | None = None
) -> HeaderColumns:
    """Return the columns of one header, with ``place`` (int32) of each of its keys."""
    return HeaderColumns(
        place=place,
        is_row_indexed=np.zeros(len(place), bool) if is_row_indexed is None else is_row_indexed,
        file=np.full(len(place), file, np.int32),
        dtype=header.dtypes,
        rows=header.rows,
        inner=header.inner,
        inner_shapes=header.inner_shapes,
        begin=header.begins,
        end=header.ends,
        with_metadata=(file,) if header.has_metadata else (),
        with_lower_bool=(file,) if header.has_lower_bool else (),
    )


def join_columns(shares: Sequence[HeaderColumns]) -> HeaderColumns:
    """Join the columns of runs of files, in this order."""
    if len(shares) == 1:
        return shares[0]
    number: Numbering[tuple[int, ...]] = Numbering()
    inner = [np.zeros(0, np.int32)]
    for share in shares:
        renumbered = np.array([number[shape] for shape in share.inner_shapes], np.int32)
        inner.append(renumbered[share.inner])

    def column(name: str, dtype: type) -> np.ndarray:
        return np.concatenate([np.zeros(0, dtype), *(getattr(share, name) for share in shares)])

    return HeaderColumns(
        place=column("place", np.int32),
        is_row_indexed=column("is_row_indexed", bool),
        file=column("file", np.int32),
        dtype=column("dtype", np.int8),
        rows=column("rows", np.int64),
        inner=np.concatenate(inner),
        inner_shapes=tuple(number),
        begin=column("begin", np.int64),
        end=column("end", np.int64),
        with_metadata=tuple(file for share in shares for file in share.with_metadata),
        with_lower_bool=tuple(file for share in shares for file in share.with_lower_bool),
    )
