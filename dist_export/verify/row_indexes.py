"""Check the row indexes: a search finds each id at its row, and the slots hold nothing else."""

from __future__ import annotations

import contextlib
from typing import NamedTuple

import msgspec
import numpy as np

from dist_export.errors import DistExportError
from dist_export.formats.recis import ID_SLOT
from dist_export.formats.row_index import EMPTY, MAGIC, SLOT, count_rows_at, find_fault
from dist_export.humanize import count
from dist_export.manifest import MANIFEST, Manifest, RowIndexEntry
from dist_export.package.columns import StoredColumn, map_column
from dist_export.package.held_file import HeldFile
from dist_export.package.shard_headers import fact_of
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import RangeReader
from dist_export.verify.blocks import Blocks
from dist_export.verify.report import Report
from dist_export.verify.work_split import IndexedPart, Work, cut

_PIECE_ROWS = 1 << 22
_OF_IDS = ("ids", "slice", "unique", "id_sum")
"""The checks of ids."""
_RUN_ROWS = 1 << 16
"""Ids that are searched at once. Their arrays stay in a core's cache."""


class IndexCount(NamedTuple):
    """What was found in a piece of a part."""

    part: int
    """The place in ``Work.indexes``."""
    found: int
    """Ids that a search finds at their row."""
    filled: int
    """Slots with a row, counted with the first piece of the part."""
    error: str = ""


def find_indexed_parts(manifest: Manifest, blocks: Blocks, report: Report) -> tuple[IndexedPart, ...]:
    """Return the parts whose row index can be checked, and report the entries of the manifest that cannot be. Rank 0."""
    sizes = {file.path: file.num_bytes for file in manifest.files}
    found = []
    for table in manifest.tables:
        parts = [part for part in table.parts if part.row_index is not msgspec.UNSET]
        rows = blocks.find((part.keys.get(ID_SLOT, "") for part in parts), len(parts)).tolist()
        for part, row in zip(parts, rows, strict=True):
            entry = part.row_index
            assert isinstance(entry, RowIndexEntry)
            key = part.keys.get(ID_SLOT, "")
            if entry.file not in sizes:
                report.add(
                    MANIFEST, "row_index", f"the row index of {key!r} is in {entry.file}, which it does not list"
                )
            elif fault := find_fault(
                offset=entry.offset,
                num_slots=entry.num_slots,
                seed=entry.seed,
                longest_probe=entry.longest_probe,
                num_rows=part.rows,
                file_size=sizes[entry.file],
            ):
                report.add(MANIFEST, "row_index", f"the row index of {key!r} cannot be: {fault}")
            elif row >= 0 and int(blocks.rows[row]) == part.rows:  # else that is reported already
                found.append(IndexedPart(entry, key, blocks.file_of(row), int(blocks.begin[row]), part.rows))
    return tuple(found)


def cut_indexes(work: Work) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return part, first row and rows (int64) of each piece of the parts with a row index."""
    return cut(np.array([part.num_rows for part in work.indexes], np.int64), _PIECE_ROWS)


def count_indexes(directory: Directory, work: Work, chosen: slice) -> list[IndexCount]:
    """Search a run of the pieces of :func:`cut_indexes`. Any rank, any thread."""
    counts = []
    for number, first, rows in zip(*(its[chosen].tolist() for its in cut_indexes(work)), strict=True):
        part = work.indexes[number]
        try:
            with (
                contextlib.closing(directory.open_reader(part.file)) as ids,
                contextlib.closing(HeldFile(directory.open_reader(part.entry.file))) as index,
            ):
                found = _count_found(ids, index, part, first, rows)
                counts.append(IndexCount(number, found, 0 if first else _count_filled(index.reader, part)))
        except (DistExportError, OSError) as error:
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else fact_of(error)
            counts.append(IndexCount(number, 0, 0, reason))
    return counts


def _count_found(ids: RangeReader, index: HeldFile, part: IndexedPart, first: int, rows: int) -> int:
    """Return how many of the ids from row ``first`` on a search finds at their row."""
    entry = part.entry
    magic = index.reader.fetch(0, len(MAGIC))
    if magic != MAGIC:
        return 0
    mapping = index.map() if index.reader.fd >= 0 else None
    slots = (
        StoredColumn(index.reader, entry.offset, entry.num_slots, SLOT)
        if mapping is None or len(mapping) < entry.offset + entry.num_slots * SLOT.itemsize
        else map_column(mapping, entry.offset, entry.num_slots, SLOT)
    )
    buffer, found = np.empty(min(rows, _RUN_ROWS), np.int64), 0
    with ids.ahead(part.offset + first * 8, rows * 8) as stream:
        for start in range(0, rows, _RUN_ROWS):
            run = buffer[: min(_RUN_ROWS, rows - start)]
            stream.read_into(run.data.cast("B"))
            found += count_rows_at(
                slots,
                run,
                first + start,
                num_slots=entry.num_slots,
                num_rows=part.num_rows,
                seed=entry.seed,
                longest_probe=entry.longest_probe,
            )
    return found


def _count_filled(index: RangeReader, part: IndexedPart) -> int:
    buffer, filled = np.empty(min(part.entry.num_slots, 1 << 18), SLOT), 0
    with index.ahead(part.entry.offset, part.entry.num_slots * SLOT.itemsize) as stream:
        for start in range(0, part.entry.num_slots, len(buffer)):
            run = buffer[: min(len(buffer), part.entry.num_slots - start)]
            stream.read_into(run.data.cast("B"))
            filled += int(np.count_nonzero(run != EMPTY))
    return filled


def report_indexes(work: Work, counts: list[IndexCount], report: Report) -> None:
    """Report the parts whose row index does not give each id its row. Rank 0.

    If the ids themselves are wrong, that is reported, and what follows from it is not.
    """
    if any(finding.check in _OF_IDS for finding in report.found):
        return
    found, filled = np.zeros(len(work.indexes), np.int64), np.zeros(len(work.indexes), np.int64)
    unread: dict[int, str] = {}
    for number, its_found, its_filled, error in counts:
        found[number] += its_found
        filled[number] += its_filled
        if error:
            unread.setdefault(number, error)
    before = report.count()
    for number, part in enumerate(work.indexes):
        where, rows = part.entry.file, part.num_rows
        if number in unread:
            report.add(where, "row_index", f"the row index of {part.key!r} cannot be checked: {unread[number]}")
        elif found[number] != rows:
            lost = rows - int(found[number])
            report.add(where, "row_index", f"{lost:,} of {rows:,} ids of {part.key!r} are not found at their row")
        elif filled[number] != rows:
            report.add(
                where,
                "row_index",
                f"the row index of {part.key!r} holds {filled[number]:,} rows, and the part has {rows:,}",
            )
    if work.indexes and report.count() == before:
        report.checked.append(f"row indexes of {count(len(work.indexes), 'part')}: each id is found at its row")
