"""Rows as a package stores them: their size, and their values."""

from __future__ import annotations

import msgspec
import numpy as np

from dist_export.errors import PackageError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.row_encodings import INT8_ROWWISE, TAIL_BYTES, U8, decode_int8, encode_values, widen_bfloat16
from dist_export.manifest import SlotEntry, TableEntry


def is_sound_encoding(slot: SlotEntry) -> bool:
    """Return whether the encoding of a slot is known, and its dtype and shape match it."""
    return (
        slot.encoding == INT8_ROWWISE
        and slot.dtype == DTYPES[U8].torch
        and slot.dim is not msgspec.UNSET
        and slot.shape == (slot.dim + TAIL_BYTES,)
    )


def row_bytes_of(slot: SlotEntry) -> int:
    """Return the bytes of a row of a slot whose dtype is known, as it is stored."""
    return int(np.prod(slot.shape, dtype=np.int64)) * DTYPES[CODE_BY_TORCH[slot.dtype]].itemsize


def decode_rows(rows: np.ndarray, slot: SlotEntry) -> np.ndarray:
    """Return rows as they are stored (uint8, (n, row_bytes)) as values, (n, ...). bfloat16 and int8 with scale become float32."""
    if slot.encoding is not msgspec.UNSET:
        return decode_int8(rows)
    values = rows.reshape(-1).view(DTYPES[CODE_BY_TORCH[slot.dtype]].numpy).reshape(len(rows), *slot.shape)
    return widen_bfloat16(values) if slot.dtype == "bfloat16" else values


def encode_default(table: TableEntry, slot: SlotEntry, *, where: str) -> np.ndarray:
    """Return the default row that a table states as values, as it would be stored: uint8 of shape (row_bytes,).

    PackageError if it has the wrong number of values. ``where`` is the package.
    """
    assert not isinstance(table.default_row, (msgspec.UnsetType, str))
    encoding = "" if slot.encoding is msgspec.UNSET else slot.encoding
    row = encode_values(table.default_row, CODE_BY_TORCH[slot.dtype], encoding)
    if row.nbytes != row_bytes_of(slot):
        raise PackageError(
            f"{where}: the default row of table {table.name!r} has {len(table.default_row):,} values, which is no row of it"
        )
    return row
