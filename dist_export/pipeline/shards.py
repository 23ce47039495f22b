"""The shards of an export: written beside the trace, then read back and accounted for."""

from __future__ import annotations

import concurrent.futures
import contextlib
import logging
from collections.abc import Callable, Iterator
from typing import NamedTuple

from dist_export.commit.audit import Audit, audit_files, check_accounts, check_entries
from dist_export.commit.publish import describe_tables
from dist_export.commit.row_fingerprints import FingerprintWriter, add_fingerprints
from dist_export.commit.row_indexes import RowIndexWriter, WrittenIndex, add_row_indexes
from dist_export.errors import CommitError
from dist_export.ids.columns import Readers
from dist_export.manifest import FileEntry, TableEntry
from dist_export.pipeline.planning import PlannedSparse
from dist_export.reporting.progress import Reporter
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import return_freed_memory, run_threads
from dist_export.storage.directory import Directory
from dist_export.transfer.casting import Counts
from dist_export.transfer.executor import Transfer
from dist_export.transfer.work_done import Share
from dist_export.workdir.state import Receipt, withdraw_receipts

logger = logging.getLogger(__name__)

_HEARING_SECS = 0.2


def transfer(
    ranks: Ranks,
    planned: PlannedSparse,
    target: Directory,
    reporter: Reporter,
    *,
    beside: Callable[[], None],
    and_then: Callable[[], object],
    in_place: bool,
    digest: str,
    may_copy: bool,
) -> tuple[list[Receipt], list[Share], int, Counts]:
    """Write the shards in a thread while ``beside`` runs in this one. All ranks. ``and_then`` is called on rank 0."""
    job = Transfer(
        ranks,
        planned.plan,
        target,
        budget=planned.budget,
        digest=digest,
        in_place=in_place,
        may_copy=may_copy,
        count_bytes=reporter.count_bytes,
    )
    try:
        job.prepare()
        with (
            concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="transfer") as pool,
            reporter.transferring(job.reused_bytes + job.num_bytes, reused_bytes=job.reused_bytes),
        ):

            def wait(written: concurrent.futures.Future[None]) -> None:
                try:
                    beside()
                except BaseException:
                    ranks.announce_failure()
                    raise
                finally:
                    # Python hears a signal that comes right before an endless wait only when that ends
                    while concurrent.futures.wait([written], timeout=_HEARING_SECS).not_done:
                        pass
                written.result()

            try:
                written = pool.submit(job.write)
                receipts, shares = job.finish(lambda: wait(written), and_then)
            except BaseException:  # also Ctrl-C: the transfer thread and the other ranks stop at their next unit
                ranks.announce_failure()
                raise
        return receipts, shares, job.num_reused, job.casts
    finally:
        job.close()


class Checked(NamedTuple):
    """What the check of the shards gives, the same on all ranks."""

    tables: tuple[TableEntry, ...]
    """The tables' entries for the manifest."""
    indexes: list[WrittenIndex]
    """The files of row indexes, in the order of the shards."""
    fingerprints: list[FileEntry]
    """The files of row fingerprints, in the order of the shards."""


def check(
    ranks: Ranks,
    planned: PlannedSparse,
    target: Directory,
    *,
    row_index: bool,
    row_fingerprints: bool,
    digest: str,
    in_place: bool,
) -> Checked:
    """Account for every row from the written files, and write their row indexes and row fingerprints if set. All ranks."""
    plan, threads, tuning = planned.plan, planned.budget.threads, planned.budget.tuning
    workers = range(ranks.rank * threads, (ranks.rank + 1) * threads)
    mine = [range(worker, len(plan.files), ranks.world_size * threads) for worker in workers]

    def open_indexes(readers: Readers) -> RowIndexWriter:
        held_ids = planned.budget.held_ids // 2  # beside the list of dropped rows
        return RowIndexWriter(plan, target, readers, held_ids=held_ids, digest=digest, in_place=in_place, tuning=tuning)

    def audit_share(numbers: range) -> tuple[Audit, list[FileEntry]]:
        audited = audit_files(plan, target, numbers, open_indexes if row_index else None, run_rows=tuning.run_rows)
        if not row_fingerprints:
            return audited, []
        window_bytes = planned.budget.window_bytes
        writer = FingerprintWriter(
            plan, target, window_bytes=window_bytes, digest=digest, in_place=in_place, tuning=tuning
        )
        return audited, writer.write(numbers)

    def audit() -> list[tuple[Audit, list[FileEntry]]]:
        return_freed_memory()  # what the transfer has kept is not reused here
        with _withdrawing(target):
            return run_threads(audit_share, mine)

    found = [its for share in ranks.all_gather("check the shards", audit) for its in share]
    indexes = sorted((index for audited, _ in found for index in audited.indexes), key=lambda index: index.file.path)
    fingerprints = sorted((file for _, files in found for file in files), key=lambda file: file.path)

    def account() -> tuple[TableEntry, ...]:
        with _withdrawing(target):
            accounts = check_accounts(plan, planned.census, [audited.accounts for audited, _ in found])
            entries = add_row_indexes(describe_tables(plan, planned.census, accounts), indexes)
            entries = add_fingerprints(plan, entries) if row_fingerprints else entries
            check_entries(entries)
        return entries

    return Checked(ranks.check("account for the rows", account), indexes, fingerprints)


def compare_live(ranks: Ranks, planned: PlannedSparse, target: Directory) -> None:
    """Compare some rows of the model in memory with the written ones. All ranks. CommitError where one differs."""
    from dist_export.live.spot_check import compare_rows

    ranks.all_gather("compare rows with the model's", lambda: compare_rows(planned.plan, target))


@contextlib.contextmanager
def _withdrawing(target: Directory) -> Iterator[None]:
    """Withdraw what vouches for the shards where they turn out not to be what was planned."""
    try:
        yield
    except CommitError:
        try:
            withdraw_receipts(target)
        except OSError as error:  # what was found is what the user must hear of
            logger.warning("the receipts in %s could not be withdrawn: %s", target.url, error)
        raise
