"""The file of deleted ids in a delta package: ids of the base that have no row any more. Pure: arrays in, arrays out.

The file begins with ``MAGIC``. For each part of the base in one shard, it holds the ids (little-endian int64) in ascending
order. They begin at a multiple of ``ALIGNMENT`` bytes.
"""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

SUFFIX = ".deleted_ids"
"""Ends the name of the file with the deleted ids of one shard of the base."""
MAGIC = b"deleted\x00\x01\x00\x00\x00\x00\x00\x00\x00"
"""Begins the file: a name, then the version as little-endian uint64."""
ALIGNMENT = 64
ID = np.dtype("<i8")


def deleted_name(base_shard: str) -> str:
    """Return the name of the file for a shard of the base."""
    return base_shard.removesuffix(".safetensors") + SUFFIX


def encode_deleted(parts: Sequence[np.ndarray]) -> tuple[bytes, list[int]]:
    """Return the content of a file, and the offset of each part's ids.

    ``parts``: int64, (n,), each in ascending order, without duplicates.
    """
    content, offsets = bytearray(MAGIC), []
    for ids in parts:
        content += bytes(-len(content) % ALIGNMENT)
        offsets.append(len(content))
        content += np.ascontiguousarray(ids, ID).tobytes()
    return bytes(content), offsets


def find_fault(content: bytes, offset: int, num_ids: int) -> str | None:
    """Return why this part of a file cannot be; None if it can."""
    if content[: len(MAGIC)] != MAGIC:
        return f"it begins with {content[:8]!r}, which no file of deleted ids does"
    if offset % ALIGNMENT or offset < len(MAGIC) or offset + num_ids * ID.itemsize > len(content):
        return f"{num_ids:,} ids from byte {offset:,} on do not lie in its {len(content):,} bytes"
    ids = np.frombuffer(content, ID, num_ids, offset)
    if (ids[1:] <= ids[:-1]).any():
        return "its ids are not in ascending order"
    return None
