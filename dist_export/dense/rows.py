"""Find the rows of given ids in the checkpoint without loading a table.

Columns of ids are scanned and rows read one by one; where rows go by number, an id is a row's number, and only rows are read.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Mapping

import numpy as np

from dist_export.checkpoint.ids import read_ids
from dist_export.checkpoint.reader import Checkpoint, SlotMeta
from dist_export.checkpoint.rows import RowReader
from dist_export.errors import ModelError
from dist_export.layout.encodings import RowCast, encode_values
from dist_export.layout.recis import EMBEDDING_SLOT, is_in_slice


class RowFinder:
    """Looks rows of a checkpoint up by id. Any rank, for itself; no collective."""

    def __init__(
        self,
        checkpoint: Checkpoint,
        misplaced: np.ndarray | None,
        dropped_in: Callable[[int, int, int], np.ndarray] | None = None,
        names: Mapping[str, str] | None = None,
        is_pruned: Callable[[int, np.ndarray, np.ndarray], np.ndarray] | None = None,
        *,
        casts: Mapping[str, RowCast] | None = None,
        is_written: bool = False,
        only: Callable[[str, np.ndarray], np.ndarray] | None = None,
        sharded: Collection[str] = (),
    ) -> None:
        """Look at ids only when asked.

        Args:
            checkpoint: where the rows are.
            misplaced: rows by part (int64) that lie outside their part's slice; None where they were not counted.
            dropped_in: (part, first row, number of rows) -> which of these are not exported (int64, from the first row
                on): they are passed over here too, so that the sample sees what serving will.
            is_pruned: (part, rows within it, their ids) -> which of these rules leave behind (bool): they are passed over
                too.
            names: name in ``checkpoint`` -> name that the model has for the table, of those where it is another one.
            casts: by table, how rows are written otherwise than the source has them.
            is_written: whether the rows of ``checkpoint`` are those that were cast; else they are to be.
            only: (table, ids) -> which of the ids (bool) may be found: for a model that is exported from memory those that
                this rank's table holds itself, for another could not be taken out of it again.
            sharded: tables of such a model that took no rows in the first run, whatever they look like in the second: FSDP
                leaves the weights of its outermost module whole after a forward.
        """
        self.sharded = sharded
        self._casts = casts or {}
        self._is_written = is_written
        self._only = only
        self._checkpoint = checkpoint
        self._misplaced = misplaced
        self._dropped_in = dropped_in
        self._is_pruned = is_pruned
        names = names or {}
        self._numbers = {names.get(table.name, table.name): i for i, table in enumerate(checkpoint.tables)}
        """By the names that the model has, as all methods take and give them but ``written_name``."""
        self.left_behind: Counter[str] = Counter()
        """Ids that were asked for, and that rules leave behind, by the table's name in ``checkpoint``."""
        self._left_out = {table.name: table.reason for table in checkpoint.left_out}

    @property
    def is_live(self) -> bool:
        """Whether the model's own tables are what is exported."""
        return self._checkpoint.memory is not None or self._only is not None

    def _find_by_number(
        self, table: int, slot: SlotMeta, ids: np.ndarray, has_row: np.ndarray, rows: np.ndarray
    ) -> None:
        """Fill in the rows of a table that go by number: an id is the number of its row, neighbours are read in one call."""
        parts = self._checkpoint.parts
        with RowReader(self._checkpoint) as reader:
            for part in parts.of_table(table):
                if not reader.is_held(part, slot.column):
                    continue  # in the memory of another rank
                first_row, num_rows = parts.first_row_of(part), int(parts.rows[part])
                places = np.arange(*np.searchsorted(ids, [first_row, first_row + num_rows]))
                if self._dropped_in is not None and len(places):
                    dropped = self._dropped_in(part, 0, num_rows) + first_row
                    places = places[~np.isin(ids[places], dropped)]
                has_row[places] = True
                if not len(places) or not slot.row_bytes:
                    continue
                for run in np.split(places, np.flatnonzero(np.diff(ids[places]) != 1) + 1):
                    wanted = rows[run[0] : run[-1] + 1].reshape(-1)
                    reader.read_into(wanted, part, slot.column, int(ids[run[0]]) - first_row, len(run))

    def has_table(self, table: str) -> bool:
        """Whether the checkpoint has this table. ModelError where it has, but the settings leave it out."""
        if table in self._left_out and table not in self._numbers:
            raise ModelError(
                f"the model looks rows of table {table!r} up, which {self._left_out[table]} leaves out of the package; export "
                "it too, or export a model that does not use it"
            )
        return table in self._numbers

    def table_names(self) -> list[str]:
        """Return the names of all tables, those that are left out as well."""
        return [*self._numbers, *(name for name in self._left_out if name not in self._numbers)]

    def written_name(self, table: str) -> str:
        """Return the name of a table in the checkpoint, which is that in the package."""
        return self._checkpoint.tables[self._numbers[table]].name

    def embedding_of(self, table: str) -> SlotMeta:
        """Return dtype and shape of a table's embedding rows, as the checkpoint has them before any cast."""
        slot, cast = self._stored_embedding(table), self._cast_of(table)
        if cast is None or not self._is_written:
            return slot
        shape = (cast.dim,) if cast.encoding else slot.inner_shape
        return dataclasses.replace(slot, dtype=cast.source, inner_shape=shape, row_bytes=cast.source_bytes)

    def default_row(self, table: str) -> np.ndarray:
        """Return what serving gives for an id that the table lacks: a row (uint8, (bytes,)) like those of :meth:`find`."""
        slot, cast = self._stored_embedding(table), self._cast_of(table)
        default = self._checkpoint.tables[self._numbers[table]].default_row
        if default is None or isinstance(default, str):
            return np.zeros(slot.row_bytes if cast is None else cast.target_bytes, np.uint8)
        return (
            encode_values(default, slot.dtype) if cast is None else encode_values(default, cast.target, cast.encoding)
        )

    def rows_by_number(self, table: str) -> int | None:
        """Return how many rows a table has whose source stores no ids, so that its rows are those of a module; else None."""
        number = self._numbers[table]
        if self._checkpoint.tables[number].has_ids:
            return None
        parts = self._checkpoint.parts
        return int(parts.rows[parts.of_table(number)].sum())

    def decode(self, table: str, rows: np.ndarray) -> np.ndarray:
        """Return rows of :meth:`find` (uint8, (n, bytes)) as the model takes them: those of ``embedding_of``."""
        cast = self._cast_of(table)
        return rows if cast is None else cast.decode(rows)

    def _stored_embedding(self, table: str) -> SlotMeta:
        number = self._numbers[table]
        return next(slot for slot in self._checkpoint.tables[number].slots if slot.name == EMBEDDING_SLOT)

    def _find_allowed(
        self, table: str, ids: np.ndarray, only: Callable[[str, np.ndarray], np.ndarray]
    ) -> tuple[np.ndarray, np.ndarray]:
        allowed = only(table, ids)
        self._only = None
        try:
            found, its = self.find(table, ids[allowed])
        finally:
            self._only = only
        has_row = np.zeros(len(ids), bool)
        rows = np.zeros((len(ids), its.shape[1]), np.uint8)
        has_row[allowed], rows[allowed] = found, its
        return has_row, rows

    def find(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Return which of the ids the table holds (bool, (n,)) and their rows (uint8, (n, bytes); zeros if absent).

        Rows are as they are written into the shards, also where they are read from the source.

        Args:
            ids: int64, sorted, without duplicates.
        """
        if self._only is not None and len(ids):
            return self._find_allowed(table, ids, self._only)
        checkpoint = self._checkpoint
        number = self._numbers[table]
        slot = self._stored_embedding(table)
        has_row = np.zeros(len(ids), bool)
        rows = np.zeros((len(ids), slot.row_bytes), np.uint8)
        if not checkpoint.tables[number].is_hashed:
            self._find_by_number(number, slot, ids, has_row, rows)
            return has_row, self._encode(table, rows)
        is_pruned = np.zeros(len(ids), bool)
        for part in checkpoint.parts.of_table(number):
            may_hold = self._misplaced is None or self._misplaced[part] > 0
            if not len(ids) or not (may_hold or is_in_slice(ids, checkpoint.parts.slice_of(part)).any()):
                continue
            if not checkpoint.parts.rows[part]:
                continue
            first = 0
            with RowReader(checkpoint) as reader:
                if not (reader.is_held(part, 0) and reader.is_held(part, slot.column)):
                    continue  # in the memory of another rank, whose table this rank's model does not ask
                for held in read_ids(checkpoint, part):
                    places = np.minimum(np.searchsorted(ids, held), len(ids) - 1)
                    is_wanted = ids[places] == held
                    if self._dropped_in is not None:
                        is_wanted[self._dropped_in(part, first, len(held))] = False
                    wanted = np.flatnonzero(is_wanted)
                    if self._is_pruned is not None and len(wanted):
                        is_left = self._is_pruned(part, first + wanted, held[wanted])
                        is_pruned[places[wanted[is_left]]] = True
                        wanted = wanted[~is_left]
                    has_row[places[wanted]] = True
                    if slot.row_bytes and len(wanted):
                        found = np.empty((len(wanted), slot.row_bytes), np.uint8)
                        reader.read_each_into(found, part, slot.column, first + wanted)
                        rows[places[wanted]] = found
                    first += len(held)
        # of an id that stands twice, one row may stay where rules leave the other behind
        self.left_behind[checkpoint.tables[number].name] += int(np.count_nonzero(is_pruned & ~has_row))
        return has_row, self._encode(table, rows)

    def _cast_of(self, table: str) -> RowCast | None:
        return self._casts.get(self.written_name(table))

    def _encode(self, table: str, rows: np.ndarray) -> np.ndarray:
        cast = self._cast_of(table)
        return rows if cast is None or self._is_written else cast.encode(rows)
