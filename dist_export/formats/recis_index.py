"""The two index files of a RecIS directory: ``index`` and ``tensorkey.json``. Pure: bytes in, checked columns out."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from itertools import repeat
from typing import Any, NamedTuple

import msgspec
import numpy as np

from dist_export.errors import CheckpointError
from dist_export.formats.interning import Numbering
from dist_export.formats.recis import INDEX, TENSORKEY, Slice, is_payload_name, parse_slice
from dist_export.formats.strict_json import KeyTwiceError, decode_canonical, decode_object, read_members, show
from dist_export.formats.tuning import STANDARD


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Indexes:
    """The index data that RecIS's loader uses. Each name of ``index`` has a number from 0 up, which indexes the columns."""

    keys: tuple[str, ...]
    """The names in ``index``: sparse blocks, and dense tensors, which end with ``^ ``."""
    place_of_key: dict[str, int]
    file: np.ndarray
    """int32: index into ``files`` of the file that has the block."""
    files: tuple[str, ...]
    stem: np.ndarray
    """int32: index into ``stems`` of the internal name before the caret; -1 if tensorkey.json has no entry."""
    slice: np.ndarray
    """int32: index into ``slices`` of the text behind the caret; -1 if tensorkey.json has no entry."""
    stems: tuple[str, ...]
    """``<table>@<slot>``"""
    slices: tuple[str, ...]
    """``BEGIN@END@SIZE``, in the spelling of the file."""
    strays: dict[str, str]
    """Entries of tensorkey.json that ``index`` does not have: key -> internal name."""

    def internal_of(self, place: int) -> str | None:
        """Return the internal name ``<table>@<slot>^<slice>`` from tensorkey.json; None if it has no entry."""
        if self.stem[place] < 0:
            return None
        return f"{self.stems[self.stem[place]]}^{self.slices[self.slice[place]]}"


class BlockName(NamedTuple):
    """The internal name of a sparse block, split into its parts."""

    table: str
    slot: str
    slice: Slice


class _Index(msgspec.Struct, forbid_unknown_fields=True, gc=False):
    block_index: dict[str, int]
    file_index: dict[str, int]


_INDEX_DECODER = msgspec.json.Decoder(_Index)
_TENSORKEY_DECODER = msgspec.json.Decoder(dict[str, str])


def decode_indexes(
    raw_index: bytes, raw_tensorkey: bytes, *, where: str, piece_bytes: int = STANDARD.json_bytes
) -> Indexes:
    """Decode both files of the directory ``where``.

    Raises:
        CheckpointError: not JSON, or not the form that RecIS's reader takes; file numbers with gaps, which make that
            reader crash; a file name that leads out of the directory.
    """
    blocks, numbers = _decode_index(raw_index, where)
    files = sorted(numbers, key=numbers.__getitem__)
    if [numbers[name] for name in files] != list(range(len(files))):
        raise CheckpointError(
            f"{where}/{INDEX}: the numbers in file_index are {sorted(numbers.values())[:8]}, not 0 to {len(files) - 1}; "
            "RecIS's reader crashes on that"
            "; save or copy it again"
        )
    bad = next((name for name in files if not is_payload_name(name)), None)
    if bad is not None:
        raise CheckpointError(
            f"{where}/{INDEX}: {bad!r} is no name of a data file in this directory; save or copy it again"
        )
    if blocks and not (min(blocks.values()) >= 0 and max(blocks.values()) < len(files)):
        stray = next(key for key, number in blocks.items() if not 0 <= number < len(files))
        raise CheckpointError(
            f"{where}/{INDEX}: {stray!r} is in file {blocks[stray]}, but there are {len(files)} files"
            "; save or copy it again"
        )
    file = np.fromiter(blocks.values(), np.int32, len(blocks))
    keys = tuple(blocks)
    blocks.update(
        zip(keys, range(len(keys)), strict=True)
    )  # in place: a second dict of all keys would double the memory
    return read_members(
        raw_tensorkey,
        _TENSORKEY_DECODER,
        lambda pieces: _match_tensorkey(keys, blocks, file, tuple(files), pieces, where),
        what=f"{where}/{TENSORKEY}",
        piece_bytes=piece_bytes,
    )


def split_internal(internal: str) -> BlockName | None:
    """Split ``<table>@<slot>^<slice>``; None if it is no such name. A table's own name may contain an ``@``."""
    stem, _, text = internal.rpartition("^")
    name, part = split_stem(stem), parse_slice(text)
    return BlockName(*name, part) if name is not None and part is not None else None


def split_stem(stem: str) -> tuple[str, str] | None:
    """Split ``<table>@<slot>``; None if one of the two is missing."""
    table, _, slot = stem.rpartition("@")
    return (table, slot) if table and slot else None


def _decode_index(raw: bytes, where: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return ``block_index`` and ``file_index``."""
    found = decode_canonical(raw, _INDEX_DECODER)
    if found is not None:
        return found.block_index, found.file_index
    document = decode_object(raw, what=f"{where}/{INDEX}")
    return _row_indexed(document, "block_index", where), _row_indexed(document, "file_index", where)


def _row_indexed(document: dict[str, Any], name: str, where: str) -> dict[str, int]:
    value = document.get(name)
    if not isinstance(value, dict) or not all(type(number) is int for number in value.values()):
        raise CheckpointError(f"{where}/{INDEX}: {name} should be a map from a name to a number; save or copy it again")
    return value


def _match_tensorkey(
    keys: tuple[str, ...],
    place_of_key: dict[str, int],
    file: np.ndarray,
    files: tuple[str, ...],
    pieces: Iterable[dict[str, Any]],
    where: str,
) -> Indexes:
    """Find the number of every entry of tensorkey.json, which comes in ``pieces``."""
    columns = np.full((2, len(keys)), -1, np.int32)
    stems: Numbering[str] = Numbering()
    slices: Numbering[str] = Numbering()
    strays: dict[str, str] = {}
    positions = _Columns(keys, place_of_key)
    for piece in pieces:
        known = len(stems), len(slices)
        if not set(map(type, piece.values())) <= {str}:
            _refuse_odd_name(piece, where)
        split = [text.rpartition("^") for text in piece.values()]
        stem = np.fromiter([stems[before] for before, _, _ in split], np.int32, len(split))
        part = np.fromiter([slices[behind] for _, _, behind in split], np.int32, len(split))
        if not all(map(split_stem, list(stems)[known[0] :])) or not all(map(parse_slice, list(slices)[known[1] :])):
            _refuse_odd_name(piece, where)
        place = positions.of(piece)
        is_known = place >= 0
        if (columns[0, place[is_known]] >= 0).any():
            raise KeyTwiceError
        columns[:, place[is_known]] = stem[is_known], part[is_known]
        if not is_known.all():
            for key in [key for key in piece if key not in place_of_key]:
                if key in strays:
                    raise KeyTwiceError
                strays[key] = piece[key]
    return Indexes(
        keys=keys,
        place_of_key=place_of_key,
        file=file,
        files=files,
        stem=columns[0],
        slice=columns[1],
        stems=tuple(stems),
        slices=tuple(slices),
        strays=strays,
    )


def _refuse_odd_name(piece: dict[str, Any], where: str) -> None:
    for key, name in piece.items():
        if not isinstance(name, str) or split_internal(name) is None:
            raise CheckpointError(
                f"{where}/{TENSORKEY}: {key!r} maps to {show(name)}; expected <table>@<slot>^BEGIN@END@SIZE"
                "; save or copy it again"
            )


class _Columns:
    """Finds keys in ``index``. Both files are sorted, so the next piece usually begins where the last one ended."""

    def __init__(self, keys: tuple[str, ...], place_of_key: dict[str, int]) -> None:
        self._keys = keys
        self._place_of_key = place_of_key
        self._next = 0

    def of(self, piece: dict[str, Any]) -> np.ndarray:
        """Return the number of each key (int32); -1 for a key that ``index`` does not have."""
        first, last = self._next, self._next + len(piece)
        if self._keys[first:last] == tuple(piece):
            found = np.arange(first, last, dtype=np.int32)
        else:
            found = np.fromiter(map(self._place_of_key.get, piece, repeat(-1)), np.int32, len(piece))
        self._next = int(found[-1]) + 1 if len(found) else self._next
        return found
