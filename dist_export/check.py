"""Compare what was written with what was planned and with the source, from the written files themselves."""

from __future__ import annotations

from typing import NamedTuple

import numpy as np

from dist_export.errors import CommitError
from dist_export.layout.recis import Slice, is_in_slice, mix
from dist_export.plan.census import Census
from dist_export.plan.shards import SparsePlan
from dist_export.storage import Directory

_RUN_ROWS = 1 << 20


class TableAccount(NamedTuple):
    """What the written files hold of one table."""

    rows: int
    id_sum: int
    """Sum of the mixed ids modulo 2**64."""


def audit_files(plan: SparsePlan, target: Directory, numbers: range) -> dict[int, TableAccount]:
    """Read back headers and id columns of these output files; return rows and ids by table.

    Any rank, for its share; no collective.

    Raises:
        CommitError: a file's size or header is not the planned one, or an id lies outside the slice of its shard.
    """
    accounts: dict[int, TableAccount] = {}
    id_blocks = np.flatnonzero(plan.blocks.column == 0)
    for number in numbers:
        file = plan.files[number]
        where = target.describe(file.name)
        size = target.stat(file.name).size
        if size != file.num_bytes:
            raise CommitError(f"{where}: {size:,} bytes on disk, {file.num_bytes:,} planned. {_NOTHING_PUBLISHED}")
        with target.open_reader(file.name) as reader:
            header = bytearray(len(file.header))
            reader.read_into(memoryview(header), 0)
            if bytes(header) != file.header:
                raise CommitError(f"{where}: the header on disk is not the planned one. {_NOTHING_PUBLISHED}")
            for block in id_blocks[plan.blocks.file[id_blocks] == number].tolist():
                table = int(plan.blocks.table[block])
                part = Slice(*(int(c[block]) for c in (plan.blocks.begin, plan.blocks.end, plan.blocks.size)))
                total = accounts.get(table, TableAccount(0, 0))
                rows = int(plan.blocks.rows[block])
                for first in range(0, rows, _RUN_ROWS):
                    ids = np.empty(min(_RUN_ROWS, rows - first), np.int64)
                    reader.read_into(ids.data.cast("B"), int(plan.blocks.offset[block]) + first * 8)
                    strangers = np.flatnonzero(~is_in_slice(ids, part))
                    if len(strangers):
                        raise CommitError(
                            f"{where}: {plan.blocks.key[block]!r} holds {len(strangers):,} ids outside its slice "
                            f"{part.begin}:{part.end}, first {int(ids[strangers[0]])}. {_NOTHING_PUBLISHED}"
                        )
                    total = TableAccount(total.rows + len(ids), _add(total.id_sum, int(mix(ids).sum(dtype=np.uint64))))
                accounts[table] = total
    return accounts


def check_accounts(plan: SparsePlan, census: Census, shares: list[dict[int, TableAccount]]) -> list[TableAccount]:
    """Compare the rows and ids of all ranks' files with those of the source; return the totals by table.

    Raises:
        CommitError: a row is missing, there is one too many, or an id is another one.
    """
    totals = []
    for table, meta in enumerate(plan.checkpoint.tables):
        parts = plan.checkpoint.parts.of_table(table)
        expected = TableAccount(
            int(plan.checkpoint.parts.rows[parts].sum()), int(census.id_sum[parts].sum(dtype=np.uint64))
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


_NOTHING_PUBLISHED = "No manifest was written, so there is no package; run the export again"


def _add(left: int, right: int) -> int:
    return (left + right) % (1 << 64)
