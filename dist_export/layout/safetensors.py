"""Safetensors headers, in and out, as RecIS writes and reads them. Pure: bytes and columns, no files.

A file is 8 bytes (little-endian u64, the header's length N), N bytes of JSON, then the data. Each entry has ``dtype``,
``shape`` and ``data_offsets`` relative to the end of the header. Source: the safetensors format specification, and
for padding and order the files that RecIS's C++ writer leaves.
"""

from __future__ import annotations

import json
import math
import struct
from dataclasses import dataclass
from typing import Any

import numpy as np

from dist_export.errors import CheckpointError
from dist_export.layout.dtypes import CODE_BY_NAME, DTYPES

MAX_HEADER_BYTES = 1 << 30
"""A header longer than this is taken for an attack. A block costs about 120 bytes: this is nine million blocks."""


@dataclass(frozen=True, slots=True)
class Header:
    """The entries of one file as parallel columns, in header order.

    ``begins`` and ``ends`` (int64) are absolute positions in the file, in bytes. ``dtypes`` (int8) index ``DTYPES``.
    """

    keys: tuple[str, ...]
    dtypes: np.ndarray
    shapes: tuple[tuple[int, ...], ...]
    begins: np.ndarray
    ends: np.ndarray
    has_metadata: bool
    has_lower_bool: bool


def header_length(prefix: bytes, *, path: str, file_size: int) -> int:
    """Return N from the first 8 bytes of a file of ``file_size`` bytes; CheckpointError where it cannot be true."""
    if len(prefix) < 8:
        raise CheckpointError(
            f"{path}: {file_size} bytes, too short for a safetensors file; it is truncated, so save or copy it again"
        )
    (length,) = struct.unpack("<Q", prefix)
    if length > min(file_size - 8, MAX_HEADER_BYTES):
        raise CheckpointError(
            f"{path}: says that its header has {length:,} bytes, but the file has {file_size:,}; "
            "it is truncated or no safetensors file"
        )
    return int(length)


def decode_header(raw: bytes, *, path: str, file_size: int) -> Header:
    """Decode and check the JSON header ``raw`` of a file of ``file_size`` bytes.

    Raises:
        CheckpointError: not JSON, a key twice, an unknown dtype, a length that does not follow from dtype and shape,
            blocks that overlap or leave a hole, or data that do not end where the file ends.
    """
    entries = decode_object(raw, what=f"{path}: header")
    metadata = entries.pop("__metadata__", None)
    keys: list[str] = []
    dtypes = np.empty(len(entries), np.int8)
    shapes: list[tuple[int, ...]] = []
    begins = np.empty(len(entries), np.int64)
    ends = np.empty(len(entries), np.int64)
    has_lower_bool = False
    data_start = 8 + len(raw)
    data_size = file_size - data_start
    for row, (key, entry) in enumerate(entries.items()):
        dtype, shape, begin, end = _decode_entry(entry, where=f"{path}: {key!r}")
        has_lower_bool |= dtype == "bool"
        code = CODE_BY_NAME[dtype]
        num_bytes = math.prod(shape) * DTYPES[code].itemsize
        if end - begin != num_bytes:
            raise CheckpointError(
                f"{path}: {key!r} is {dtype} {list(shape)}, {num_bytes:,} bytes, but its data_offsets span {end - begin:,}"
            )
        if end > data_size:
            raise CheckpointError(
                f"{path}: {key!r} ends at byte {data_start + end:,}, but the file has {file_size:,} bytes; "
                "it is truncated, so save or copy it again"
            )
        keys.append(key)
        shapes.append(shape)
        dtypes[row], begins[row], ends[row] = code, begin, end
    _check_tiling(keys, begins, ends, data_size=data_size, path=path)
    return Header(
        tuple(keys), dtypes, tuple(shapes), begins + data_start, ends + data_start, metadata is not None, has_lower_bool
    )


def encode_header(entries: list[tuple[str, int, tuple[int, ...], int]]) -> bytes:
    """Return the length prefix and header of a file whose blocks lie one behind the other.

    Args:
        entries: (key, dtype code, shape, num_bytes) in file order.

    The JSON is compact and padded with 1 to 8 spaces to a multiple of 8, as RecIS's writer does.
    """
    header: dict[str, dict[str, object]] = {}
    position = 0
    for key, code, shape, num_bytes in entries:
        header[key] = {
            "dtype": DTYPES[code].name,
            "shape": list(shape),
            "data_offsets": [position, position + num_bytes],
        }
        position += num_bytes
    text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
    text += b" " * (8 - len(text) % 8)
    return struct.pack("<Q", len(text)) + text


def decode_object(raw: bytes | str, *, what: str) -> dict[str, Any]:
    """Decode a JSON object strictly: UTF-8, no duplicate keys, no NaN or Infinity, no absurd nesting, no half surrogates.

    Raises:
        CheckpointError: beginning with ``what``.
    """

    def no_duplicates(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        found = dict(pairs)
        if len(found) != len(pairs):
            seen: set[str] = set()
            twice = next(key for key, _ in pairs if key in seen or seen.add(key))  # type: ignore[func-returns-value]
            raise ValueError(f"the key {twice!r} stands there twice")
        return found

    def no_constant(name: str) -> None:
        raise ValueError(f"{name} is no JSON")

    try:
        text = raw.decode("utf-8") if isinstance(raw, bytes) else raw
        value = json.loads(text, object_pairs_hook=no_duplicates, parse_constant=no_constant)
        if "\\u" in text:  # half a surrogate pair is valid JSON and no text: it could not be written again
            json.dumps(value, ensure_ascii=False).encode()
    except RecursionError:
        raise CheckpointError(f"{what} is nested too deeply to be genuine") from None
    except ValueError as error:  # JSONDecodeError and UnicodeDecodeError are ValueErrors
        raise CheckpointError(f"{what} is not the JSON it should be: {error}") from None
    if not isinstance(value, dict):
        raise CheckpointError(f"{what} should be a JSON object, found {type(value).__name__}")
    return value


def _decode_entry(entry: object, *, where: str) -> tuple[str, tuple[int, ...], int, int]:
    if not isinstance(entry, dict):
        raise CheckpointError(f"{where} should be an object with dtype, shape and data_offsets")
    dtype = entry.get("dtype")
    if not isinstance(dtype, str) or dtype not in CODE_BY_NAME:
        known = " ".join(known.name for known in DTYPES)
        raise CheckpointError(f"{where} has dtype {dtype!r}; a RecIS checkpoint holds {known}")
    shape = _sizes(entry.get("shape"))
    if shape is None:
        raise CheckpointError(f"{where} has shape {entry.get('shape')!r}; expected a list of sizes from 0 up")
    offsets = _sizes(entry.get("data_offsets"))
    if offsets is None or len(offsets) != 2 or offsets[0] > offsets[1]:
        raise CheckpointError(f"{where} has data_offsets {entry.get('data_offsets')!r}; expected [begin, end]")
    return dtype, shape, offsets[0], offsets[1]


def _sizes(value: object) -> tuple[int, ...] | None:
    # bool is an int in Python, and no size is beyond what a file can have
    if not isinstance(value, list) or not all(type(size) is int and 0 <= size < 1 << 62 for size in value):
        return None
    return tuple(value)


def _check_tiling(keys: list[str], begins: np.ndarray, ends: np.ndarray, *, data_size: int, path: str) -> None:
    order = np.lexsort((ends, begins))
    previous_end = np.concatenate(([0], ends[order][:-1])) if len(keys) else np.zeros(0, np.int64)
    wrong = np.flatnonzero(begins[order] != previous_end)
    if len(wrong):
        row = int(order[wrong[0]])
        kind = "overlaps the block before it" if begins[row] < previous_end[wrong[0]] else "leaves a hole before it"
        raise CheckpointError(f"{path}: {keys[row]!r} {kind}")
    end = int(ends.max()) if len(keys) else 0
    if end != data_size:
        raise CheckpointError(
            f"{path}: the header describes {end:,} bytes of data, the file has {data_size:,}; "
            + ("it is truncated" if end > data_size else "it has bytes that no entry names")
        )
