"""Whether a package that is the source is still what was written: an export from it must not hand damage on as sound.

The files of the tables are read once and compared with the digests in the source's manifest, before anything is written. The
rows and ids of each table are compared after the ids were counted; that is all that tells of shards without a digest.
"""

from __future__ import annotations

from collections.abc import Sequence

import msgspec
import numpy as np

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.package_source import find_manifest
from dist_export.errors import CheckpointError
from dist_export.formats.digests import NONE, algorithm_of, missing_package
from dist_export.formats.recis import INDEX, MERGED, TENSORKEY
from dist_export.humanize import count
from dist_export.manifest import MANIFEST, FileEntry, Manifest, decode_manifest
from dist_export.pipeline.planning import count_threads
from dist_export.pipeline.state import ExportState
from dist_export.plan.census import Census
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import run_threads
from dist_export.storage.directory import Directory
from dist_export.verify.files import (
    ChunkDigests,
    check_sizes,
    compare_digests,
    cut_files,
    find_parts,
    hash_share,
)
from dist_export.verify.listing import Listing
from dist_export.verify.report import Report
from dist_export.verify.work_split import Work, share_out

_CHUNKS_AT_ONCE = 8
"""Chunks (of 64 MiB) that a thread hashes before it looks whether the export was asked to stop."""
_WHAT_TO_DO = "`verify` tells more. Copy the package again, or export from the checkpoint that it was made of"
_IN_PLACE = (
    "`verify` tells more. Take another checkpoint; or, if a trainer has saved here after the manifest was written, remove "
    f"{MANIFEST}, which is of the files that were here before"
)


def compare_source_package(export: ExportState) -> ExportState:
    """Compare a source that is a package with the digests in its manifest. All ranks share the bytes; nothing is written.

    With ``digest: none`` no file is read, and a note says so. An export in place is not compared: it adds nothing of its own.

    Raises:
        CheckpointError: a file is not what was written, or the package for its digests is missing.
    """
    task, directory = export.task, export.paths.source
    if directory is None or export.in_place or not export.source.has_manifest or not task.config.need_export_sparse:
        return export
    if task.config.digest == NONE:
        manifest = task.ranks.broadcast("look for a package", lambda: _find(directory, export.source.checkpoint))
        skipped = f"{directory.url} is a package, and with digest: none its files were not compared with its manifest"
        return export if manifest is None else export.grown(notes=[f"{skipped}; `verify` does that"])
    checkpoint = export.source.checkpoint
    work = task.ranks.broadcast("look for a package", lambda: _find_work(directory, checkpoint))
    if work is None:
        return export
    with task.reporter.stage("compare"):
        compare_files(task.ranks, directory, work, threads=count_threads(task.config.threads))
    return export.grown(notes=note_without_digest(directory, work))


def compare_files(ranks: Ranks, directory: Directory, work: Work, *, threads: int) -> None:
    """Compare the files of ``work`` with their digests. All ranks, each reads its share of the bytes. CheckpointError."""
    found = _hash(ranks, directory, work, threads=threads)
    ranks.broadcast("compare the package with its manifest", lambda: _judge(directory, work, found))


def note_without_digest(directory: Directory, work: Work) -> list[str]:
    """Return a note on shards that have no digest; nothing if all have one."""
    without = [path for path, _, digest in work.digest_files if not digest]
    if not without:
        return []
    told = f"{count(len(without), 'shard')} without a digest: of its rows only the number and the ids were compared"
    return [f"{directory.url} is a package with {told}"]


def compare_source_ids(export: ExportState) -> ExportState:
    """Compare the rows and ids of a source that is a package with the account in its manifest. All ranks; reads nothing.

    Raises:
        CheckpointError: they are not those that were written.
    """
    directory, planned = export.paths.source, export.planned
    if directory is None or export.in_place or not export.source.has_manifest or planned is None:
        return export

    def look() -> None:
        checkpoint = planned.plan.checkpoint
        manifest = _find(directory, checkpoint)
        if manifest is not None:
            refuse_other_ids(checkpoint, planned.census, manifest)

    export.task.ranks.broadcast("compare the ids with the package's manifest", look)
    return export


def refuse_other_ids(checkpoint: Checkpoint, census: Census, manifest: Manifest) -> None:
    """Compare the rows and ids of each table that is exported with the account of the source's manifest. CheckpointError.

    ``census`` has the ids of all rows of the source, also of those that are left behind.
    """
    entries = {table.name: table for table in manifest.tables}
    advice = _advise(manifest)
    for number, table in enumerate(checkpoint.tables):
        entry = entries.get(table.name_in_source)
        if entry is None:
            continue
        where = f"{checkpoint.directory.url}: table {table.name_in_source!r}"
        parts = checkpoint.parts.of_table(number)
        rows = int(checkpoint.parts.rows[parts].sum())
        if rows != entry.rows_out:
            raise CheckpointError(
                f"{where} has {rows:,} rows, and the package's manifest.json says {entry.rows_out:,}; {advice}"
            )
        id_sum = f"{int(census.id_sum[parts].sum(dtype=np.uint64)):016x}"
        if not entry.is_row_indexed and id_sum != entry.id_sum:
            raise CheckpointError(
                f"{where} has other ids than were written (sum {id_sum}, and the package's manifest.json says "
                f"{entry.id_sum}); {advice}"
            )


def _advise(manifest: Manifest) -> str:
    return _IN_PLACE if manifest.mode == "in_place" else _WHAT_TO_DO


def _find(directory: Directory, checkpoint: Checkpoint | None) -> Manifest | None:
    """Return the manifest of the source if its tables are read from the files that it names; else None. Rank 0."""
    manifest = find_manifest(directory)
    if manifest is None or checkpoint is None:
        return None
    # a copy has files with dense tensors alone, too
    known = {file.path for file in manifest.files}
    return manifest if known.issuperset(file.name for file in checkpoint.files) else None


def _find_work(directory: Directory, checkpoint: Checkpoint | None) -> Work | None:
    """Return the files to hash, those that an export of the tables reads; None where the source is no package. Rank 0."""
    manifest = _find(directory, checkpoint)
    if manifest is None or checkpoint is None:
        return None
    needed = {part.file for table in manifest.tables for part in table.parts} | {INDEX, TENSORKEY, MERGED}
    needed |= {file.name for file in checkpoint.files}
    return list_work(directory, manifest, tuple(file for file in manifest.files if file.path in needed))


def list_work(directory: Directory, manifest: Manifest, files: tuple[FileEntry, ...]) -> Work:
    """Return what is to be hashed of these files of a package. Rank 0. CheckpointError if one is missing or has another size."""
    report = Report()
    known = msgspec.structs.replace(manifest, files=files)
    to_hash, _ = check_sizes(directory, known, Listing((), {}), report)
    _refuse(directory, report, manifest)
    for path, _, digest in to_hash:
        package = missing_package(algorithm_of(digest))
        if package is not None:
            raise CheckpointError(
                f"{directory.describe(path)} has a digest by {algorithm_of(digest)}, which cannot be compared: pip install "
                f"{package}, or set digest: none, which exports without a comparison"
            )
    return Work(digest_files=to_hash, digest_parts=find_parts(known, to_hash))


def _hash(ranks: Ranks, directory: Directory, work: Work, *, threads: int) -> list[ChunkDigests]:
    """Return the digests of all chunks of the files. All ranks, each its share of the bytes."""
    mine = slice(ranks.rank * threads, (ranks.rank + 1) * threads)
    shares = share_out(cut_files(work)[2], ranks.world_size * threads)[mine]

    def read(share: slice) -> list[ChunkDigests]:
        found: list[ChunkDigests] = []
        for first in range(share.start, share.stop, _CHUNKS_AT_ONCE):
            ranks.refuse_to_go_on()
            found += hash_share(directory, work, slice(first, min(first + _CHUNKS_AT_ONCE, share.stop)))
        return found

    outcomes = ranks.all_gather("read the package", lambda: run_threads(read, shares))
    return [chunks for by_thread in outcomes for its in by_thread for chunks in its]


def _judge(directory: Directory, work: Work, found: Sequence[ChunkDigests]) -> None:
    report = Report()
    compare_digests(work, list(found), report)
    if report.found:
        _refuse(directory, report, decode_manifest(directory.read_text(MANIFEST), where=directory.describe(MANIFEST)))


def _refuse(directory: Directory, report: Report, manifest: Manifest) -> None:
    """Raise CheckpointError for the first finding, if there is one."""
    if not report.found:
        return
    first = report.found[0]
    more = f" ({count(len(report.found) - 1, 'more file')} too)" if len(report.found) > 1 else ""
    raise CheckpointError(
        f"{directory.describe(first.file)}: {first.message}{more}. The package is damaged, and nothing was written; "
        f"{_advise(manifest)}"
    )
