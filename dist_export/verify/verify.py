"""Check a package against its manifest and itself, or a directory that RecIS wrote against itself.

First, rank 0 reads and compares names, sizes, manifests and headers. Then all ranks read the payload, shared by bytes:
digests, ids, and values if ``finite`` is set. Rank 0 joins the results and runs the dense program. Every finding is one
line, and none is an exception. Later checks skip files that an earlier check could not read.
"""

from __future__ import annotations

import os
from typing import Any, TypeAlias

import numpy as np

from dist_export.errors import EndedError, UserError
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.package.reader import Package
from dist_export.redact import reason_of
from dist_export.runtime.joining import alone
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import keep_freed_memory, run_threads
from dist_export.storage.directory import Directory, Location
from dist_export.storage.urls import open_directory
from dist_export.verify.combine import conclude
from dist_export.verify.delta import PieceCount, count_pieces, cut_pieces, report_delta
from dist_export.verify.files import ChunkDigests, compare_digests, cut_files, hash_share
from dist_export.verify.finite import Odd, add_odd, cut_values, scan_share
from dist_export.verify.ids import (
    Duplicates,
    IdCounts,
    UniqueTask,
    add_counts,
    add_duplicates,
    count_share,
    cut_ids,
    plan_unique,
    proven_tables,
    search,
)
from dist_export.verify.metadata_checks import CHANGED, Survey
from dist_export.verify.report import Report
from dist_export.verify.row_fingerprints import (
    WrongRows,
    compare_fingerprints,
    cut_fingerprints,
    report_fingerprints,
)
from dist_export.verify.row_indexes import IndexCount, count_indexes, cut_indexes, report_indexes
from dist_export.verify.work_split import DEFAULT_MEMORY, Bounds, Work, share_out

_DEFAULT_THREADS = 4


def verify(
    path: str,
    storage_options: dict[str, Any] | None = None,
    *,
    finite: bool = False,
    max_memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    ranks: Ranks | None = None,
    base: str | None = None,
    tuning: Tuning = STANDARD,
) -> Report:
    """Check the directory at ``path``. All ranks of ``ranks`` call this, and each returns the whole report.

    Args:
        path: the directory, or its fsspec URL.
        storage_options: options for its file system.
        finite: whether to read all float values too, to find NaN and infinities.
        max_memory: bytes that a rank may hold in addition to the metadata, which take about 1 kB a block.
        threads: threads of each rank; by default the number of cores for each rank, at most 4.
        ranks: the ranks that share the work; by default only this process.
        base: the directory of the base of a delta package, or its fsspec URL. By default it is searched for.
        tuning: the sizes of pieces.

    Raises:
        UserError: the directory is missing or holds nothing that can be checked, a setting is impossible, or the package
            was replaced or changed in between.
        StepFailedError: the same, on several ranks.
    """
    ranks = alone() if ranks is None else ranks
    directory = open_directory(path, storage_options)
    bounds = Bounds(max_memory, _choose_threads() if threads is None else threads, tuning)
    given = None if base is None else open_directory(base, storage_options)
    survey = Survey(directory, finite=finite, base=given, json_bytes=tuning.json_bytes)
    work = ranks.broadcast("read the manifests", survey.take)
    if work is None:
        return ranks.broadcast("report", lambda: survey.report)
    keep_freed_memory()
    num_shares = ranks.world_size * bounds.threads
    mine = slice(ranks.rank * bounds.threads, (ranks.rank + 1) * bounds.threads)
    outcomes = ranks.all_gather("read the files", lambda: _read_shares(directory, work, bounds, num_shares, mine))
    found = [outcome for by_thread in outcomes for outcome in by_thread]
    counts = add_counts(work, [ids for _, ids, *_ in found])
    is_proven = proven_tables(work, counts)
    tasks = [] if counts.errors else plan_unique(work, is_proven, held_ids=bounds.held_ids)
    dealt = [tasks[number::num_shares] for number in range(num_shares)][mine]

    def look(share: list[UniqueTask]) -> list[Duplicates]:
        try:
            return search(directory, work, share, held_ids=bounds.held_ids, run_rows=tuning.run_rows)
        except (EndedError, OSError) as error:  # the same files were readable before, so they changed
            raise UserError(f"{survey.directory.url}: {CHANGED} ({reason_of(error)}); run verify again") from error

    searched = ranks.all_gather("search for ids that stand twice", lambda: run_threads(look, dealt))
    duplicates = [repeat for repeat in counts.duplicates if is_proven[repeat.table]]
    duplicates = add_duplicates(duplicates + [repeat for by_thread in searched for its in by_thread for repeat in its])

    compared = _compare_with_base(ranks, survey, bounds)

    def finish() -> Report:
        if survey.manifest is not None:
            compare_digests(work, [chunk for chunks, *_ in found for chunk in chunks], survey.report)
        conclude(survey, counts, duplicates, add_odd([odd for _, _, odd, *_ in found]))
        report_indexes(work, [count for _, _, _, its, _ in found for count in its], survey.report)
        report_fingerprints(work, [wrong for *_, its in found for wrong in its], survey.report)
        if compared is not None and survey.package is not None:
            report_delta(survey.package, compared, survey.report)
        survey.refuse_replaced()
        return survey.report

    return ranks.broadcast("put the findings together", finish)


def _compare_with_base(ranks: Ranks, survey: Survey, bounds: Bounds) -> list[PieceCount] | None:
    """Look the ids of a delta package up in its base; None without one that can be read. All ranks."""

    def find() -> tuple[Location, Location] | None:
        package = survey.package
        if package is None or package.base is None or survey.report.count():
            return None
        return package.directory.location, package.base.directory.location

    where = ranks.broadcast("find the base", find)
    if where is None:
        return None

    def count() -> list[PieceCount]:
        package = survey.package
        if package is None:  # on ranks other than 0
            opened, base = (open_directory(its.given, its.storage_options) for its in where)
            package = Package(opened, base_directory=base)
        pieces = cut_pieces(package, piece_ids=bounds.tuning.compared_ids)
        sizes = np.array([piece.num_ids for piece in pieces], np.int64)
        shares = share_out(sizes, ranks.world_size * bounds.threads)
        mine = shares[ranks.rank * bounds.threads : (ranks.rank + 1) * bounds.threads]
        return [one for its in run_threads(lambda share: count_pieces(package, pieces[share]), mine) for one in its]

    return [one for its in ranks.all_gather("compare with the base", count) for one in its]


_Read: TypeAlias = tuple[list[ChunkDigests], IdCounts, list[Odd], list[IndexCount], list[WrongRows]]


def _read_shares(directory: Directory, work: Work, bounds: Bounds, num_shares: int, mine: slice) -> list[_Read]:
    """Read this rank's shares of the files, one a thread."""
    tuning = bounds.tuning

    def read(share: tuple[slice, ...]) -> _Read:
        files, ids, values, indexes, fingerprints = share
        return (
            hash_share(directory, work, files, chunk_bytes=tuning.chunk_bytes),
            count_share(directory, work, ids, held_ids=bounds.held_ids, tuning=tuning),
            scan_share(directory, work, values, tuning=tuning),
            count_indexes(directory, work, indexes),
            compare_fingerprints(directory, work, fingerprints, tuning=tuning),
        )

    indexed, fingerprinted = cut_indexes(work)[2], cut_fingerprints(work, tuning.verified_fingerprints)[3]
    files = cut_files(work, chunk_bytes=tuning.chunk_bytes)[2]
    ids = cut_ids(work, bounds.held_ids, tuning.verified_ids)[2]
    values = cut_values(work, tuning.value_bytes)[2]
    shares = [share_out(column, num_shares)[mine] for column in (files, ids, values, indexed, fingerprinted)]
    return run_threads(read, list(zip(*shares, strict=True)))


def _choose_threads() -> int:
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_DEFAULT_THREADS, len(os.sched_getaffinity(0)) // max(ranks_here, 1)))
