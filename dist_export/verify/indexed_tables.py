"""Find and check the blocks of row-indexed tables for ``verify``. No index names these blocks; only the manifest does."""

from __future__ import annotations

import functools
from dataclasses import dataclass, field, replace

import numpy as np

from dist_export.formats.interning import Numbering
from dist_export.formats.recis import INDEX, TENSORKEY, Slice, parse_slice, row_key_stem
from dist_export.formats.recis_index import Indexes
from dist_export.manifest import MANIFEST, Manifest, TableEntry
from dist_export.verify.listing import SHARD
from dist_export.verify.report import Report

_NO_SLICE = "0@0@1"
"""Replaces a text that is no slice. The check of the manifest's tables reports that text."""


@dataclass(frozen=True, eq=False)
class RowIndexedBlocks:
    """The blocks of row-indexed tables. It is false if there are none."""

    names: dict[str, tuple[str, str, str]] = field(default_factory=dict)
    """Key -> table, slot and slice."""
    file_of: dict[str, str] = field(default_factory=dict)
    shards: tuple[str, ...] = ()
    """The files of the package that may hold them."""
    needs_index: bool = True
    """Whether the package needs ``index``: it has a hash table, or a dense tensor among the shards."""
    manifest: Manifest | None = None

    def __bool__(self) -> bool:
        return bool(self.names)

    def is_hashed(self, key: str) -> bool:
        """Return whether the manifest says that a block is of a hash table."""
        return key in self._hashed

    @functools.cached_property
    def _hashed(self) -> frozenset[str]:
        """The blocks of hash tables. Computed only if a block is in doubt, which is rare."""
        tables = self.manifest.tables if self.manifest is not None else ()
        return frozenset(
            key for table in tables if not table.is_row_indexed for part in table.parts for key in part.keys.values()
        )

    def add_to(self, indexes: Indexes, report: Report, *, is_read: bool) -> tuple[Indexes, np.ndarray]:
        """Return the indexes with these blocks added, and which places (bool) are those of these blocks.

        Args:
            indexes: the indexes of the directory, or their replacement.
            report: gets a finding for each of these blocks that an index names.
            is_read: whether ``index`` was read from the directory.
        """
        files = dict.fromkeys(indexes.files)
        files.update(dict.fromkeys(self.shards))
        number_of_file = {name: number for number, name in enumerate(files)}
        stems: Numbering[str] = Numbering(zip(indexes.stems, range(len(indexes.stems)), strict=True))
        slices: Numbering[str] = Numbering(zip(indexes.slices, range(len(indexes.slices)), strict=True))
        place_of_key, strays = indexes.place_of_key, dict(indexes.strays)
        known = [key for key in self.names if key in place_of_key]
        added = [key for key in self.names if key not in place_of_key]
        if is_read:
            for key in known:
                report.add(INDEX, INDEX, f"names {key!r}, {_WHY_NOT}")
        for key in added:
            if strays.pop(key, None) is not None:
                report.add(TENSORKEY, TENSORKEY, f"names {key!r}, {_WHY_NOT}")
        place_of_key.update({key: len(indexes.keys) + number for number, key in enumerate(added)})
        columns = np.full((3, len(indexes.keys) + len(added)), -1, np.int32)
        columns[:, : len(indexes.keys)] = indexes.file, indexes.stem, indexes.slice
        its = np.array([place_of_key[key] for key in (*known, *added)], np.int64)
        for place, key in zip(its.tolist(), (*known, *added), strict=True):
            table, slot, text = self.names[key]
            columns[1, place] = stems[f"{table}@{slot}"]
            columns[2, place] = slices[text if parse_slice(text) is not None else _NO_SLICE]
            if place >= len(indexes.keys):
                columns[0, place] = number_of_file.get(self.file_of[key], -1)
        is_theirs = np.zeros(columns.shape[1], bool)
        is_theirs[its] = True
        return (
            replace(
                indexes,
                keys=(*indexes.keys, *added),
                file=columns[0],
                files=tuple(files),
                stem=columns[1],
                slice=columns[2],
                stems=tuple(stems),
                slices=tuple(slices),
                strays=strays,
            ),
            is_theirs,
        )


_WHY_NOT = "whose rows go by number; RecIS's loader knows no table without ids"


def list_row_indexed(manifest: Manifest) -> RowIndexedBlocks:
    """Return the blocks of row-indexed tables in a manifest."""
    names: dict[str, tuple[str, str, str]] = {}
    file_of: dict[str, str] = {}
    for table in manifest.tables:
        if table.is_row_indexed:
            for part in table.parts:
                for slot, key in part.keys.items():
                    names.setdefault(key, (table.name, slot, part.slice))
                    file_of.setdefault(key, part.file)
    are_all = bool(manifest.tables) and all(table.is_row_indexed for table in manifest.tables)
    return RowIndexedBlocks(
        names=names,
        file_of=file_of,
        shards=tuple(entry.path for entry in manifest.files if SHARD.fullmatch(entry.path)),
        needs_index=not are_all or bool(manifest.dense_tensors),
        manifest=manifest,
    )


def check_ranges(table: TableEntry, report: Report) -> None:
    """Check that the parts of a table hold its rows in order, and have the right names. Adds at most one finding."""
    total, reached = sum(part.rows for part in table.parts), 0
    for number, part in enumerate(table.parts):
        end = reached + part.rows
        what = f"part {number} of table {table.name!r}, whose rows go by number,"
        if total and part.first_row != reached:
            said = part.first_row if isinstance(part.first_row, int) else "nowhere"
            message = f"{what} begins at row {said}; the parts before it have {reached:,} rows"
        elif total and parse_slice(part.slice) != Slice(reached, end, total):
            message = f"{what} has the slice {part.slice!r}; its rows are {reached} to {end} of {total}"
        else:
            wanted = {slot: f"{row_key_stem(table.name, slot)}/part_{number}_{len(table.parts)}" for slot in part.keys}
            wrong = next((slot for slot, key in part.keys.items() if key != wanted[slot]), None)
            if wrong is None:
                reached = end
                continue
            message = f"{what} has its {wrong} in {part.keys[wrong]!r}, which should be {wanted[wrong]!r}"
        report.add(MANIFEST, "parts", message)
        return
