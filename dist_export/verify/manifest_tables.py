"""Compare the tables of a package's manifest with its shards, both ways, and check that its account of rows adds up."""

from __future__ import annotations

import math

import msgspec
import numpy as np

from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT, parse_slice
from dist_export.formats.row_encodings import INT8_ROWWISE, TAIL_BYTES, U8
from dist_export.manifest import MANIFEST, DenseTensorEntry, Manifest, SlotEntry, TableEntry
from dist_export.package.stored_rows import is_sound_encoding
from dist_export.verify.blocks import Blocks
from dist_export.verify.indexed_tables import check_ranges
from dist_export.verify.manifest_numbers import check_numbers
from dist_export.verify.report import Report

_CHECK = "manifest"


def check_tables(manifest: Manifest, blocks: Blocks, report: Report) -> None:
    """Compare tables, slots and parts, and the dense tensors among the shards, with the blocks of the headers."""
    comparison, before = _Comparison(blocks, report), report.count()
    names: set[str] = set()
    for table in manifest.tables:
        if table.name in names:
            report.add(MANIFEST, _CHECK, f"lists the table {table.name!r} twice")
            continue
        names.add(table.name)
        comparison.check_table(table)
    comparison.check_dense(manifest.dense_tensors)
    account = manifest.account
    if not isinstance(account, msgspec.UnsetType) and account.total != account.num_bytes:
        parts = f"{account.total:,} bytes by what became of them, {account.num_bytes:,} in all"
        report.add(MANIFEST, "account", f"the account of the source's payload does not add up: {parts}")
    if not isinstance(account, msgspec.UnsetType):
        counted, saved = account.dropped.get("cast", 0), sum(map(_count_saved, manifest.tables))
        if counted > saved:  # tables that are one tensor of the source are counted once
            what = f"{counted:,} bytes are dropped by cast, and the casts of its tables save {saved:,}"
            report.add(MANIFEST, "account", f"the account of the source's payload contradicts the tables: {what}")
    if blocks.is_whole:
        comparison.check_nothing_left()
    if report.count() == before:  # numbers of wrong tables would be reported a second time
        check_numbers(manifest, report)


class _Comparison:
    """Compares the blocks of all parts of a table at once, as columns. Single parts are examined only if something differs."""

    def __init__(self, blocks: Blocks, report: Report) -> None:
        self._blocks = blocks
        self._report = report
        self._is_claimed = np.zeros(len(blocks), bool)
        self._table = {name: number for number, name in enumerate(blocks.tables)}
        self._file = {name: number for number, name in enumerate(blocks.files)}
        self._slice = {tuple(part): number for number, part in enumerate(blocks.slices.tolist())}
        self._inner = {shape: number for number, shape in enumerate(blocks.inner_shapes)}
        self._slice_of_text: dict[str, int] = {}

    def check_table(self, table: TableEntry) -> None:
        report, blocks = self._report, self._blocks
        slots = {slot.name: slot for slot in table.kept}
        before = report.count()
        by_number = table.is_row_indexed
        for needed in (EMBEDDING_SLOT,) if by_number else (ID_SLOT, EMBEDDING_SLOT):
            if needed not in slots:
                report.add(MANIFEST, _CHECK, f"table {table.name!r} keeps no {needed}")
        if len(slots) < len(table.kept):
            report.add(MANIFEST, _CHECK, f"table {table.name!r} keeps a slot twice")
        for part in table.parts:
            # in a copy, a part without rows may lack slots that others have
            if part.keys.keys() != slots.keys() and (
                by_number or part.rows or ID_SLOT not in part.keys or not part.keys.keys() <= slots.keys()
            ):
                report.add(MANIFEST, _CHECK, f"table {table.name!r} has a part with slots {sorted(part.keys)}")
        number = len(table.parts)
        rows = np.array([part.rows for part in table.parts], object)
        rows = np.where((rows < 0) | (rows >= 1 << 62), -2, rows).astype(np.int64) if number else np.zeros(0, np.int64)
        file = np.fromiter((self._file.get(part.file, -1) for part in table.parts), np.int64, number)
        part_slice = np.fromiter((self._find_slice(part.slice) for part in table.parts), np.int64, number)
        for slot in slots.values():
            self._check_encoding(table, slot)
            keys = [part.keys.get(slot.name) for part in table.parts]
            has_key = np.array([key is not None for key in keys], bool)
            row = blocks.find((key or "" for key in keys), number)
            if blocks.is_whole:
                for place in np.flatnonzero(has_key & (row < 0)).tolist():
                    report.add(MANIFEST, _CHECK, f"block {keys[place]!r} of table {table.name!r} is in no shard")
            # blocks that tensorkey.json does not name are already reported
            place = np.flatnonzero(has_key & (row >= 0) & (blocks.stem[row] != -2 if len(blocks) else False))
            row = row[place]
            self._is_claimed[row] = True
            # in a copy, the other blocks of a part may be in other files than its ids
            is_here = slot.name == ID_SLOT or by_number
            is_wrong = (
                (blocks.table[row] != self._table.get(table.name, -2))
                | (self._slot_of(row) != slot.name)
                | ((blocks.slice[row] != part_slice[place]) & (not by_number))  # headers have no row numbers
                | ((blocks.file[row] != file[place]) & is_here)
                | (blocks.is_row_indexed[row] != by_number)
                | (blocks.dtype[row] != CODE_BY_TORCH.get(slot.dtype, -1))
                | (blocks.rows[row] != rows[place])
                | (blocks.inner[row] != self._inner.get(slot.shape, -1))
            )
            for wrong in np.flatnonzero(is_wrong).tolist():
                self._tell(table, slot, int(place[wrong]), int(row[wrong]))
        _check_account(table, report)
        if by_number and report.count() == before:
            check_ranges(table, report)

    def _check_encoding(self, table: TableEntry, slot: SlotEntry) -> None:
        where = f"slot {slot.name!r} of table {table.name!r}"
        if slot.encoding is not msgspec.UNSET and not is_sound_encoding(slot):
            what = f"has the unknown encoding {slot.encoding!r} of {slot.dtype} {list(slot.shape)}"
            self._report.add(MANIFEST, _CHECK, f"{where} {what}")
        # a cast writes floats, or rows with an encoding. Without the encoding, their bytes would be read as values
        lacks_encoding = slot.encoding is msgspec.UNSET and (
            slot.dim is not msgspec.UNSET or (slot.cast is not msgspec.UNSET and slot.dtype == DTYPES[U8].torch)
        )
        if lacks_encoding:
            what = f"of {slot.dtype} {list(slot.shape)} has no encoding, though its rows were cast or have a dim"
            self._report.add(MANIFEST, _CHECK, f"{where} {what}")

    def check_dense(self, tensors: tuple[DenseTensorEntry, ...]) -> None:
        blocks, report = self._blocks, self._report
        rows = blocks.find((f"{tensor.name}^ " for tensor in tensors), len(tensors)).tolist()
        for tensor, row in zip(tensors, rows, strict=True):
            if row < 0:
                if blocks.is_whole:
                    report.add(MANIFEST, _CHECK, f"dense tensor {tensor.name!r} is in no shard")
                continue
            self._is_claimed[row] = True
            found = blocks.torch_dtype(row), blocks.shape(row)
            if found != (tensor.dtype, tensor.shape):
                report.add(
                    MANIFEST,
                    _CHECK,
                    f"dense tensor {tensor.name!r} is stated as {tensor.dtype} {list(tensor.shape)}, "
                    f"{blocks.file_of(row)} says {found[0]} {list(found[1])}",
                )

    def check_nothing_left(self) -> None:
        for row in np.flatnonzero(~self._is_claimed).tolist():
            self._report.add(self._blocks.file_of(row), _CHECK, f"{self._blocks.key(row)!r} is not in the manifest")

    def _slot_of(self, rows: np.ndarray) -> np.ndarray:
        slots = np.array([slot for _, slot in self._blocks.stems] + [""], object)
        found: np.ndarray = slots[self._blocks.stem[rows]]
        return found

    def _find_slice(self, text: str) -> int:
        found = self._slice_of_text.get(text)
        if found is None:
            part = parse_slice(text)
            found = self._slice_of_text[text] = -2 if part is None else self._slice.get(tuple(part), -2)
        return found

    def _tell(self, table: TableEntry, slot: SlotEntry, place: int, row: int) -> None:
        blocks, part = self._blocks, table.parts[place]
        name = blocks.stems[blocks.stem[row]] if blocks.stem[row] >= 0 else ("", "")
        found_slice = tuple(blocks.slice_of(row)) if blocks.stem[row] >= 0 else ()
        stated_slice = parse_slice(part.slice)
        by_number = table.is_row_indexed
        file = part.file if slot.name == ID_SLOT or by_number else blocks.file_of(row)
        pairs = [
            ("table", table.name, name[0]),
            ("slot", slot.name, name[1]),
            (
                "slice",
                found_slice if by_number else part.slice if stated_slice is None else tuple(stated_slice),
                found_slice,
            ),
            ("file", file, blocks.file_of(row)),
            ("dtype", slot.dtype, blocks.torch_dtype(row)),
            ("shape", (part.rows, *slot.shape), blocks.shape(row)),
        ]
        stated = ", ".join(f"{what} {said!r}" for what, said, is_so in pairs if said != is_so)
        found = ", ".join(f"{is_so!r}" for _, said, is_so in pairs if said != is_so)
        self._report.add(MANIFEST, _CHECK, f"block {blocks.key(row)!r} is stated with {stated}; the shards say {found}")


def _count_saved(table: TableEntry) -> int:
    """Return the bytes that a table's casts save, by what the manifest says of its slots."""
    saved = 0
    for slot in table.kept:
        if isinstance(slot.cast, msgspec.UnsetType):
            continue
        values = math.prod(slot.shape) if isinstance(slot.dim, msgspec.UnsetType) else slot.dim
        source = slot.cast.source_dtype
        before = values + TAIL_BYTES if source == INT8_ROWWISE else values * _itemsize(source)
        saved += table.rows_out * max(0, before - math.prod(slot.shape) * _itemsize(slot.dtype))
    return saved


def _itemsize(name: str) -> int:
    return DTYPES[CODE_BY_TORCH[name]].itemsize if name in CODE_BY_TORCH else 0


def _check_account(entry: TableEntry, report: Report) -> None:
    dropped = sum(entry.rows_dropped.values())
    if entry.rows_in != entry.rows_out + dropped:
        report.add(
            MANIFEST,
            "account",
            f"the account of table {entry.name!r} does not add up: {entry.rows_in:,} rows in, {entry.rows_out:,} out, "
            f"{dropped:,} dropped",
        )
    numbers = (entry.rows_in, entry.rows_out, entry.misplaced, *entry.rows_dropped.values())
    if min(numbers) < 0 or entry.misplaced > entry.rows_in:
        report.add(MANIFEST, "account", f"the account of table {entry.name!r} has numbers that cannot be: {numbers}")
    # a misplaced row is repaired or dropped, and a row is only dropped as a duplicate if a duplicate was found
    is_possible = (
        0 <= entry.repaired <= entry.misplaced <= entry.repaired + dropped
        and entry.rows_dropped.get("duplicate", 0) <= entry.duplicates <= dropped
    )
    if not is_possible:
        report.add(
            MANIFEST,
            "account",
            f"the account of table {entry.name!r} contradicts itself: {entry.misplaced:,} rows misplaced, {entry.repaired:,} "
            f"repaired, {entry.duplicates:,} duplicates, dropped {entry.rows_dropped}",
        )
    row = entry.default_row
    widths = (
        math.prod(slot.shape) if isinstance(slot.dim, msgspec.UnsetType) else slot.dim
        for slot in entry.kept
        if slot.name == EMBEDDING_SLOT
    )
    width = next(widths, -1)
    if row != "zeros" and not isinstance(row, msgspec.UnsetType) and (isinstance(row, str) or len(row) != width):
        report.add(MANIFEST, _CHECK, f"the default row of table {entry.name!r} is no row of it")
    in_parts = sum(part.rows for part in entry.parts)
    if in_parts != entry.rows_out:
        report.add(
            MANIFEST,
            "account",
            f"the parts of table {entry.name!r} have {in_parts:,} rows, its rows_out is {entry.rows_out:,}",
        )
