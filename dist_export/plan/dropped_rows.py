"""List dropped rows, with the reason for each, and summarize them for the account of rows. Data and pure functions.

Each dropped row is listed by part, row, id and reason. From this list follow the counts by target that the layout leaves
out, the sums that the check before the commit compares, and the row numbers that a gather skips.
Pruned rows (``plan/prune.py``) may be most of a table. The census counts them, and nothing lists them.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal, NamedTuple

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.config import prune_rules
from dist_export.formats.recis import hash_slots, mix
from dist_export.plan.census import Census, PrunedRows, leave_out
from dist_export.plan.prune import Pruning
from dist_export.plan.target_slices import Targets

DUPLICATE = "duplicate"
"""Another row of the same id is kept."""

REASONS = (DUPLICATE,)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class DroppedRows:
    """Rows that are not exported, with all their slots. Parallel columns, ordered by part and row, each row once."""

    part: np.ndarray
    """int64."""
    row: np.ndarray
    """int64: counted within the part."""
    id: np.ndarray
    """int64."""
    reason: np.ndarray
    """uint8: an index into ``REASONS``."""

    def __len__(self) -> int:
        return len(self.part)

    def rows_in(self, part: int, first_row: int, num_rows: int) -> np.ndarray:
        """Return the dropped rows among ``num_rows`` rows from ``first_row`` on (int64, sorted, relative to ``first_row``)."""
        first, last = np.searchsorted(self.part, [part, part + 1])
        rows = self.row[first:last]
        begin, end = np.searchsorted(rows, [first_row, first_row + num_rows])
        found: np.ndarray = rows[begin:end] - first_row
        return found


class DroppedAccount(NamedTuple):
    """The dropped and pruned rows of one table, as its account of rows states them."""

    rows_by_reason: dict[str, int]
    """Without reasons that dropped none."""
    misplaced: int
    """The misplaced rows among them, without those that a delta leaves to its base: there they are in the right slice."""
    id_sum: int
    """Sum of their mixed ids modulo 2**64."""

    @property
    def rows(self) -> int:
        """The number of these rows."""
        return sum(self.rows_by_reason.values())


def drop_nothing() -> DroppedRows:
    """Return an empty list of dropped rows."""
    none = np.zeros(0, np.int64)
    return DroppedRows(part=none, row=none, id=none, reason=none.astype(np.uint8))


def drop_duplicates(checkpoint: Checkpoint, found: np.ndarray, *, keep: Literal["first", "last"]) -> DroppedRows:
    """Keep one row of each id and drop the others.

    Args:
        found: int64 (3, n): part, row within the part, and id of all rows whose id is a duplicate.
        keep: which row of an id is kept: the first or the last in the order of ``Parts``, which is by slice, then by row.
    """
    part, row, ids = found
    table = checkpoint.parts.table[part]
    order = np.lexsort((row, part, ids, table))
    is_same = (ids[order[1:]] == ids[order[:-1]]) & (table[order[1:]] == table[order[:-1]])
    surplus = order[1:][is_same] if keep == "first" else order[:-1][is_same]
    chosen = surplus[np.lexsort((row[surplus], part[surplus]))]
    reason = np.full(len(chosen), REASONS.index(DUPLICATE), np.uint8)
    return DroppedRows(part=part[chosen], row=row[chosen], id=ids[chosen], reason=reason)


def count_kept(checkpoint: Checkpoint, targets: tuple[Targets, ...], census: Census, dropped: DroppedRows) -> Census:
    """Return the census without the dropped rows: the rows that go to each target from each part and granule."""
    if not len(dropped):
        return census
    owners = np.zeros(len(dropped), np.int64)
    for table, target in enumerate(targets):
        mine = _slice_of(checkpoint, dropped, table)
        owners[mine] = _owners_of(checkpoint, target, dropped.part[mine], dropped.id[mine])
    where = checkpoint.directory.url
    return leave_out(census, part=dropped.part, row=dropped.row, target=owners, where=where)


def account_for(
    checkpoint: Checkpoint,
    dropped: DroppedRows,
    table: int,
    *,
    pruned: PrunedRows | None,
    pruning: Pruning | None,
) -> DroppedAccount:
    """Return the account of the dropped and pruned rows of one table.

    ``pruned`` covers all parts. If it is given, ``pruning`` must hold the rules that it counts.
    """
    mine = _slice_of(checkpoint, dropped, table)
    part, ids = dropped.part[mine], dropped.id[mine]
    counts = np.bincount(dropped.reason[mine], minlength=len(REASONS)).tolist()
    account = DroppedAccount(
        rows_by_reason={reason: rows for reason, rows in zip(REASONS, counts, strict=True) if rows},
        misplaced=int(np.count_nonzero(~_is_inside(checkpoint, part, ids))),
        id_sum=int(mix(ids).sum(dtype=np.uint64)),
    )
    if pruned is None:
        return account
    assert pruning is not None
    its = checkpoint.parts.of_table(table)
    rows = dict.fromkeys(prune_rules.REASONS, 0)
    rules = pruning.rules[table]  # ``pruned`` has more columns if another table has more rules
    for rule, count in zip(rules, pruned.rows[its].sum(axis=0)[: len(rules)].tolist(), strict=True):
        rows[rule.reason] += count
    by_rule = pruned.misplaced[its].sum(axis=0)[: len(rules)].tolist()
    misplaced = (count for rule, count in zip(rules, by_rule, strict=True) if rule.reason != prune_rules.SAME)
    return DroppedAccount(
        rows_by_reason=account.rows_by_reason | {reason: count for reason, count in rows.items() if count},
        misplaced=account.misplaced + sum(misplaced),
        id_sum=(account.id_sum + int(pruned.id_sum[its].sum(dtype=np.uint64))) % (1 << 64),
    )


def _slice_of(checkpoint: Checkpoint, dropped: DroppedRows, table: int) -> slice:
    parts = checkpoint.parts.of_table(table)
    first, last = np.searchsorted(dropped.part, [parts.start, parts.stop]).tolist()
    return slice(first, last)


def _is_inside(checkpoint: Checkpoint, part: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return whether each row of one table is in the slice of its part (bool)."""
    if not len(part):
        return np.zeros(0, bool)
    parts = checkpoint.parts
    positions = hash_slots(ids, int(parts.size[part[0]])).view(np.int64)
    inside: np.ndarray = (positions >= parts.begin[part]) & (positions < parts.end[part])
    return inside


def _owners_of(checkpoint: Checkpoint, target: Targets, part: np.ndarray, ids: np.ndarray) -> np.ndarray:
    """Return the target (int64) of each row of one table, by the same rule as the census."""
    owners = target.owners_of(hash_slots(ids, target.size), own=None).astype(np.int64)
    if not target.has_overlap:
        return owners
    numbers, place = np.unique(part, return_inverse=True)
    claimed = [target.index_of(checkpoint.parts.slice_of(number)) for number in numbers.tolist()]
    own = np.array([-1 if number is None else number for number in claimed], np.int64)[place]
    return np.where((own >= 0) & _is_inside(checkpoint, part, ids), own, owners)
