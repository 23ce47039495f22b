"""What a batch looked up in the tables, and what it found there."""

from __future__ import annotations

import copy
from collections import Counter
from typing import NamedTuple

import numpy as np
import xxhash


class WholeTable(NamedTuple):
    """A table that the sparse arch reads otherwise than by ids, so that all of its rows were put into the model."""

    table: str
    """The model's name of it."""
    how: str
    """The operator that reads it."""
    num_rows: int
    """Of the model's table."""
    num_found: int
    digest: str
    """xxh3-128 over which of the rows are there, and these rows as they are written."""


class SampleRows:
    """The ids that a batch looked up, by table, and what it found."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        """Ids. Rows of a table that was read whole are none: nobody looked for one of them."""
        self.missing: Counter[str] = Counter()
        """Ids that the checkpoint has no row of; those that rules leave behind are counted apart."""
        self.left_behind: Counter[str] = Counter()
        self.left_to_model = 0
        """Of these, ids for which the model was left with what it has itself, for the default row was not put in."""
        self.without_default: set[str] = set()
        """Tables of which ids without a row were looked up, and no default row could be put in for them."""
        self.knows_a_table = False
        """Whether a table of the sparse arch, or a parameter that may be one, is a table of the checkpoint."""
        self.embeddings: list[str] = []
        """Paths within the model of all ``nn.Embedding`` and ``nn.EmbeddingBag`` of the sparse arch."""
        self.computed: dict[str, str] = {}
        """Of these, those whose weight is computed from other parameters -> by what."""
        self.unknown_tables: list[str] = []
        """Of these, those that are no table of the checkpoint."""
        self.sharded_tables: list[str] = []
        """Tables that rows cannot be put into, of a model that is exported from memory: it has used its own."""
        self.unseen: dict[str, str] = {}
        """Other tables of which the model has used its own rows -> why it could be given no others."""
        self.tables: set[str] = set()
        """Tables, by the model's names, whose rows can be put into a matrix or a module of the sparse arch."""
        self.reads: dict[str, np.ndarray] = {}
        """By the model's name of a table, the rows or ids (int64, sorted, unique) that were read; also when recording."""
        self.whole_reads: set[str] = set()
        """Tables, by the same names, of which an operator read all rows."""
        self.changed: dict[str, str] = {}
        """Tables into whose rows the sparse arch writes before it reads them -> by what."""
        self.unregistered: dict[str, str] = {}
        """Parameters that the sparse arch read and does not register: where they are -> class, dtype and shape."""
        self.hidden_tables: dict[str, str] = {}
        """Hash tables that the sparse arch read and does not register: where they are -> what a message calls them."""
        self.called: set[str] = set()
        """Hash tables, by their names in the package, that were asked for rows, be it for no id."""
        self.outside: dict[tuple[int, ...], str] = {}
        """Shapes of other floating-point tensors that were there before the call and are neither registered nor of the batch ->
        the operator that read one."""
        self.whole: dict[str, WholeTable] = {}
        """By the table's name in the checkpoint."""
        self.rows: dict[str, dict[int, str | None]] = {}
        """Table -> id -> xxh3-64 of its row in hexadecimal, None for an id that the table has not."""
        self.other_sizes: list[tuple[str, int, int]] = []
        """Tables by number that have another number of rows in the model: table, rows in the checkpoint, in the model."""

    @property
    def num_found(self) -> int:
        """How many rows came from the checkpoint, for ids or as a part of a whole table."""
        whole = sum(its.num_found for its in self.whole.values())
        return self.asked.total() - self.missing.total() - self.left_behind.total() + whole

    def note_reads(self, table: str, ids: np.ndarray) -> None:
        """Take in rows or ids (int64, sorted, without duplicates) that were read of a table."""
        before = self.reads.get(table)
        self.reads[table] = ids if before is None else np.union1d(before, ids)

    def without_digests(self) -> SampleRows:
        """Return the counts alone: the digests of all rows would be there for each batch."""
        counts = copy.copy(self)
        counts.rows = {}
        return counts

    def count(
        self, table: str, ids: np.ndarray, has_row: np.ndarray, rows: np.ndarray, *, num_left_behind: int = 0
    ) -> None:
        """Take in a lookup of ``ids`` (int64, (n,)), its answer (bool, (n,)) and the rows (uint8, (n, row_bytes))."""
        self.count_ids(table, has_row, num_left_behind=num_left_behind)
        found = self.rows.setdefault(table, {})
        for number, is_there, row in zip(ids.tolist(), has_row.tolist(), rows, strict=True):
            found[number] = hash_row(row) if is_there else None

    def count_ids(self, table: str, has_row: np.ndarray, *, num_left_behind: int = 0) -> None:
        """Take in how many ids were looked up, and which of them (bool, (n,)) have a row."""
        self.asked[table] += len(has_row)
        self.missing[table] += int(np.count_nonzero(~has_row)) - num_left_behind
        self.left_behind[table] += num_left_behind


def hash_row(row: np.ndarray) -> str:
    """Return the xxh3-64 of a row's bytes, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(row.data)
