"""Find the base of a delta package, and check that the delta was made on top of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Protocol, TypeVar

import msgspec

from dist_export.errors import DistExportError, PackageError, WrongBaseError
from dist_export.formats.delta_entries import BaseEntry
from dist_export.formats.recis import ID_SLOT
from dist_export.manifest import Manifest, SlotEntry, TableEntry
from dist_export.package.opened_files import OpenedFiles
from dist_export.storage.beside import list_candidates
from dist_export.storage.directory import Directory


class OpenedPackage(Protocol):
    """What the search needs of an open :class:`~dist_export.package.reader.Package`."""

    directory: Directory
    manifest: Manifest
    files: OpenedFiles

    def close(self) -> None:
        """Close its files."""


T = TypeVar("T", bound=OpenedPackage)


def find_base(
    delta: Directory,
    manifest: Manifest,
    open_package: Callable[[Directory], T],
    *,
    given: Directory | None = None,
    known: Sequence[T] = (),
    is_asked: bool = True,
) -> T:
    """Return the open base of a delta package. The first package with the digest of ``manifest.base`` is the base.

    Args:
        delta: the directory of the delta package.
        manifest: its manifest.
        open_package: opens the package in a directory, without what is below it.
        given: the only directory to look in. By default the base is where the manifest says, or beside the delta.
        known: packages that are open already. The base is one of them if it can be.
        is_asked: whether the delta is the package that is asked for, and not one below it, whose base nobody can give.

    Raises:
        WrongBaseError: ``given`` is not the base.
        PackageError: no directory has the base, or its slots are not those of the delta.
    """
    entry = manifest.base
    assert isinstance(entry, BaseEntry)
    for package in known:
        if package.manifest.digest == entry.digest and package.files.is_current():
            check_fit(delta, manifest, package.directory, package.manifest)
            return package
    misses: list[str] = []
    candidates = [given] if given is not None else list_candidates(delta, entry.path, misses)
    for place in candidates:
        try:
            package = open_package(place)
        except DistExportError as error:
            misses.append(str(error) if str(error).startswith(place.url) else f"{place.url}: {error}")
            continue
        found = package.manifest
        if found.digest == entry.digest:
            try:
                check_fit(delta, manifest, place, found)
            except PackageError:
                package.close()
                raise
            return package
        package.close()
        misses.append(f"{place.url} is another package, of the digest {found.digest}")
    if is_asked:
        advice = "give the right base" if given is not None else "put the base back, or give base"
    else:
        advice = "and those on top of it, put its base back there or beside it"
    kind = PackageError if given is None else WrongBaseError
    raise kind(
        f"{delta.url} is a delta package of {entry.path}, and needs that base, whose manifest has the digest "
        f"{entry.digest}. It is not there: {'; '.join(misses)}. To read the delta{',' if is_asked else ''} {advice}"
    )


def check_fit(delta: Directory, manifest: Manifest, base: Directory, found: Manifest) -> None:
    """Refuse a base that has the right digest, and yet no delta can be on top of it. PackageError."""
    if fault := find_misfit(manifest, found):
        raise PackageError(f"{delta.url} is a delta package of {base.url}, but {fault}. Run verify on both")


def find_misfit(delta: Manifest, base: Manifest) -> str:
    """Return why a package cannot be the base of a delta package, as the end of a sentence; empty if it can."""
    if file := base.find_undigested():
        return f"its {file} was written with digest: none, so nothing tells its rows from others; export both again with digests"
    tables = {table.name: table for table in base.tables}
    for table in delta.tables:
        below = tables.get(table.name)
        if table.is_row_indexed:
            return f"its table {table.name!r} has no ids, by which its rows replace those of the base"
        if below is None:
            if table.delta is not msgspec.UNSET and table.delta.rows_base:
                return f"the base has no table {table.name!r}, of which the delta says {table.delta.rows_base:,} rows"
            continue
        ours, theirs = _describe_slots(table), _describe_slots(below)
        if ours != theirs:
            return f"table {table.name!r} has the slots {'; '.join(ours)} in the delta, and {'; '.join(theirs)} in the base"
    return ""


def _describe_slots(table: TableEntry) -> list[str]:
    """Return name, dtype and shape of the kept slots, without the ids: a row-indexed base has none."""
    return [_describe_slot(slot) for slot in table.kept if slot.name != ID_SLOT]


def _describe_slot(slot: SlotEntry) -> str:
    encoding = "" if slot.encoding is msgspec.UNSET else f" {slot.encoding}"
    dim = "" if slot.dim is msgspec.UNSET else f" of {slot.dim}"
    return f"{slot.name} {slot.dtype} {list(slot.shape)}{encoding}{dim}"
