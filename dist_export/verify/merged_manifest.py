"""Compare the merged manifest with the headers: ours, and RecIS's in any style. Serving reads this file, and RecIS does not."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import msgspec
import numpy as np

from dist_export.errors import CheckpointError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import (
    DENSE_SUFFIX,
    EMBEDDING_SLOT,
    ID_SLOT,
    MERGED,
    MergedEntry,
    dense_entry,
    embedding_entry,
)
from dist_export.formats.strict_json import KeyTwiceError, read_members
from dist_export.formats.tuning import STANDARD
from dist_export.storage.directory import Directory
from dist_export.verify.blocks import Blocks
from dist_export.verify.parts import FoundParts
from dist_export.verify.report import Report

_EMBEDDING = ".embedding"
"""RecIS lists a block as an embedding if its key contains this."""
_DECODER = msgspec.json.Decoder(dict[str, MergedEntry])

DenseState = dict[str, tuple[str, tuple[int, ...]]]
"""Name -> torch dtype name and shape of the parameters in model.pt."""


def check_merged(
    directory: Directory,
    blocks: Blocks,
    parts: FoundParts,
    report: Report,
    *,
    is_ours: bool,
    must_be: bool,
    dense_state: DenseState | None,
    piece_bytes: int = STANDARD.json_bytes,
) -> None:
    """Compare all entries with the blocks, both ways.

    Args:
        is_ours: whether an export wrote the file, so that each entry is known exactly. Else any version of RecIS wrote it.
        must_be: whether the file must exist and name tables. RecIS does not need it.
        dense_state: the content of ``model.pt``; None if it was not read.
        piece_bytes: the size of the pieces in which it is decoded.
    """
    tell = report.add if must_be else report.note
    try:
        raw = directory.read_text(MERGED)
    except FileNotFoundError:
        tell(MERGED, "merged", "is missing; the serving side finds no table without it")
        return
    except OSError as error:
        report.add(MERGED, "merged", f"cannot be read: {error.strerror or error}")
        return
    if raw.strip() == b"null":
        tell(
            MERGED,
            "merged",
            "is null, as RecIS leaves it where a rank had nothing to save; serving finds no table in it",
        )
        return
    comparison = _Comparison(blocks, parts, is_ours, dense_state)
    try:
        read_members(raw, _DECODER, comparison.run, what=f"/{MERGED}", piece_bytes=piece_bytes)
    except CheckpointError as error:
        report.add(MERGED, "merged", str(error).removeprefix(f"/{MERGED}").removeprefix(":").strip())
        return
    for message in comparison.findings:
        report.add(MERGED, "merged", message)
    for message in comparison.notes:
        report.note(MERGED, "merged", message)


class _Comparison:
    def __init__(self, blocks: Blocks, parts: FoundParts, is_ours: bool, dense_state: DenseState | None) -> None:
        self._blocks = blocks
        self._parts = parts
        self._is_ours = is_ours
        self._dense_state = dense_state
        self._is_embedding = blocks.is_slot(EMBEDDING_SLOT)

    def run(self, pieces: Iterable[dict[str, Any]]) -> None:
        """Compare all entries, which come in pieces. It may be called again with all entries in one piece."""
        self.findings: list[str] = []
        self.notes: list[str] = []
        is_listed = np.zeros(len(self._blocks), bool)
        others: set[str] = set()
        num_old = 0
        for piece in pieces:
            rows = self._blocks.find(piece, len(piece))
            known = rows[rows >= 0]
            foreign = [key for key, row in zip(piece, rows.tolist(), strict=True) if row < 0]
            if is_listed[known].any() or not others.isdisjoint(foreign):
                raise KeyTwiceError
            is_listed[known] = True
            others.update(foreign)
            for (key, entry), row in zip(piece.items(), rows.tolist(), strict=True):
                if row < 0:
                    self._check_foreign_file(key, entry)
                elif self._blocks.stem[row] == -2:  # the table of this block is not known, which is already reported
                    continue
                elif entry != self._expected(key, row):
                    num_old += self._check_other(key, entry, row)
        if num_old:
            self.notes.append(
                f"is in the style of RecIS before 2025-11-20: it also lists {num_old} ids and other slots"
            )
        self._check_all_listed(is_listed, others)

    def _expected(self, key: str, row: int) -> MergedEntry | None:
        """Return the entry that a block should have in the new style; None if it should have none."""
        blocks = self._blocks
        if blocks.stem[row] < 0:
            return dense_entry(key, blocks.torch_dtype(row), blocks.shape(row))
        if blocks.rows[row] < 0:  # a scalar, which no table has. Another check reports it
            return None
        if not self._is_ours:
            if _EMBEDDING not in key:
                return None
            return embedding_entry(key, key.replace(_EMBEDDING, ".id", 1), int(blocks.dtype[row]), blocks.shape(row))
        if not self._is_embedding[row]:
            return None
        if blocks.is_row_indexed[row]:
            return embedding_entry(key, None, int(blocks.dtype[row]), blocks.shape(row))
        ids = self._parts.id_row[self._parts.part[row]]
        return embedding_entry(key, blocks.key(ids) if ids >= 0 else "", int(blocks.dtype[row]), blocks.shape(row))

    def _check_other(self, key: str, entry: Any, row: int) -> bool:
        """Report how an entry differs, and return whether it is one that only the old style has."""
        found = _plain(entry)
        if found is None:
            self.findings.append(f"the entry {key!r} should be an object")
            return False
        expected = self._expected(key, row)
        blocks = self._blocks
        if expected is None:
            if self._is_ours:
                self.findings.append(f"{key!r} is listed, but is no embedding")
                return False
            dtype = DTYPES[blocks.dtype[row]]
            wanted: dict[str, Any] = {"dense": False, "dtype": dtype.name, "shape": list(blocks.shape(row))}
        else:
            wanted = _plain(expected) or {}
            if blocks.is_row_indexed[row] and found.get("is_hashmap") is False:
                wanted["hashmap_key"] = None
            elif not wanted.get("hashmap_key"):  # the part has no ids, or those of two parts: already reported
                wanted.pop("hashmap_key", None)
        if not self._is_ours and found.get("dtype") == "":  # RecIS's name for bool
            wanted.pop("dtype")
        for name, value in wanted.items():
            if found.get(name) != value:
                self.findings.append(f"{key!r} has {name} {found.get(name)!r}, the shards say {value!r}")
        return expected is None

    def _check_foreign_file(self, key: str, entry: Any) -> None:
        """Report an entry that names no block and is no parameter of model.pt."""
        found = _plain(entry)
        if found is None:
            self.findings.append(f"the entry {key!r} should be an object")
            return
        if not found.get("dense") or key.endswith(DENSE_SUFFIX):
            if self._blocks.is_whole:
                self.findings.append(f"{key!r} is in no file")
            return
        if self._dense_state is None:
            return
        known = self._dense_state.get(key)
        if known is None:
            self.findings.append(f"{key!r} is neither in a shard nor in model.pt")
        elif (found.get("dtype"), found.get("shape")) != (known[0], list(known[1])):
            self.findings.append(
                f"{key!r} is {found.get('dtype')} {found.get('shape')}, model.pt says {known[0]} {list(known[1])}"
            )

    def _check_all_listed(self, is_listed: np.ndarray, others: set[str]) -> None:
        """Report blocks that serving should find and does not, and blocks that it finds without their ids."""
        blocks = self._blocks
        needed = self._is_embedding | (blocks.stem == -1)
        for row in np.flatnonzero(needed & ~is_listed).tolist():
            key = blocks.key(row)
            if self._is_ours or blocks.stem[row] < 0 or _EMBEDDING in key:
                if key not in others:
                    self.findings.append(f"{key!r} is missing")
            elif "^" not in key:
                self.notes.append(
                    f"RecIS does not list {key!r}, for it takes it for no embedding; serving does not find it"
                )
        if not self._is_ours:
            hidden = [
                row
                for row in np.flatnonzero(
                    np.array([_EMBEDDING in table for table in blocks.tables] + [False])[blocks.table]
                )
                if blocks.stems[blocks.stem[row]][1] == ID_SLOT
            ]
            for row in hidden:
                self.notes.append(
                    f"RecIS lists {blocks.key(int(row))!r} as an embedding, for the table's name holds {_EMBEDDING!r}; "
                    "serving finds no ids of the table"
                )


def _plain(entry: Any) -> dict[str, Any] | None:
    if isinstance(entry, MergedEntry):
        return {**msgspec.to_builtins(entry), "shape": list(entry.shape)}
    return entry if isinstance(entry, dict) else None
