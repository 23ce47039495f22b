"""Check the row fingerprints: each is that of the bytes of its row."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Collection, Mapping
from typing import NamedTuple

import msgspec
import numpy as np

from dist_export.errors import DistExportError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.recis import ID_SLOT
from dist_export.formats.row_fingerprints import (
    FINGERPRINT,
    MAGIC,
    Fingerprinter,
    PartSlots,
    Piece,
    SlotBlock,
    find_fault,
    group_pieces,
)
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.humanize import count
from dist_export.manifest import MANIFEST, Manifest, PartEntry, RowFingerprintsEntry, TableEntry
from dist_export.package.shard_headers import fact_of
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import OpenReaders
from dist_export.verify.blocks import Blocks
from dist_export.verify.report import Report
from dist_export.verify.work_split import FingerprintedPart, Work, cut

_CHECK = "row_fingerprints"


class WrongRows(NamedTuple):
    """What is wrong with a piece of a part."""

    part: int
    """The place in ``Work.fingerprints``."""
    rows: int
    """Rows whose fingerprint is another one."""
    first: int
    """The first of them."""
    error: str = ""


def find_fingerprinted_parts(
    manifest: Manifest, blocks: Blocks, bad: Collection[str], report: Report
) -> tuple[FingerprintedPart, ...]:
    """Return the parts whose row fingerprints can be checked, and report the entries that cannot be. Rank 0.

    ``bad`` are the files that have a finding already, and are not read.
    """
    sizes = {file.path: file.num_bytes for file in manifest.files}
    ends: dict[str, int] = defaultdict(int)
    lacking, found = [], []
    for table in manifest.tables:
        for part in table.parts:
            entry, key = part.row_fingerprints, _name_part(table, part)
            if entry is msgspec.UNSET:
                lacking += [key] if part.rows else []
                continue
            ends[entry.file] = max(ends[entry.file], entry.offset + part.rows * FINGERPRINT.itemsize)
            if _can_be(entry, part, key, sizes, report) and entry.file not in bad:
                slots = _find_slots(table, part, blocks)
                if slots is not None:
                    found.append(FingerprintedPart(entry, key, PartSlots(part.rows, slots)))
    if ends and lacking:
        report.add(
            MANIFEST, _CHECK, f"{count(len(lacking), 'part')} without row fingerprints, the first is {lacking[0]!r}"
        )
    for name, end in ends.items():
        if sizes.get(name, 0) > end:
            report.add(name, _CHECK, f"has {sizes[name]:,} bytes, and its last fingerprint ends at byte {end:,}")
    return tuple(found)


def _can_be(entry: RowFingerprintsEntry, part: PartEntry, key: str, sizes: Mapping[str, int], report: Report) -> bool:
    """Return whether the fingerprints can be where the manifest says. If they cannot, report it."""
    if entry.file not in sizes:
        report.add(MANIFEST, _CHECK, f"the row fingerprints of {key!r} are in {entry.file}, which it does not list")
        return False
    fault = find_fault(offset=entry.offset, num_rows=part.rows, file_size=sizes[entry.file])
    if fault is not None:
        report.add(MANIFEST, _CHECK, f"the row fingerprints of {key!r} cannot be: {fault}")
    return fault is None


def _name_part(table: TableEntry, part: PartEntry) -> str:
    return part.keys.get(table.kept[0].name, "") if table.kept else ""


def _find_slots(table: TableEntry, part: PartEntry, blocks: Blocks) -> tuple[SlotBlock, ...] | None:
    """Return the blocks of a part without ids; None if one is not what the manifest says, which is reported already."""
    kept = [slot for slot in table.kept if slot.name != ID_SLOT]
    slots = []
    for slot, row in zip(
        kept, blocks.find((part.keys.get(slot.name, "") for slot in kept), len(kept)).tolist(), strict=True
    ):
        if row < 0 or slot.dtype not in CODE_BY_TORCH:
            return None
        row_bytes = math.prod(slot.shape) * DTYPES[CODE_BY_TORCH[slot.dtype]].itemsize
        if int(blocks.end[row] - blocks.begin[row]) != part.rows * row_bytes:
            return None
        slots.append(SlotBlock(int(blocks.file[row]), int(blocks.begin[row]), row_bytes))
    return tuple(slots)


def cut_fingerprints(work: Work, piece_rows: int) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """Return part, first row, rows and bytes (int64) of each piece of the parts with row fingerprints."""
    part, first, rows = cut(np.array([its.slots.num_rows for its in work.fingerprints], np.int64), piece_rows)
    row_bytes = np.array([its.slots.row_bytes + FINGERPRINT.itemsize for its in work.fingerprints], np.int64)
    return part, first, rows, rows * row_bytes[part]


def compare_fingerprints(
    directory: Directory, work: Work, chosen: slice, *, tuning: Tuning = STANDARD
) -> list[WrongRows]:
    """Compare a run of the pieces of :func:`cut_fingerprints` with the rows. Any rank, any thread."""
    wrong = []
    most_bytes, most_rows = tuning.fingerprint_bytes, tuning.fingerprint_rows
    parts = [its.slots for its in work.fingerprints]
    names = [*work.shards, *dict.fromkeys(its.entry.file for its in work.fingerprints)]
    numbers = {name: number for number, name in enumerate(names)}
    with OpenReaders(lambda number: directory.open_reader(names[number])) as readers:
        fingerprinter = Fingerprinter(parts, lambda file, ranges: readers[file].read_many(ranges))
        columns = cut_fingerprints(work, tuning.verified_fingerprints)[:3]
        for whole in map(Piece, *(column[chosen].tolist() for column in columns)):
            entry = work.fingerprints[whole.part].entry
            try:
                stored = readers[numbers[entry.file]]
                is_ours = bool(whole.first_row) or stored.fetch(0, len(MAGIC)) == MAGIC
                if not is_ours:
                    wrong.append(WrongRows(whole.part, 0, 0, "it is no file of row fingerprints"))
                for group in group_pieces([whole], parts, most_bytes, most_rows=most_rows) if is_ours else ():
                    (piece,) = group
                    (expected,) = fingerprinter.compute(group)
                    found = np.empty(piece.num_rows, FINGERPRINT)
                    # read again: the rows of many pieces may have pushed the reader out
                    stored = readers[numbers[entry.file]]
                    stored.read_into(found.data.cast("B"), entry.offset + piece.first_row * FINGERPRINT.itemsize)
                    odd = np.flatnonzero(found != expected)
                    if len(odd):
                        wrong.append(WrongRows(whole.part, len(odd), piece.first_row + int(odd[0])))
            except (DistExportError, OSError) as error:
                reason = (error.strerror or str(error)) if isinstance(error, OSError) else fact_of(error)
                wrong.append(WrongRows(whole.part, 0, 0, reason))
    return wrong


def report_fingerprints(work: Work, wrong: list[WrongRows], report: Report) -> None:
    """Report the parts with rows that do not have their fingerprint. Rank 0.

    If a file of the part has a finding already, or the manifest has wrong tables, what follows from it is not reported.
    """
    if any((finding.file, finding.check) == (MANIFEST, "manifest") for finding in report.found):
        return
    before, known = report.count(), {finding.file for finding in report.found if finding.check != "finite"}
    by_part: dict[int, list[WrongRows]] = {}
    for its in wrong:
        by_part.setdefault(its.part, []).append(its)
    for number, pieces in sorted(by_part.items()):
        part = work.fingerprints[number]
        name = part.entry.file
        if known & {name, *(work.shards[slot.file] for slot in part.slots.slots)}:
            continue
        unread = next((its.error for its in pieces if its.error), "")
        if unread:
            report.add(name, _CHECK, f"the row fingerprints of {part.key!r} cannot be checked: {unread}")
            continue
        rows, first = sum(its.rows for its in pieces), min(its.first for its in pieces)
        report.add(
            name,
            _CHECK,
            f"{rows:,} of {part.slots.num_rows:,} rows of {part.key!r} have another fingerprint, the first is row {first:,}",
        )
    if work.fingerprints and not wrong and report.count() == before:
        report.checked.append(f"row fingerprints of {count(len(work.fingerprints), 'part')}: each is that of its row")
