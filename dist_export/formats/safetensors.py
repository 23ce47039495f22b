"""Read and write safetensors headers as RecIS does. Pure: bytes and columns, no files.

A file is 8 bytes (little-endian u64, the header's length N), N bytes of JSON, then the data. Each entry has ``dtype``,
``shape`` and ``data_offsets`` relative to the end of the header. Source: the safetensors format specification; for
padding and order, the files that RecIS's C++ writer writes.
"""

from __future__ import annotations

import itertools
import math
import re
import struct
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import CODE_BY_NAME, DTYPES, OTHER_DTYPES, PACKED_BITS
from dist_export.formats.interning import Numbering
from dist_export.formats.strict_json import decode_canonical, decode_object, show

__all__ = ["Header", "decode_foreign_header", "decode_header", "decode_object", "encode_header", "header_length"]

MAX_HEADER_BYTES = 1 << 30
"""A longer header is treated as an attack. A block takes about 120 bytes, so this allows nine million blocks."""

_MAX_SIZE = 1 << 62
"""No file can have a larger size."""

_MAX_DIMS = 64
"""The limit of torch and numpy. The product of very many sizes is a number that takes minutes to compute."""

_MAX_FAST_WIDTH = 1 << 40
"""Rows of more elements than this are checked one by one, with integers of any length."""

_ITEMSIZES = np.array([dtype.itemsize for dtype in DTYPES], np.int64)

_BYTES_BY_NAME = {name: DTYPES[code].itemsize for name, code in CODE_BY_NAME.items()}

_FOREIGN = {dtype.name: dtype for dtype in (*DTYPES, *OTHER_DTYPES) if dtype.name}
_BITS = {name: 8 * size for name, size in _BYTES_BY_NAME.items()}
_FOREIGN_BITS = {**{name: 8 * dtype.itemsize for name, dtype in _FOREIGN.items()}, **PACKED_BITS}
_DTYPE_NAME = re.compile(r"[A-Za-z][A-Za-z0-9_]{0,31}")


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Header:
    """The entries of one file as parallel columns, in header order.

    ``begins`` and ``ends`` (int64) are absolute positions in the file, in bytes. ``dtypes`` (int8) index ``DTYPES``.
    A shape has two columns: ``rows`` (int64) is the first dimension, -1 for a scalar; ``inner`` (int32) indexes
    ``inner_shapes``, which has the other dimensions.
    """

    keys: tuple[str, ...]
    dtypes: np.ndarray
    rows: np.ndarray
    inner: np.ndarray
    inner_shapes: tuple[tuple[int, ...], ...]
    begins: np.ndarray
    ends: np.ndarray
    has_metadata: bool
    has_lower_bool: bool

    def shape(self, row: int) -> tuple[int, ...]:
        """Return the shape of one entry."""
        rows = int(self.rows[row])
        return (rows, *self.inner_shapes[self.inner[row]]) if rows >= 0 else ()

    @property
    def shapes(self) -> tuple[tuple[int, ...], ...]:
        """The shapes of all entries."""
        return tuple(
            (rows, *self.inner_shapes[inner]) if rows >= 0 else ()
            for rows, inner in zip(self.rows.tolist(), self.inner.tolist(), strict=True)
        )


class _Entry(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    """One block. The fields have the order in which RecIS and the safetensors library write them."""

    dtype: str
    shape: tuple[int, ...]
    data_offsets: tuple[int, int]


_DECODER = msgspec.json.Decoder(dict[str, _Entry])


def header_length(prefix: bytes, *, path: str, file_size: int) -> int:
    """Return N from the first 8 bytes of a file of ``file_size`` bytes; CheckpointError if it is impossible."""
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path}: {file_size} bytes, too short for a safetensors file; it is truncated, so save or copy it again"
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > min(file_size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: says that its header has {length:,} bytes, but the file has {file_size:,}; "
            "it is truncated or no safetensors file"
            "; save or copy it again"
        )
    return int(length)


def decode_header(raw: bytes, *, path: str, file_size: int) -> Header:
    """Decode and check the JSON header ``raw`` of a file of ``file_size`` bytes.

    Raises:
        CheckpointError: not JSON, a duplicate key, an unknown dtype, a length that does not follow from dtype and shape,
            blocks that overlap or leave a hole, or data that does not end at the end of the file.
    """
    data_start = 8 + len(raw)
    entries = decode_canonical(raw, _DECODER)
    if entries is not None:
        header = _build(entries, data_start=data_start)
        if header is not None and _is_sound(header, data_start=data_start, file_size=file_size):
            return header
    return _decode_slowly(raw, path=path, file_size=file_size)


class ForeignEntry(NamedTuple):
    """One tensor of a file that RecIS did not write."""

    name: str
    dtype: str
    """Torch's name. The file's own name if torch has none, or if elements share bytes."""
    shape: tuple[int, ...]
    begin: int
    """Absolute position in the file, in bytes."""
    num_bytes: int


def decode_foreign_header(raw: bytes, *, path: str, file_size: int) -> tuple[tuple[ForeignEntry, ...], dict[str, str]]:
    """Decode and check the header of a file of any writer, with more dtypes than RecIS has, and with ``__metadata__``.

    Returns its tensors in header order, and the metadata. CheckpointError as :func:`decode_header`, except that unknown dtypes
    are accepted: the number of bytes of such a tensor is taken from the file.
    """
    document = decode_object(raw, what=f"{path}: header")
    metadata = document.pop("__metadata__", None)
    if metadata is not None and not (
        isinstance(metadata, dict) and all(isinstance(value, str) for value in metadata.values())
    ):
        raise CheckpointError(
            f"{path}: __metadata__ is {show(metadata)}; expected texts by name; save or copy it again"
        )
    entries = _decode_entries(document, _FOREIGN_BITS, data_start=8 + len(raw), file_size=file_size, path=path)
    offsets = np.array([entry.data_offsets for entry in entries.values()], np.int64).reshape(-1, 2)
    _check_tiling(tuple(entries), offsets[:, 0], offsets[:, 1], data_size=file_size - 8 - len(raw), path=path)
    found = tuple(
        ForeignEntry(
            name,
            _FOREIGN[entry.dtype].torch if entry.dtype in _FOREIGN else entry.dtype,
            entry.shape,
            8 + len(raw) + entry.data_offsets[0],
            entry.data_offsets[1] - entry.data_offsets[0],
        )
        for name, entry in entries.items()
    )
    return found, metadata or {}


def encode_header(entries: Iterable[tuple[str, int, tuple[int, ...], int]]) -> bytes:
    """Return the length prefix and header of a file whose blocks are contiguous.

    Args:
        entries: (key, dtype code, shape, num_bytes) in file order.

    The JSON is compact and padded with 1 to 8 spaces to a multiple of 8, as RecIS's writer does.
    """
    header: dict[str, _Entry] = {}
    position = 0
    for key, code, shape, num_bytes in entries:
        header[key] = _Entry(DTYPES[code].name, shape, (position, position + num_bytes))
        position += num_bytes
    text = msgspec.json.encode(header)
    text += b" " * (8 - len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def _build(entries: dict[str, _Entry], *, data_start: int, has_metadata: bool = False) -> Header | None:
    """Return the columns; None if a file cannot have one of the numbers or dtypes."""
    blocks = list(entries.values())
    names = [block.dtype for block in blocks]
    number: Numbering[tuple[int, ...]] = Numbering()
    try:
        dtypes = np.array([CODE_BY_NAME[name] for name in names], np.int8)
        rows = np.array([block.shape[0] if block.shape else -1 for block in blocks], np.int64)
        inner = np.array([number[block.shape[1:]] for block in blocks], np.int32)
        offsets = np.fromiter(
            itertools.chain.from_iterable([block.data_offsets for block in blocks]), np.int64, 2 * len(blocks)
        ).reshape(-1, 2)
    except (KeyError, OverflowError):
        return None
    if rows.min(initial=0) < 0 and any(block.shape and block.shape[0] < 0 for block in blocks):
        return None  # -1 is used here for a scalar
    return Header(
        keys=tuple(entries),
        dtypes=dtypes,
        rows=rows,
        inner=inner,
        inner_shapes=tuple(number),
        begins=offsets[:, 0] + data_start,
        ends=offsets[:, 1] + data_start,
        has_metadata=has_metadata,
        has_lower_bool="bool" in names,
    )


def _is_sound(header: Header, *, data_start: int, file_size: int) -> bool:
    """Return whether the blocks are contiguous from the first to the last byte, and as long as dtype and shape require."""
    if not len(header.keys):
        return data_start == file_size
    if max(map(len, header.inner_shapes)) >= _MAX_DIMS:
        return False
    widths = [math.prod(shape) for shape in header.inner_shapes]
    if any(size < 0 for shape in header.inner_shapes for size in shape) or max(widths) > _MAX_FAST_WIDTH:
        return False
    row_bytes = np.array(widths, np.int64)[header.inner] * _ITEMSIZES[header.dtypes]
    rows = np.abs(header.rows)  # a scalar is as long as one row
    if (rows.astype(np.float64) * row_bytes).max() > file_size:  # otherwise the product might not fit into 64 bits
        return False
    return bool(
        header.begins[0] == data_start
        and header.ends[-1] == file_size
        and (header.begins[1:] == header.ends[:-1]).all()
        and (header.ends - header.begins == rows * row_bytes).all()
    )


def _decode_slowly(raw: bytes, *, path: str, file_size: int) -> Header:
    """Decode entry by entry: accepts any order and spelling, and has a message for each fault."""
    document = decode_object(raw, what=f"{path}: header")
    metadata = document.pop("__metadata__", None)
    data_start = 8 + len(raw)
    entries = _decode_entries(document, _BITS, data_start=data_start, file_size=file_size, path=path)
    header = _build(entries, data_start=data_start, has_metadata=metadata is not None)
    assert header is not None, path
    begins, ends = header.begins - data_start, header.ends - data_start
    _check_tiling(header.keys, begins, ends, data_size=file_size - data_start, path=path)
    return header


def _decode_entries(
    document: dict[str, Any], bits: Mapping[str, int], *, data_start: int, file_size: int, path: str
) -> dict[str, _Entry]:
    """Decode entries one by one. Check their length against dtype (``bits`` per element) and shape, and against the file."""
    entries: dict[str, _Entry] = {}
    for key, value in document.items():
        entry = entries[key] = _decode_entry(value, bits, where=f"{path}: {key!r}")
        begin, end = entry.data_offsets
        known = bits.get(entry.dtype)
        num_bytes = -(-math.prod(entry.shape) * (known or 0) // 8)
        if known is not None and end - begin != num_bytes:
            raise CheckpointError(
                f"{path}: {key!r} is {entry.dtype} {list(entry.shape)}, {num_bytes:,} bytes, but its data_offsets span "
                f"{end - begin:,}"
                "; save or copy it again"
            )
        if data_start + end > file_size:
            raise CheckpointError(
                f"{path}: {key!r} ends at byte {data_start + end:,}, but the file has {file_size:,} bytes; "
                "it is truncated, so save or copy it again"
            )
    return entries


def _decode_entry(entry: object, bits: Mapping[str, int], *, where: str) -> _Entry:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} should be an object with dtype, shape and data_offsets; save or copy it again")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or (dtype not in bits and (bits is _BITS or not _DTYPE_NAME.fullmatch(dtype))):
        known = " ".join(known.name for known in DTYPES) if bits is _BITS else "names such as " + " ".join(bits)
        holds = "a RecIS checkpoint holds" if bits is _BITS else "expected"
        raise CheckpointError(f"{where} has dtype {show(dtype)}; {holds} {known}; save or copy it again")
    shape = _sizes(entry.get("shape"))
    if shape is None:
        raise CheckpointError(
            f"{where} has shape {show(entry.get('shape'))}; expected a list of at most {_MAX_DIMS} sizes from 0 up"
            "; save or copy it again"
        )
    offsets = _sizes(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(
            f"{where} has data_offsets {show(entry.get('data_offsets'))}; expected [begin, end]; save or copy it again"
        )
    return _Entry(dtype, shape, (offsets[0], offsets[1]))


def _sizes(value: object) -> tuple[int, ...] | None:
    # bool is an int in Python
    if (
        not isinstance(value, list)
        or len(value) > _MAX_DIMS
        or not all(type(size) is int and 0 <= size < _MAX_SIZE for size in value)
    ):
        return None
    return tuple(value)


def _check_tiling(keys: tuple[str, ...], begins: np.ndarray, ends: np.ndarray, *, data_size: int, path: str) -> None:
    order = np.lexsort((ends, begins))
    previous_end = np.concatenate(([0], ends[order][:-1])) if len(order) else np.zeros(0, np.int64)
    wrong = np.flatnonzero(begins[order] != previous_end)
    if len(wrong):
        row = int(order[wrong[0]])
        kind = "overlaps the block before it" if begins[row] < previous_end[wrong[0]] else "leaves a hole before it"
        raise CheckpointError(f"{path}: {keys[row]!r} {kind}; save or copy it again")
    end = int(ends.max()) if len(order) else 0
    if end != data_size:
        raise CheckpointError(
            f"{path}: the header describes {end:,} bytes of data, the file has {data_size:,}; "
            + ("it is truncated" if end > data_size else "it has bytes that no entry names")
        )
