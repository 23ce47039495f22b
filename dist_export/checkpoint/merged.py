"""Compare the merged manifest of a RecIS checkpoint with its headers, in both styles. RecIS never reads it; serving does."""

from __future__ import annotations

from collections.abc import Sequence

from dist_export.errors import CheckpointError
from dist_export.layout.dtypes import DTYPES
from dist_export.layout.recis import DENSE_SUFFIX
from dist_export.layout.safetensors import Header, decode_object

_EMBEDDING = ".embedding"
"""Anywhere in a key, this makes RecIS list a block as an embedding."""


def check_merged(raw: bytes, headers: Sequence[Header], *, where: str) -> None:
    """Refuse a manifest that is of another save. Entries without a block are parameters of ``model.pt``.

    Raises:
        CheckpointError: an entry names no block, or gives it another shape or dtype; an embedding has no entry.
    """
    if raw.strip() == b"null":  # some versions write null where a rank had nothing to save
        return
    blocks = {
        key: (header.shapes[row], int(header.dtypes[row])) for header in headers for row, key in enumerate(header.keys)
    }
    entries = decode_object(raw, what=where)
    for key, entry in entries.items():
        if not isinstance(entry, dict):
            raise CheckpointError(f"{where}: the entry {key!r} should be an object")
        # RecIS saves a dense tensor with "/part_" in its name under the bare name
        found = blocks.get(key) or (blocks.get(key.removesuffix(DENSE_SUFFIX)) if entry.get("dense") else None)
        if found is None:
            if not entry.get("dense") or key.endswith(DENSE_SUFFIX):
                raise CheckpointError(f"{where} names {key!r}, which no file of the checkpoint holds")
            continue
        shape, code = found
        if entry.get("shape") != list(shape):
            raise CheckpointError(
                f"{where}: {key!r} has shape {entry.get('shape')}, its file says {list(shape)}; "
                "they are not of the same save"
            )
        named = entry.get("dtype")
        if named and named not in (DTYPES[code].name, DTYPES[code].torch):
            raise CheckpointError(f"{where}: {key!r} is {named!r}, its file says {DTYPES[code].name}")
        if entry.get("is_hashmap") and [entry.get("dimension")] != list(shape[-1:]):
            raise CheckpointError(
                f"{where}: {key!r} has dimension {entry.get('dimension')}, its file says {list(shape)}"
            )
    listed = (key for key in blocks if _EMBEDDING in key and "^" not in key)
    absent = next((key for key in listed if key not in entries and key + DENSE_SUFFIX not in entries), None)
    if absent is not None:
        raise CheckpointError(f"{where} does not name {absent!r}, which a file of the checkpoint holds")
