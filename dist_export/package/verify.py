"""Check an exported directory against its manifest and itself. Every finding is one line; none is an exception.

The order: files (sizes, digests), then what the indexes and headers say, then the manifest's tables against them, then
the rows, then the dense program. A later check runs only on what the earlier ones left sound.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

from dist_export.digests import algorithm_of
from dist_export.errors import DistExportError
from dist_export.manifest import DenseEntry, FileEntry
from dist_export.package.dense_check import check_dense
from dist_export.package.package import Package
from dist_export.package.sparse_check import check_sparse
from dist_export.storage import Directory, digest_file


@dataclass
class Report:
    """What a verification found, and what it looked at."""

    findings: list[str] = field(default_factory=list)
    """Empty where the package is sound."""
    checked: list[str] = field(default_factory=list)


def verify(path: str, storage_options: dict[str, Any] | None = None) -> Report:
    """Check sizes and digests, headers, indexes, tables and rows against each other, and that the dense program loads.

    Raises:
        UserError: there is no such directory.
        PackageError: there is no package to verify: no manifest, or one that cannot be read.
    """
    package = Package(Directory(path, storage_options))
    report = Report()
    _guard(report, "files", lambda: _check_files(package, report))
    if package.manifest.mode != "dense_only":
        _guard(report, "tables", lambda: check_sparse(package, report.findings, report.checked))
    if package.manifest.dense is not None:
        entry = package.manifest.dense
        _guard(report, entry.program, lambda: _check_dense_files(package, entry, report))
    return report


def _guard(report: Report, what: str, check: Callable[[], None]) -> None:
    """Run a check; whatever a damaged package makes it raise is a finding."""
    try:
        check()
    except (DistExportError, OSError, ValueError, TypeError, LookupError, AttributeError, RecursionError) as error:
        first = next(iter(str(error).strip().splitlines()), "")
        known = isinstance(error, DistExportError)
        report.findings.append(first if known else f"{what}: cannot be checked: {type(error).__name__}: {first}")


def _check_files(package: Package, report: Report) -> None:
    directory = package.directory
    num_bytes = 0
    for entry in package.manifest.files:
        try:
            size = directory.stat(entry.path).size
            if size != entry.num_bytes:
                report.findings.append(f"{entry.path}: {size:,} bytes, the manifest says {entry.num_bytes:,}")
            elif entry.digest and (digest := _digest_again(directory, entry)) != entry.digest:
                report.findings.append(
                    f"{entry.path}: its content is not what was written (digest {digest}, not {entry.digest})"
                )
            num_bytes += size
        except FileNotFoundError:
            report.findings.append(f"{entry.path}: missing")
        except OSError as error:
            report.findings.append(f"{entry.path}: {error.strerror or error}")
    if len({entry.path for entry in package.manifest.files}) < len(package.manifest.files):
        report.findings.append("manifest.json: lists a file twice")
    bare = sum(not entry.digest for entry in package.manifest.files)
    but = f" (sizes alone of {bare}, which were exported without a digest)" if bare else ""
    report.checked.append(f"{len(package.manifest.files)} files, {num_bytes:,} bytes: sizes and digests{but}")


def _digest_again(directory: Directory, entry: FileEntry) -> str:
    return digest_file(directory, entry.path, algorithm_of(entry.digest))


def _check_dense_files(package: Package, entry: DenseEntry, report: Report) -> None:
    listed = {file.path for file in package.manifest.files}
    needed = [entry.program, *(f"{entry.folder}/{name}" for name in ("output_info.json", "params_order.json"))]
    missing = [name for name in needed if name not in listed]
    if missing:
        report.findings.append(f"{missing[0]}: not among the files of the manifest, so nothing vouches for it")
        return
    check_dense(package, entry, report.findings, report.checked)
