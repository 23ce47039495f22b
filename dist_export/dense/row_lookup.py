"""Find the rows of given ids in the checkpoint without loading a table.

Columns of ids are scanned and rows read one by one; where rows go by number, an id is a row's number, and only rows are read.
"""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from typing import Any

import numpy as np

from dist_export.checkpoint.id_reader import read_ids
from dist_export.checkpoint.metadata import Checkpoint, SlotMeta, TableMeta
from dist_export.checkpoint.row_reader import RowReader
from dist_export.dense.found_rows import FoundRows, LocatedRows, number_pieces
from dist_export.dense.known_tables import KnownTables
from dist_export.formats.recis import EMBEDDING_SLOT, is_in_slice
from dist_export.formats.row_encodings import RowCast, encode_values


class RowFinder(KnownTables):
    """Looks rows of a checkpoint up by id. Any rank, for itself; no collective.

    What was found is kept, so that a table is scanned once for an id, whoever asks for it, and with :meth:`unmodified` too.
    """

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
        pruned: Mapping[str, np.ndarray] | None = None,
        max_memory_bytes: int = 512 << 20,
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
            pruned: of such a model, by table the ids whose rows were left behind (int64), as :meth:`pruned_ids` gives them.
            max_memory_bytes: for the rows of a table that is read whole, which are not kept here.
        """
        self.max_memory_bytes = max_memory_bytes
        self.sharded = sharded
        self._casts = self._served_casts = casts or {}
        self._is_written = is_written
        self._only = only
        self._checkpoint = checkpoint
        self._misplaced = misplaced
        self._dropped_in = dropped_in
        self._is_pruned = is_pruned
        names = names or {}
        super().__init__(  # by the names that the model has, as all methods take and give them but ``written_name``
            {names.get(table.name, table.name): i for i, table in enumerate(checkpoint.tables)},
            {table.name: table.reason for table in checkpoint.left_out},
        )
        self.left_behind: Counter[str] = Counter()
        """Ids that were asked for, and that rules leave behind, by the table's name in ``checkpoint``."""
        self._found: dict[int, FoundRows] = {}
        """Table -> what is known of it already."""
        self._replaced: set[str] = set()
        """Tables of which an id got a row from the model that serving does not give it."""
        self._is_unmodified = False
        self._wanted: dict[str, np.ndarray] = {}
        """Table -> ids that will be asked for, and were not yet."""
        self._recorded: dict[str, list[np.ndarray]] | None = None
        self._pruned = pruned or {}
        self.learned: dict[int, Any] = {}
        """By ``id()`` of a hash table of the model, what runs with this finder and its views have learned of it."""
        self.poisoned: frozenset[str] = frozenset()
        """Tables of which other rows are put into the model than the checkpoint has. Of a :meth:`probe`."""
        self.flipped: frozenset[str] = frozenset()
        """Tables of which rows that nobody asks for are changed meanwhile. Of a :meth:`probe`."""
        self.located = LocatedRows(checkpoint)
        """Where the rows of looked-up ids are, those that rules leave behind too; of hash tables, by number."""

    def want(self, ids: Mapping[str, np.ndarray]) -> None:
        """Note ids by table (int64, sorted, without duplicates) that will be asked for: one scan finds all of them."""
        self._wanted.update({table: numbers for table, numbers in ids.items() if table in self._numbers})

    def recorder(self) -> RowFinder:
        """Return what finds no row and notes what it was asked for. The model then uses its own rows."""
        view = copy.copy(self)
        view._recorded = {}  # noqa: SLF001 -- of this very class
        return view

    def probe(self, *, poisoned: Collection[str] = (), flipped: Collection[str] = ()) -> RowFinder:
        """Return what finds the same rows, for a run that shows what a sparse arch depends on. What it finds is not kept.

        Args:
            poisoned: tables that get other rows than the checkpoint has.
            flipped: tables whose memory in the model is changed where no rows are put.
        """
        view = copy.copy(self)
        view._found = dict(self._found)  # noqa: SLF001 -- of this very class
        view._wanted, view.left_behind, view._replaced = {}, Counter(), set()  # noqa: SLF001
        view.located = LocatedRows(self._checkpoint)
        view.poisoned, view.flipped = frozenset(poisoned), frozenset(flipped)
        return view

    @property
    def is_recording(self) -> bool:
        """Whether this is a :meth:`recorder`."""
        return self._recorded is not None

    def record(self, table: str, ids: np.ndarray) -> None:
        """Take in a lookup. Of a recorder."""
        assert self._recorded is not None
        self._recorded.setdefault(table, []).append(ids)

    def recorded(self) -> dict[str, np.ndarray]:
        """Return by table the ids that a recorder was asked for, sorted, without duplicates."""
        return {table: np.unique(np.concatenate(ids)) for table, ids in (self._recorded or {}).items()}

    def lacking(self, table: str, ids: np.ndarray, has_row: np.ndarray) -> np.ndarray:
        """Return those of the ids for which serving gives the table's default row.

        Of a model in memory these are the pruned ones alone: another rank may have the others.
        """
        is_lacking: np.ndarray = ~has_row
        if self.is_live and self._is_unmodified:
            is_lacking = np.zeros(len(ids), bool)
        elif self.is_live and self._only is not None:
            is_lacking = np.isin(ids, self._pruned.get(table, ids[:0]))
        elif self.is_live:
            answer = self._found[self._numbers[table]].of(ids)
            is_lacking = answer.is_pruned & ~answer.is_kept
        return np.compress(is_lacking, ids)

    def pruned_ids(self) -> dict[str, np.ndarray]:
        """Return by table the ids that were asked for, and whose rows are all left behind by rules."""
        names = {number: table for table, number in self._numbers.items()}
        return {names[n]: found.ids[found.is_pruned & ~found.is_kept] for n, found in self._found.items()}

    def unmodified(self) -> RowFinder:
        """Return what finds the source's own rows: without cast, prune or the choice among duplicates. It shares the scans."""
        view = copy.copy(self)
        vars(view).update(_casts={}, left_behind=Counter(), _is_unmodified=True)
        return view

    @property
    def is_live(self) -> bool:
        """Whether the model's own tables are what is exported."""
        return self._checkpoint.memory is not None or self._only is not None

    def looked_up(self) -> list[str]:
        """Return the tables of which any id was looked up."""
        return [table for table, number in self._numbers.items() if number in self._found]

    def known(self, table: str) -> FoundRows | None:
        """Return all that was found of a table so far, None where nothing was looked up."""
        return self._found.get(self._numbers[table])

    def differ_by_settings(self, one: str, other: str) -> bool:
        """Whether settings may make other rows of the one table than of the other, where both have the same in the source."""
        defaults = [self._checkpoint.tables[self._numbers[table]].default_row for table in (one, other)]
        is_pruned = self._is_pruned is not None or any(map(len, self._pruned.values()))
        return is_pruned or self._cast_of(one) != self._cast_of(other) or defaults[0] != defaults[1]

    def changes_rows(self, whole: Mapping[str, int]) -> bool:
        """Whether settings change what any lookup so far gives: by a cast, a rule of prune, a choice among duplicates.

        ``whole``: tables that were read as a whole, with the number of rows.
        """
        for table, num_rows in whole.items():
            for ids in self.pieces(table, num_rows):
                self.find_piece(table, ids)
        if self._replaced:
            return True
        source = self.unmodified()
        for table in self.looked_up():
            found = self._found[self._numbers[table]]
            if (found.has_row != found.is_kept).any():
                return True
            rows = [self._encode(table, found.kept), self.default_row(table)[None]]
            own = [found.rows, source.default_row(table)[None]]
            if any((self.decode(table, cast) != plain).any() for cast, plain in zip(rows, own, strict=True)):
                return True
        return False

    def exported_names(self) -> list[str]:
        """Return the names of the tables that are exported."""
        return list(self._numbers)

    def number_of(self, table: str) -> int:
        """Return the place of a table in the checkpoint."""
        return self._numbers[table]

    def table_of(self, table: str) -> TableMeta:
        """Return what is known of a table."""
        return self._checkpoint.tables[self._numbers[table]]

    @property
    def is_unmodified(self) -> bool:
        """Whether this finds the source's own rows."""
        return self._is_unmodified

    def rows_at(self, table: str, numbers: np.ndarray, has_id: np.ndarray) -> np.ndarray:
        """Return rows of the source by their numbers (int64, sorted, without duplicates): uint8, (n, bytes).

        ``has_id`` (bool, (n,)) says which of them an id has: of the others serving gives the default row.
        """
        number, slot = self._numbers[table], self.stored_embedding(table)
        found = FoundRows.nothing(numbers, slot.row_bytes)
        self._find_by_number(number, slot, found)
        if (found.rows[~has_id] != self.default_row(table)).any():
            self._replaced.add(table)
        return found.rows

    def mark_replaced(self, table: str) -> None:
        """Note that ids of a table were given a row by the model that serving does not give them."""
        self._replaced.add(table)

    def written_name(self, table: str) -> str:
        """Return the name of a table in the checkpoint, which is that in the package."""
        return self._checkpoint.tables[self._numbers[table]].name

    def embedding_of(self, table: str) -> SlotMeta:
        """Return dtype and shape of a table's embedding rows, as the checkpoint has them before any cast."""
        slot, cast = self.stored_embedding(table), self._cast_of(table)
        if cast is None or not self._is_written:
            return slot
        shape = (cast.dim,) if cast.encoding else slot.inner_shape
        return dataclasses.replace(slot, dtype=cast.source, inner_shape=shape, row_bytes=cast.source_bytes)

    def default_row(self, table: str) -> np.ndarray:
        """Return what serving gives for an id that the table lacks: a row (uint8, (bytes,)) like those of :meth:`find`.

        The source's own rows are the unmodified ones, but it has none for such an id: also beside them it is serving's, as the
        cast rounds it.
        """
        slot, cast, served = self.stored_embedding(table), self._cast_of(table), self._served_cast_of(table)
        default = self._checkpoint.tables[self._numbers[table]].default_row
        if default is None or isinstance(default, str):
            return np.zeros(slot.row_bytes if cast is None else cast.target_bytes, np.uint8)
        if served is None:
            return encode_values(default, slot.dtype)
        row = encode_values(default, served.target, served.encoding)
        return row if cast is not None else served.decode(row[None])[0]

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

    def stored_embedding(self, table: str) -> SlotMeta:
        """Return dtype and shape of a table's embedding rows as this checkpoint stores them."""
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
        number = self._numbers[table]
        answer = self.keep(table, ids).of(ids)
        if self._is_unmodified:
            return answer.has_row, answer.rows
        # of an id that stands twice, one row may stay where rules leave the other behind
        left = int(np.count_nonzero(answer.is_pruned & ~answer.is_kept))
        self.left_behind[self._checkpoint.tables[number].name] += left
        return answer.is_kept, self._encode(table, answer.kept)

    def keep(self, table: str, ids: np.ndarray) -> FoundRows:
        """Look up what a table holds of ids (int64, sorted, without duplicates), and keep it. Returns all that is kept."""
        number = self._numbers[table]
        known = self._found.get(number)
        new = np.union1d(ids, self._wanted.pop(table)) if table in self._wanted else ids
        new = new if known is None else np.setdiff1d(new, known.ids, assume_unique=True)
        if known is None or len(new):
            found = self._scan(number, self.stored_embedding(table), new)
            known = self._found[number] = found if known is None else known.join(found)
        return known

    def pieces(self, table: str, num_rows: int) -> Iterator[np.ndarray]:
        """Yield the numbers of all rows in order, as many at once as fit into the memory budget with room to spare."""
        row_bytes = max(self.embedding_of(table).row_bytes, self.stored_embedding(table).row_bytes)
        return number_pieces(num_rows, row_bytes, self.max_memory_bytes)

    def find_piece(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Return what :meth:`find` does, and which of the ids rules leave behind (bool, (n,)); nothing of it is kept.

        Of a model in memory other ids than this rank's are found, too: what is put into a weight can be taken out again.
        """
        found = self.scan(table, ids)
        if self._is_unmodified:
            return found.has_row, found.rows, np.zeros(len(ids), bool)
        rows = self._encode(table, found.kept)
        if not self._is_written and table not in self._replaced:
            own = np.where(found.has_row[:, None], found.rows, self.unmodified().default_row(table))
            now = np.where(found.is_kept[:, None], rows, self.default_row(table))
            if (self.decode(table, now) != own).any():
                self._replaced.add(table)
        return found.is_kept, rows, found.is_pruned & ~found.is_kept

    def scan(self, table: str, ids: np.ndarray) -> FoundRows:
        """Return all that a table holds of ids (int64, sorted, without duplicates), without keeping it."""
        view = copy.copy(self)
        view.located = LocatedRows(self._checkpoint)  # of whole tables nothing is kept
        return view._scan(self._numbers[table], self.stored_embedding(table), ids)  # noqa: SLF001 -- of this very class

    def _scan(self, number: int, slot: SlotMeta, ids: np.ndarray) -> FoundRows:
        found = FoundRows.nothing(ids, slot.row_bytes)
        if self._checkpoint.tables[number].is_hashed:
            self._scan_ids(number, slot, found)
        else:
            self._find_by_number(number, slot, found)
        return found

    def _find_by_number(self, table: int, slot: SlotMeta, found: FoundRows) -> None:
        """Fill in the rows of a table that go by number: an id is the number of its row, neighbours are read in one call."""
        parts, ids = self._checkpoint.parts, found.ids
        with RowReader(self._checkpoint) as reader:
            for part in parts.of_table(table):
                if not reader.is_held(part, slot.column):
                    continue  # in the memory of another rank
                first_row, num_rows = parts.first_row_of(part), int(parts.rows[part])
                positions = np.arange(*np.searchsorted(ids, [first_row, first_row + num_rows]))
                found.has_row[positions] = found.is_kept[positions] = True
                if self._dropped_in is not None and len(positions):
                    dropped = self._dropped_in(part, 0, num_rows) + first_row
                    found.is_kept[positions[np.isin(ids[positions], dropped)]] = False
                if not len(positions) or not slot.row_bytes:
                    continue
                for run in np.split(positions, np.flatnonzero(np.diff(ids[positions]) != 1) + 1):
                    wanted = found.rows[run[0] : run[-1] + 1].reshape(-1)
                    reader.read_into(wanted, part, slot.column, int(ids[run[0]]) - first_row, len(run))
        found.kept[found.is_kept] = found.rows[found.is_kept]

    def _scan_ids(self, number: int, slot: SlotMeta, found: FoundRows) -> None:
        """Fill in the rows of a hash table: its columns of ids are scanned."""
        checkpoint, ids = self._checkpoint, found.ids
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
                    positions = np.minimum(np.searchsorted(ids, held), len(ids) - 1)
                    wanted = np.flatnonzero(ids[positions] == held)
                    if len(wanted):
                        self._fill(found, reader, slot, part, first, held, wanted, positions[wanted])
                    first += len(held)

    def _fill(
        self,
        found: FoundRows,
        reader: RowReader,
        slot: SlotMeta,
        part: int,
        first: int,
        held: np.ndarray,
        wanted: np.ndarray,
        positions: np.ndarray,
    ) -> None:
        """Take in the rows ``first + wanted`` of a part, whose ids ``held[wanted]`` are those at ``places``."""
        if not self._is_written:
            self.located.add(int(self._checkpoint.parts.table[part]), part, first + wanted, held[wanted])
        is_kept = np.ones(len(wanted), bool)
        if self._dropped_in is not None:
            is_kept &= ~np.isin(wanted, self._dropped_in(part, first, len(held)))
        if self._is_pruned is not None and is_kept.any():
            is_left = self._is_pruned(part, first + wanted[is_kept], held[wanted[is_kept]])
            found.is_pruned[positions[is_kept][is_left]] = True
            is_kept[is_kept] = ~is_left
        rows = np.zeros((len(wanted), slot.row_bytes), np.uint8)
        if slot.row_bytes:
            reader.read_each_into(rows, part, slot.column, first + wanted)
        # of an id that stands several times in one run, numpy takes the last, as the runs themselves do
        found.has_row[positions], found.rows[positions] = True, rows
        found.is_kept[positions[is_kept]], found.kept[positions[is_kept]] = True, rows[is_kept]

    def _cast_of(self, table: str) -> RowCast | None:
        return self._casts.get(self.written_name(table))

    def _served_cast_of(self, table: str) -> RowCast | None:
        return self._served_casts.get(self.written_name(table))

    def _encode(self, table: str, rows: np.ndarray) -> np.ndarray:
        cast = self._cast_of(table)
        return rows if cast is None or self._is_written else cast.encode(rows)
