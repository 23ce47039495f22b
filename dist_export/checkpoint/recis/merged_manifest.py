"""Compare the merged manifest of a RecIS checkpoint with its headers, in both styles. RecIS never reads it; serving does."""

from __future__ import annotations

from collections.abc import Iterable
from itertools import repeat
from typing import Any

import msgspec
import numpy as np

from dist_export.checkpoint.recis.header_columns import HeaderColumns
from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.recis import DENSE_SUFFIX, MergedEntry
from dist_export.formats.strict_json import KeyTwiceError, read_members, show
from dist_export.formats.tuning import STANDARD

_EMBEDDING = ".embedding"
"""Anywhere in a key, this makes RecIS list a block as an embedding."""

_DECODER = msgspec.json.Decoder(dict[str, MergedEntry])
_ANY_DTYPE = -2
_CODES = {"": _ANY_DTYPE, **{dtype.name: code for code, dtype in enumerate(DTYPES)}, **CODE_BY_TORCH}


def check_merged(
    raw: bytes,
    headers: HeaderColumns,
    keys: tuple[str, ...],
    place_of_key: dict[str, int],
    *,
    where: str,
    piece_bytes: int = STANDARD.json_bytes,
) -> None:
    """Refuse a manifest that is of another save. Entries without a block are parameters of ``model.pt``.

    Args:
        keys: the names that ``headers.place`` counts in.
        place_of_key: the other way round.
        piece_bytes: the size of the pieces in which it is decoded.

    Raises:
        CheckpointError: an entry names no block, or gives it another shape or dtype; an embedding has no entry.
    """
    if raw.strip() == b"null":  # some versions write null where a rank had nothing to save
        return
    comparison = _Comparison(headers, keys, place_of_key, where)
    read_members(raw, _DECODER, comparison.run, what=where, piece_bytes=piece_bytes)


class _Comparison:
    """The blocks, and how to find one by the key that the manifest gives it."""

    def __init__(self, headers: HeaderColumns, keys: tuple[str, ...], place_of_key: dict[str, int], where: str) -> None:
        self._headers = headers
        self._keys = keys
        self._place_of_key = place_of_key
        self._where = where
        self._row_of_place = np.full(len(keys) + 1, -1, np.int64)  # the last one is for keys that are no block's
        self._row_of_place[headers.place] = np.arange(len(headers))
        self._inner = {shape: number for number, shape in enumerate(headers.inner_shapes)}

    def run(self, pieces: Iterable[dict[str, Any]]) -> None:
        """Compare all entries, which come in pieces."""
        is_listed = np.zeros(len(self._keys), bool)
        others: set[str] = set()
        for piece in pieces:
            place = np.fromiter(map(self._place_of_key.get, piece, repeat(-1)), np.int64, len(piece))
            known = place[place >= 0]
            foreign = [key for key in piece if key not in self._place_of_key] if len(known) < len(piece) else []
            if is_listed[known].any() or not others.isdisjoint(foreign):
                raise KeyTwiceError
            is_listed[known] = True
            others.update(foreign)
            doubtful = self._doubtful(piece, place)
            if doubtful:
                entries = list(piece.items())
                for number in doubtful:
                    self._check_entry(*entries[number])
        self._check_all_listed(is_listed, others)

    def _doubtful(self, piece: dict[str, Any], place: np.ndarray) -> list[int]:
        """Return which entries are not plainly those of a block: to be looked at one by one."""
        entries = list(piece.values())
        headers = self._headers
        everything = list(range(len(entries)))
        if not len(headers) or not set(map(type, entries)) <= {MergedEntry}:
            return everything
        row = self._row_of_place[place]
        try:
            rows = np.array([entry.shape[0] if entry.shape else -1 for entry in entries], np.int64)
        except OverflowError:
            return everything
        inner = np.array([self._inner.get(entry.shape[1:], -1) for entry in entries], np.int32)
        code = np.array([_CODES.get(entry.dtype, -1) for entry in entries], np.int8)
        has_other_dimension = np.array(
            [entry.is_hashmap is True and entry.shape[-1:] != (entry.dimension,) for entry in entries], bool
        )
        is_sound = (
            (row >= 0)
            & ~headers.is_row_indexed[row]
            & (rows == headers.rows[row])
            & (inner == headers.inner[row])
            & ((code == headers.dtype[row]) | (code == _ANY_DTYPE))
            & ~has_other_dimension
        )
        return [int(number) for number in np.flatnonzero(~is_sound)]

    def _check_entry(self, key: str, stated: Any) -> None:
        where = self._where
        entry = _plain(stated) if isinstance(stated, MergedEntry) else stated
        if not isinstance(entry, dict):
            raise CheckpointError(
                f"{where}: the entry {key!r} should be an object. Copy the checkpoint again, or take an earlier one"
            )
        # RecIS saves a dense tensor with "/part_" in its name under the bare name
        row = self._find(key)
        if row is None and entry.get("dense"):
            row = self._find(key.removesuffix(DENSE_SUFFIX))
        if row is None:
            if not entry.get("dense") or key.endswith(DENSE_SUFFIX):
                raise CheckpointError(
                    f"{where} names {key!r}, which no file of the checkpoint holds"
                    ". Copy the checkpoint again, or take an earlier one"
                )
            return
        shape, code = self._headers.shape(row), int(self._headers.dtype[row])
        if entry.get("shape") != list(shape):
            raise CheckpointError(
                f"{where}: {key!r} has shape {show(entry.get('shape'))}, its file says {list(shape)}; "
                "they are not of the same save"
            )
        named = entry.get("dtype")
        if named and named not in (DTYPES[code].name, DTYPES[code].torch):
            raise CheckpointError(
                f"{where}: {key!r} is {show(named)}, its file says {DTYPES[code].name}"
                ". Copy the checkpoint again, or take an earlier one"
            )
        if entry.get("is_hashmap") and [entry.get("dimension")] != list(shape[-1:]):
            raise CheckpointError(
                f"{where}: {key!r} has dimension {show(entry.get('dimension'))}, its file says {list(shape)}"
                ". Copy the checkpoint again, or take an earlier one"
            )

    def _find(self, key: str) -> int | None:
        """Return the row of the block with this name in its file."""
        for name, is_row_indexed in ((key, False), (key + DENSE_SUFFIX, True)):
            row = self._row_of_place[self._place_of_key.get(name, -1)]
            if row >= 0 and self._headers.is_row_indexed[row] == is_row_indexed:
                return int(row)
        return None

    def _check_all_listed(self, is_listed: np.ndarray, others: set[str]) -> None:
        def is_named(key: str) -> bool:
            place = self._place_of_key.get(key)
            return key in others if place is None else bool(is_listed[place])

        place, is_row_indexed = self._headers.place, self._headers.is_row_indexed
        for row in np.flatnonzero(~is_listed[place]).tolist():
            key = self._keys[place[row]]
            # RecIS lists every block of a table whose name holds ".embedding", as torchrec's do; we list its embeddings alone
            if not key.rpartition("/part_")[0].endswith(_EMBEDDING):
                continue
            key = key.removesuffix(DENSE_SUFFIX) if is_row_indexed[row] else key
            if "^" not in key and not is_named(key) and not is_named(key + DENSE_SUFFIX):
                raise CheckpointError(
                    f"{self._where} does not name {key!r}, which a file of the checkpoint holds"
                    ". Copy the checkpoint again, or take an earlier one"
                )


def _plain(entry: MergedEntry) -> dict[str, Any]:
    return {**msgspec.to_builtins(entry), "shape": list(entry.shape)}
