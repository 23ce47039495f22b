"""Read what a report needs besides the manifest: rows, the events of the run, and the versions of a publish directory."""

from __future__ import annotations

import math
import os
from collections.abc import Mapping
from typing import Any

import msgspec

from dist_export.errors import ConfigError, DistExportError
from dist_export.formats.dtypes import CODE_BY_TORCH
from dist_export.manifest import TableEntry
from dist_export.package.reader import Package
from dist_export.package.stored_rows import decode_rows, row_bytes_of
from dist_export.redact import first_line, redact_text
from dist_export.registry.versions import CURRENT, VERSIONS, VersionDirectory
from dist_export.report.entries import FoundEvents, FoundVersions, embedding_of
from dist_export.report.norms import NormCounter, NormEntry, choose_runs
from dist_export.runtime.threads import run_threads
from dist_export.storage.directory import Directory
from dist_export.storage.urls import open_directory

_BLOCK_VALUES = 1 << 20
"""Values of a table that a thread holds at once, a few times over."""
_THREADS, _STORE_THREADS = 2, 16
"""A store answers one request slowly and many at once."""


def read_norms(package: Package, *, sample_rows: int, block_values: int = _BLOCK_VALUES) -> dict[str, NormEntry | str]:
    """Return what the rows of each table hold, or why they were not read. PackageError if the package is damaged.

    Threads share the tables. Each holds one block of rows, with about ``block_values`` values.
    """
    tables = package.manifest.tables
    count = min(len(tables), _THREADS if package.directory.is_local else _STORE_THREADS) or 1

    def read(share: tuple[TableEntry, ...]) -> dict[str, NormEntry | str]:
        return {table.name: _read_table(package, table, sample_rows, block_values) for table in share}

    shares = run_threads(read, [tables[number::count] for number in range(count)])
    return {name: entry for share in shares for name, entry in share.items()}


def _read_table(package: Package, table: TableEntry, sample_rows: int, block_values: int) -> NormEntry | str:
    slot = embedding_of(table)
    if slot is None:
        return "the table has no embedding"
    if slot.dtype in CODE_BY_TORCH and not row_bytes_of(slot):
        return "its rows have no values"
    counter = NormCounter()
    block_rows = max(1, block_values // max(1, math.prod(slot.shape)))
    rows = [part.rows for part in table.parts]
    for run in choose_runs(rows, sample_rows=sample_rows, block_rows=block_rows):
        stored = package.read_run(table.name, run.part, run.first, run.last).rows
        counter.add(decode_rows(stored, slot))
    return counter.close()


def read_events(directory: Directory, given: str | None, options: Mapping[str, Any] | None) -> FoundEvents:
    """Return the events of the run: of the file ``given``, else of the one that ``events: true`` writes beside the package.

    Raises:
        ConfigError: the file that is given cannot be read.
    """
    place = directory.path if directory.is_local else directory.location.given
    url = given or f"{place.rstrip('/')}.events.jsonl"
    folder, _, name = url.rpartition("/")
    where = redact_text(url)
    try:
        raw = open_directory(folder or ("/" if "/" in url else "."), dict(options or {}), follow_links=True).read_text(
            name
        )
    except OSError as error:
        if given is not None:
            raise ConfigError(f"--events {where} cannot be read: {error.strerror or first_line(error)}") from None
        missing = isinstance(error, (FileNotFoundError, NotADirectoryError))
        return FoundEvents(where, [], "there is no such file" if missing else error.strerror or first_line(error))
    lines = []
    for line in raw.splitlines():
        try:
            lines.append(msgspec.json.decode(line))
        except (
            msgspec.MsgspecError,
            ValueError,
            RecursionError,
        ):  # the last line of a run that was killed may be cut off
            continue
    return FoundEvents(where, lines)


def read_versions(directory: Directory, options: Mapping[str, Any] | None) -> FoundVersions | None:
    """Return the versions of the directory that the package was published to; None if it was not."""
    place = os.path.realpath(directory.path) if directory.is_local else directory.location.given.rstrip("/")
    parent, _, name = place.rpartition("/")
    where, _, folder = parent.rpartition("/")
    if folder != VERSIONS or not where:
        return None
    try:
        if not open_directory(where, dict(options or {})).exists(CURRENT):
            return None
        versions = VersionDirectory(storage_options=dict(options or {})).list_versions(where)
    except (DistExportError, OSError) as error:
        return FoundVersions(redact_text(where), name, [], first_line(error))
    return FoundVersions(redact_text(where), name, versions)
