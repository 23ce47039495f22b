"""Check that what a delta has taken over from its base is there byte for byte. Its samples are of the base's rows.

So nothing is run: ``verify`` of the base does that.
"""

from __future__ import annotations

from collections.abc import Iterator

import msgspec

from dist_export.formats.digests import algorithm_of, digest_bytes
from dist_export.humanize import count
from dist_export.manifest import MANIFEST, FileEntry, Manifest
from dist_export.package.beside_tables import list_beside_tables
from dist_export.package.reader import Package
from dist_export.verify.report import Report


def has_dense_of_base(manifest: Manifest) -> bool:
    """Return whether a package says that all of it that is no table is its base's."""
    return manifest.base is not msgspec.UNSET and manifest.base.has_dense is True


def compare_taken_over(package: Package, report: Report) -> None:
    """Compare the files of a delta that are no table with those of its base, and what both manifests say of them. Rank 0.

    Adds nothing if there is another finding, which may be the cause.
    """
    base = package.base
    if base is None or report.count():
        return
    ours = {file.path: file for file in list_beside_tables(package.manifest)}
    theirs = {file.path: file for file in list_beside_tables(base.manifest)}
    for path in sorted(ours.keys() ^ theirs.keys()):
        whose = "the delta, and not of the base" if path in ours else "the base, and not of the delta"
        report.add(
            MANIFEST, "base", f"{path} is a file of {whose}, from which the delta says it has all that is no table"
        )
    for path in sorted(ours.keys() & theirs.keys()):
        if _read_digest(package, ours[path], theirs[path]) != theirs[path].digest:
            report.add(path, "base", "is not the file of the base, from which the delta says it has it")
    for name in _find_other_entries(package.manifest, base.manifest):
        report.add(MANIFEST, "base", f"{name} is not what the base has, from which the delta says it has it")
    if ours and not report.count():
        report.checked.append(
            f"all that is no table, {count(len(ours), 'file')}: byte for byte that of the base, whose rows its samples are of; "
            "verify of the base runs them"
        )


def _read_digest(package: Package, ours: FileEntry, theirs: FileEntry) -> str:
    """Return the digest of a file in the base's algorithm. That of the manifest was compared with the file before."""
    if not theirs.digest or algorithm_of(ours.digest) == algorithm_of(theirs.digest):
        return ours.digest if theirs.digest else ""
    return digest_bytes(package.files.read(ours.path), algorithm_of(theirs.digest))


def _find_other_entries(ours: Manifest, theirs: Manifest) -> Iterator[str]:
    for name in ("dense", "parity", "drift", "score", "serving"):
        if getattr(ours, name) != getattr(theirs, name):
            yield name
