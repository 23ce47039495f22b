"""Evaluate the rules of ``prune`` on rows of the source, for the census, for gathers and for single rows."""

from __future__ import annotations

from collections.abc import Callable

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.row_reader import RowReader
from dist_export.formats.tuning import STANDARD
from dist_export.plan.prune import KEPT, Pruning, match_rules

IsPruned = Callable[[int, np.ndarray, np.ndarray], np.ndarray]
"""(part, rows within the part, their ids) -> which of the rows are pruned (bool)."""


class PruneReader:
    """Evaluates rules, and reads only the slots that they use. One for each thread, with a separate reader."""

    def __init__(
        self, checkpoint: Checkpoint, pruning: Pruning, reader: RowReader, *, piece_bytes: int = STANDARD.rule_bytes
    ) -> None:
        self._piece_bytes = piece_bytes
        self._checkpoint = checkpoint
        self._pruning = pruning
        self._reader = reader
        self.has_rules = np.array([bool(rules) for rules in pruning.rules], bool)
        """Whether a table has rules, by table."""

    def rules(self, part: int, first_row: int, ids: np.ndarray) -> np.ndarray:
        """Return which rule prunes each row from ``first_row`` on (uint16), with the codes of ``plan.prune.match_rules``.

        ``ids`` (int64) are the ids of the rows.
        """
        table = int(self._checkpoint.parts.table[part])
        slots = [self._checkpoint.tables[table].slots[column] for column in self._pruning.columns_of(table)]
        step = max(1, self._piece_bytes // max([1, *(slot.row_bytes for slot in slots)])) if slots else len(ids)
        found = np.empty(len(ids), np.uint16)
        for first in range(0, len(ids), step):
            its = ids[first : first + step]
            rows = {}
            for slot in slots:
                rows[slot.column] = np.empty(len(its) * slot.row_bytes, np.uint8)
                if slot.row_bytes:
                    self._reader.read_into(rows[slot.column], part, slot.column, first_row + first, len(its))
            found[first : first + step] = match_rules(self._pruning.rules[table], its, rows)
        if self._pruning.same is not None:
            is_same = self._pruning.same.find(part, first_row, ids, found == KEPT, self._reader)
            found[is_same] = len(self._pruning.rules[table])  # the code of the last rule
        return found

    def is_pruned(self, part: int, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        """Return which rows of a part are pruned (bool). Rows are read one by one.

        ``rows`` (int64) are row numbers within the part, and ``ids`` (int64) are the ids of these rows.
        """
        if not self.has_rules[self._checkpoint.parts.table[part]]:
            return np.zeros(len(rows), bool)
        codes = [
            self.rules(part, row, ids[place : place + 1])[0] for place, row in enumerate(np.asarray(rows).tolist())
        ]
        found: np.ndarray = np.array(codes, np.uint16) != KEPT
        return found


def find_pruned(checkpoint: Checkpoint, pruning: Pruning | None) -> IsPruned | None:
    """Return a function that tells whether single rows are pruned; None if there are no rules. Any thread may call it."""
    if not pruning:
        return None
    rules = pruning

    def is_pruned(part: int, rows: np.ndarray, ids: np.ndarray) -> np.ndarray:
        with RowReader(checkpoint) as reader:
            return PruneReader(checkpoint, rules, reader).is_pruned(part, rows, ids)

    return is_pruned
