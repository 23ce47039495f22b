"""Check a package against its manifest and itself, or a directory that RecIS wrote against itself.

The order: rank 0 reads names, sizes, manifests and headers and compares them. Then all ranks read payload, shared out by
bytes: digests, ids, and values where asked for. Rank 0 puts together what they found and calls the dense program. Every
finding is one line; none is an exception. What an earlier check could not read, later ones leave out.
"""

from __future__ import annotations

import os
from typing import Any

from dist_export.errors import EndedError, UserError
from dist_export.redact import reason_of
from dist_export.runtime.joining import alone
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import keep_freed_memory, run_threads
from dist_export.storage.urls import open_directory
from dist_export.verify.combine import conclude
from dist_export.verify.files import ChunkDigests, compare_digests, cut_files, hash_share
from dist_export.verify.finite import Odd, add_odd, cut_values, scan_share
from dist_export.verify.ids import (
    IdCounts,
    Repeats,
    UniqueTask,
    add_counts,
    add_repeats,
    count_share,
    cut_ids,
    plan_unique,
    proven_tables,
    search,
)
from dist_export.verify.metadata_checks import CHANGED, Survey
from dist_export.verify.report import Report
from dist_export.verify.work_split import DEFAULT_MEMORY, Bounds, share_out

_DEFAULT_THREADS = 4


def verify(
    path: str,
    storage_options: dict[str, Any] | None = None,
    *,
    finite: bool = False,
    max_memory: int = DEFAULT_MEMORY,
    threads: int | None = None,
    ranks: Ranks | None = None,
) -> Report:
    """Check the directory at ``path``. All ranks of ``ranks``; each returns the whole report.

    Args:
        finite: whether all float values are read too, to find NaN and infinities.
        max_memory: bytes that a rank may hold beside the metadata, which take about 1 kB a block.
        threads: of each rank; by default the cores that it has to itself, 4 at most.
        ranks: who shares the work; by default this process alone.

    Raises:
        UserError: there is no such directory, or nothing in it that could be checked; a setting that cannot be; a package
            that was replaced or changed meanwhile.
        StepFailedError: the same, on several ranks.
    """
    ranks = alone() if ranks is None else ranks
    directory = open_directory(path, storage_options)
    bounds = Bounds(max_memory, _choose_threads() if threads is None else threads)
    survey = Survey(directory, finite=finite)
    work = ranks.broadcast("read the manifests", survey.take)
    if work is None:
        return ranks.broadcast("report", lambda: survey.report)
    keep_freed_memory()
    num_shares = ranks.world_size * bounds.threads
    mine = slice(ranks.rank * bounds.threads, (ranks.rank + 1) * bounds.threads)
    shares = [
        share_out(column, num_shares)[mine]
        for column in (cut_files(work)[2], cut_ids(work, bounds.held_ids)[2], cut_values(work)[2])
    ]

    def read(share: tuple[slice, slice, slice]) -> tuple[list[ChunkDigests], IdCounts, list[Odd]]:
        files, ids, values = share
        return (
            hash_share(directory, work, files),
            count_share(directory, work, ids, held_ids=bounds.held_ids),
            scan_share(directory, work, values),
        )

    outcomes = ranks.all_gather("read the files", lambda: run_threads(read, list(zip(*shares, strict=True))))
    found = [outcome for by_thread in outcomes for outcome in by_thread]
    counts = add_counts(work, [ids for _, ids, _ in found])
    is_proven = proven_tables(work, counts)
    tasks = [] if counts.errors else plan_unique(work, is_proven, held_ids=bounds.held_ids)
    dealt = [tasks[number::num_shares] for number in range(num_shares)][mine]

    def look(share: list[UniqueTask]) -> list[Repeats]:
        try:
            return search(directory, work, share, held_ids=bounds.held_ids)
        except (EndedError, OSError) as error:  # all of it has been read once
            raise UserError(f"{survey.directory.url}: {CHANGED} ({reason_of(error)}); run verify again") from error

    searched = ranks.all_gather("search for ids that stand twice", lambda: run_threads(look, dealt))
    repeats = [repeat for repeat in counts.repeats if is_proven[repeat.table]]
    repeats = add_repeats(repeats + [repeat for by_thread in searched for its in by_thread for repeat in its])

    def finish() -> Report:
        if survey.manifest is not None:
            compare_digests(work, [chunk for chunks, _, _ in found for chunk in chunks], survey.report)
        conclude(survey, counts, repeats, add_odd([odd for _, _, odd in found]))
        survey.refuse_replaced()
        return survey.report

    return ranks.broadcast("put the findings together", finish)


def _choose_threads() -> int:
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_DEFAULT_THREADS, len(os.sched_getaffinity(0)) // max(ranks_here, 1)))
