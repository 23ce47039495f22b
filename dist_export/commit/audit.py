"""Read the written files back, and compare them with the plan and the source."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np

from dist_export.commit.row_indexes import RowIndexWriter, WrittenIndex
from dist_export.errors import CommitError
from dist_export.formats.recis import Slice, is_in_slice
from dist_export.formats.tuning import STANDARD
from dist_export.ids.columns import IdRun, Readers, read_runs
from dist_export.kernels.selection import select_kernels
from dist_export.manifest import TableEntry
from dist_export.plan.census import Census
from dist_export.plan.dropped_rows import account_for
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import Directory
from dist_export.storage.range_reader import OpenReaders
from dist_export.workdir.presence import refusal_of


class TableAccount(NamedTuple):
    """The rows and ids of one table in the written files."""

    rows: int
    id_sum: int
    """Sum of the mixed ids, modulo 2**64."""


OpenIndexes = Callable[[Readers], RowIndexWriter]
"""Returns what writes the row indexes of the shards that are read."""


class Audit(NamedTuple):
    """What was found in some output files."""

    accounts: dict[int, TableAccount]
    """By table."""
    indexes: list[WrittenIndex]
    """The row indexes that were written for these files."""


def audit_files(
    plan: SparsePlan,
    target: Directory,
    numbers: range,
    open_indexes: OpenIndexes | None = None,
    *,
    run_rows: int = STANDARD.run_rows,
) -> Audit:
    """Read back headers and id columns of these output files, and return rows and ids by table.

    Any rank, for its share of the files. No collective. With ``open_indexes``, the row indexes are written from the ids.

    Raises:
        CommitError: the size or header of a file is not the planned one, or an id is outside the slice of its shard.
    """
    mine = np.array(numbers, np.int64)
    with (
        OpenReaders(lambda number: target.open_reader(plan.files[number].name)) as readers,
        contextlib.nullcontext() if open_indexes is None else contextlib.closing(open_indexes(readers)) as indexes,
    ):
        for number in numbers:
            file = plan.files[number]
            where = target.describe(file.name)
            try:
                size = target.stat(file.name).size
            except FileNotFoundError:
                raise refusal_of(target, file.name, "is gone") from None
            if size != file.num_bytes:
                raise CommitError(f"{where}: {size:,} bytes on disk, {file.num_bytes:,} planned. {_NOTHING_PUBLISHED}")
            header = bytearray(len(file.header))
            readers[number].read_into(memoryview(header), 0)
            if bytes(header) != file.header:
                raise CommitError(f"{where}: the header on disk is not the planned one. {_NOTHING_PUBLISHED}")
            if indexes is not None:
                indexes.begin(number)
        blocks = plan.blocks
        chosen = np.flatnonzero((blocks.column == 0) & np.isin(blocks.file, mine))
        rows_of_table = np.zeros(len(plan.checkpoint.tables), np.int64)
        sum_of_table = np.zeros(len(plan.checkpoint.tables), np.uint64)
        columns = blocks.file[chosen], blocks.offset[chosen], blocks.rows[chosen]
        for run in read_runs(readers, *columns, run_rows=run_rows):
            held = chosen[run.blocks]
            id_sums = _check_slices(plan, target, held, run)
            if indexes is not None:
                indexes.add(held, run)
            tables = blocks.table[held]
            np.add.at(rows_of_table, tables, np.diff(np.append(run.starts, len(run.ids))))
            np.add.at(sum_of_table, tables, id_sums)
        # for a table without ids, the headers give the rows, and digests protect the content of the blocks
        first_column = np.array(
            [plan.slots_of(table)[0].column for table in range(len(plan.checkpoint.tables))], np.int64
        )
        row_indexed = np.flatnonzero((first_column[blocks.table] > 0) & np.isin(blocks.file, mine))
        row_indexed = row_indexed[blocks.column[row_indexed] == first_column[blocks.table[row_indexed]]]
        np.add.at(rows_of_table, blocks.table[row_indexed], blocks.rows[row_indexed])
        present = np.unique(blocks.table[np.concatenate([chosen, row_indexed])]).tolist()
        accounts = {table: TableAccount(int(rows_of_table[table]), int(sum_of_table[table])) for table in present}
        return Audit(accounts, [] if indexes is None else indexes.finish())


def _check_slices(plan: SparsePlan, target: Directory, held: np.ndarray, run: IdRun) -> np.ndarray:
    """Return the sum of the mixed ids of each block (uint64). CommitError if an id is outside the slice of its block."""
    blocks = plan.blocks
    sums = np.zeros(len(held), np.uint64)
    lengths = np.diff(np.append(run.starts, len(run.ids)))
    for size in np.unique(blocks.size[held]).tolist():  # usually one size
        sweep = select_kernels().sweep_ids(
            run.ids, run.starts, size=size, begins=blocks.begin[held], ends=blocks.end[held]
        )
        sums = sweep.id_sums
        wrong = np.flatnonzero((sweep.outside > 0) & (blocks.size[held] == size))
        if len(wrong):
            block = int(held[wrong[0]])
            part = Slice(*(int(column[block]) for column in (blocks.begin, blocks.end, blocks.size)))
            start = int(run.starts[wrong[0]])
            ids = run.ids[start : start + int(lengths[wrong[0]])]
            foreign = np.flatnonzero(~is_in_slice(ids, part))
            raise CommitError(
                f"{target.describe(plan.files[int(blocks.file[block])].name)}: {blocks.key[block]!r} holds "
                f"{len(foreign):,} ids outside its slice {part.begin}:{part.end}, first {int(ids[foreign[0]])}. "
                f"{_NOTHING_PUBLISHED}"
            )
    return sums


def check_accounts(plan: SparsePlan, census: Census, shares: list[dict[int, TableAccount]]) -> list[TableAccount]:
    """Compare the rows and ids of all ranks' files with those of the source, and return the totals by table.

    The expected rows are those of the source without dropped and pruned rows.

    Raises:
        CommitError: the number of rows differs, or the ids differ.
    """
    totals = []
    for table, meta in enumerate(plan.checkpoint.tables):
        parts = plan.checkpoint.parts.of_table(table)
        dropped = account_for(plan.checkpoint, plan.dropped, table, pruned=census.pruned, pruning=plan.pruning)
        expected = TableAccount(
            int(plan.checkpoint.parts.rows[parts].sum()) - dropped.rows,
            _add(int(census.id_sum[parts].sum(dtype=np.uint64)), -dropped.id_sum),
        )
        found = TableAccount(0, 0)
        for share in shares:
            if table in share:
                found = TableAccount(found.rows + share[table].rows, _add(found.id_sum, share[table].id_sum))
        if found != expected:
            raise CommitError(
                f"table {meta.name!r}: the shards hold {found.rows:,} rows of {expected.rows:,}"
                + ("" if found.rows != expected.rows else ", but their ids are not those of the source")
                + f". {_NOTHING_PUBLISHED}"
            )
        totals.append(found)
    return totals


def check_entries(entries: Sequence[TableEntry]) -> None:
    """Check that rows in, out, dropped by reason, and by part add up in each table's entry. Raises CommitError if not.

    This checks the entries that are published, after everything that made them.
    """
    for entry in entries:
        dropped = sum(entry.rows_dropped.values())
        by_part = sum(part.rows for part in entry.parts)
        if entry.rows_in != entry.rows_out + dropped or by_part != entry.rows_out:
            raise CommitError(
                f"table {entry.name!r}: the account does not add up: {entry.rows_in:,} rows in, {entry.rows_out:,} out "
                f"({by_part:,} by part), {dropped:,} dropped. {_NOTHING_PUBLISHED}"
            )


_NOTHING_PUBLISHED = "No manifest was written, so there is no package; run the export again"


def _add(left: int, right: int) -> int:
    return (left + right) % (1 << 64)
