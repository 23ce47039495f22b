"""Check a delta package against its base: the account adds up, and each id is in the base, or not, as the account says.

The rows of the base are not read: ``verify`` of the base does that.
"""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_export.errors import DistExportError, PackageError, WrongBaseError
from dist_export.formats.deleted_ids import ID, SUFFIX, encode_deleted
from dist_export.formats.delta_entries import DeletedIdsEntry, DeltaEntry
from dist_export.manifest import MANIFEST, Manifest, TableEntry, count_served
from dist_export.package.reader import Package
from dist_export.package.shard_headers import fact_of
from dist_export.storage.directory import Directory
from dist_export.verify.report import Report

_CHECK = "delta"
_DELETED = -1
"""In place of the number of a part: the deleted ids."""


class Piece(NamedTuple):
    """Neighbouring ids of a table of the delta."""

    table: str
    part: int
    """``_DELETED`` for deleted ids, in their order."""
    first: int
    num_ids: int


class PieceCount(NamedTuple):
    """How many ids of a piece are where."""

    piece: Piece
    in_base: int
    in_delta: int
    """Of deleted ids, those that have a row in the delta all the same."""
    error: str = ""


def open_base(package: Package, given: Directory | None, report: Report) -> None:
    """Open the base, and check what the manifests say of both, and the deleted ids. Adds findings. Rank 0.

    Raises:
        WrongBaseError: ``given`` is not the base, which is no fault of the package.
    """
    manifest = package.manifest
    try:
        package.open_base(given)
    except WrongBaseError:
        raise
    except PackageError as error:
        report.add(MANIFEST, "base", str(error))
    listed = {file.path for file in manifest.files}
    for table in manifest.tables:
        in_base = None if package.base is None else _find_table(package.base.manifest, table.name)
        for fault in _find_faults(table, in_base, has_base=package.base is not None):
            report.add(MANIFEST, "account", f"table {table.name!r}: {fault}")
        unlisted = [its.file for its in _delta_of(table).deleted_ids if its.file not in listed]
        if unlisted:
            report.add(MANIFEST, "manifest", f"does not name {unlisted[0]}, so nothing vouches for it")
            continue
        _check_lists(package, table, report)
    _check_content(package, report)


def cut_pieces(package: Package, *, piece_ids: int) -> list[Piece]:
    """Return the ids of a delta package in pieces, the same on every rank. The deleted ids are sound."""
    pieces = []
    for table in package.manifest.tables:
        sizes = [*enumerate(part.rows for part in table.parts), (_DELETED, _delta_of(table).deleted)]
        pieces += [
            Piece(table.name, part, first, min(piece_ids, rows - first))
            for part, rows in sizes
            for first in range(0, rows, piece_ids)
        ]
    return pieces


def count_pieces(package: Package, pieces: list[Piece]) -> list[PieceCount]:
    """Look the ids of these pieces up in the base. Any rank, any thread; ``package`` is open with its base."""
    counts = []
    for piece in pieces:
        try:
            counts.append(_count(package, piece))
        except (DistExportError, OSError) as error:
            reason = (error.strerror or str(error)) if isinstance(error, OSError) else fact_of(error)
            counts.append(PieceCount(piece, 0, 0, reason))
    return counts


def report_delta(package: Package, counts: list[PieceCount], report: Report) -> None:
    """Compare the counts of all pieces with the account. Adds nothing if there is another finding, which may be the cause."""
    if report.count():
        return
    base = package.base
    assert base is not None
    totals = dict.fromkeys(("same", "changed", "new", "deleted"), 0)
    for table in package.manifest.tables:
        delta = _delta_of(table)
        totals = {name: total + getattr(delta, name) for name, total in totals.items()}
        its = [count for count in counts if count.piece.table == table.name]
        for fault in _find_wrong_ids(delta, its):
            report.add(MANIFEST, _CHECK, f"table {table.name!r}: {fault}")
    if not report.count():
        told = ", ".join(f"{number:,} {name}" for name, number in totals.items())
        report.checked.append(
            f"delta of {base.directory.url}: {told} by the ids of both; the base has the right digest, and is verified by itself"
        )


def _find_wrong_ids(delta: DeltaEntry, counts: list[PieceCount]) -> list[str]:
    if error := next((count.error for count in counts if count.error), ""):
        return [f"its ids cannot be looked up in the base: {error}"]
    rows = [count for count in counts if count.piece.part != _DELETED]
    deleted = [count for count in counts if count.piece.part == _DELETED]
    in_base, found = sum(count.in_base for count in rows), []
    if in_base != delta.changed:
        total = delta.changed + delta.new
        found.append(
            f"{in_base:,} of its {total:,} rows are in the base, and {total - in_base:,} are not; the account says "
            f"{delta.changed:,} changed and {delta.new:,} new"
        )
    lacking = delta.deleted - sum(count.in_base for count in deleted)
    if lacking:
        found.append(f"{lacking:,} of {delta.deleted:,} deleted ids are not in the base")
    if kept := sum(count.in_delta for count in deleted):
        found.append(f"{kept:,} of {delta.deleted:,} deleted ids have a row in the delta")
    return found


def _count(package: Package, piece: Piece) -> PieceCount:
    assert package.base is not None
    own = package.rows_of(piece.table)
    last = piece.first + piece.num_ids
    if piece.part == _DELETED:
        ids = package.deleted_ids(piece.table)[piece.first : last]
        in_delta = int(own.contains(ids).sum())
    else:
        ids, in_delta = own.read_ids(piece.part, piece.first, last), piece.num_ids
    if _find_table(package.base.manifest, piece.table) is None:
        return PieceCount(piece, 0, in_delta)
    return PieceCount(piece, int(package.base.contains(piece.table, ids).sum()), in_delta)


def _check_lists(package: Package, table: TableEntry, report: Report) -> None:
    """Read the deleted ids of a table: they are sorted, as many as stated, and none is there twice."""
    try:
        ids = package.deleted_ids(table.name)
    except PackageError as error:
        file = next((its.file for its in _delta_of(table).deleted_ids), MANIFEST)
        if not any(finding.file == file for finding in report.found):
            report.add(file, "deleted_ids", str(error))
        return
    twice = np.flatnonzero(ids[1:] == ids[:-1])
    if len(twice):
        file = _delta_of(table).deleted_ids[0].file
        report.add(
            file,
            "deleted_ids",
            f"{len(twice):,} deleted ids of table {table.name!r} are there twice, first {int(ids[twice[0]])}",
        )


def _check_content(package: Package, report: Report) -> None:
    """Report a file of deleted ids that holds more than the lists of the manifest: a list that was cut gives rows back."""
    lists: dict[str, list[DeletedIdsEntry]] = {}
    for table in package.manifest.tables:
        for its in _delta_of(table).deleted_ids:
            lists.setdefault(its.file, []).append(its)
    for file in package.manifest.files:
        if not file.path.endswith(SUFFIX) or report.count():  # what else was found may be the cause
            continue
        content = package.files.read(file.path)
        ids = [
            np.frombuffer(content, ID, its.ids, its.offset) for its in sorted(lists.get(file.path, ()), key=_offset_of)
        ]
        if encode_deleted(ids)[0] != content:
            report.add(file.path, "deleted_ids", "it holds more than the lists that the manifest names")


def _offset_of(entry: DeletedIdsEntry) -> int:
    return entry.offset


def _find_faults(table: TableEntry, in_base: TableEntry | None, *, has_base: bool) -> list[str]:
    """Return what does not add up in the account of a table. ``in_base`` is None if the base has no such table."""
    delta, found = _delta_of(table), []
    total = delta.same + delta.changed + delta.deleted
    if total != delta.rows_base:
        found.append(
            f"{delta.same:,} same, {delta.changed:,} changed and {delta.deleted:,} deleted rows are {total:,}, and the base has "
            f"{delta.rows_base:,}"
        )
    if delta.changed + delta.new != table.rows_out:
        found.append(
            f"{delta.changed:,} changed and {delta.new:,} new rows are {delta.changed + delta.new:,}, and the delta has "
            f"{table.rows_out:,}"
        )
    if table.rows_dropped.get("same", 0) != delta.same:
        found.append(
            f"{delta.same:,} rows are the same, and {table.rows_dropped.get('same', 0):,} were left to the base"
        )
    listed = sum(its.ids for its in delta.deleted_ids)
    if listed != delta.deleted:
        found.append(f"{delta.deleted:,} ids are deleted, and its files have {listed:,}")
    if has_base:
        rows = 0 if in_base is None else count_served(in_base)
        if rows != delta.rows_base:
            found.append(f"the base has {rows:,} rows, and the account says {delta.rows_base:,}")
        if in_base is not None and in_base.is_row_indexed and delta.deleted:
            found.append(f"{delta.deleted:,} rows are deleted, which a row-indexed table of the base does not have")
    return found


def _delta_of(table: TableEntry) -> DeltaEntry:
    assert isinstance(table.delta, DeltaEntry)
    return table.delta


def _find_table(manifest: Manifest, name: str) -> TableEntry | None:
    return next((table for table in manifest.tables if table.name == name), None)
