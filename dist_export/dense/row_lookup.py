"""Find the rows of given ids in the checkpoint, as serving will have them, and keep what was found."""

from __future__ import annotations

import copy
import dataclasses
from collections import Counter
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from dist_export.checkpoint.id_reader import read_ids
from dist_export.checkpoint.metadata import SlotMeta, TableMeta
from dist_export.dense.found_rows import FoundRows, LocatedRows, number_pieces
from dist_export.dense.known_tables import KnownTables
from dist_export.dense.source_rows import SourceRows
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.formats.row_encodings import RowCast, encode_values


@dataclass(frozen=True, slots=True, kw_only=True)
class LiveRows:
    """What a model that is exported from memory can take of the rows that were written. Nothing else restricts a lookup."""

    is_own: Callable[[str, np.ndarray], np.ndarray] | None = None
    """(table, ids) -> which of the ids (bool) may be found: those that this rank's table has itself, because another one could
    not be taken out of it again."""
    sharded: Collection[str] = ()
    """Tables that took no rows in the first run, whatever they look like in the second: FSDP leaves the weights of its outermost
    module whole after a forward."""
    pruned: Mapping[str, np.ndarray] = field(default_factory=dict)
    """By table, the ids whose rows were left out by rules (int64), as :meth:`RowFinder.pruned_ids` gives them."""


class RowFinder(KnownTables):
    """Looks rows of a checkpoint up by id. Any rank, for itself; no collective.

    What was found is kept, so that a table is scanned once for an id, whoever asks for it, and with :meth:`unmodified` too.
    """

    def __init__(
        self,
        source: SourceRows,
        *,
        names: Mapping[str, str] | None = None,
        casts: Mapping[str, RowCast] | None = None,
        live: LiveRows | None = None,
        max_memory_bytes: int = 512 << 20,
    ) -> None:
        """Look at ids only when asked.

        Args:
            source: the rows, and which of them are exported.
            names: name in the checkpoint -> name that the model has for the table, of those where it is another one.
            casts: by table, how rows are written otherwise than the source has them.
            live: of the written rows of a model in memory, what this rank's own tables can take.
            max_memory_bytes: for the rows of a table that is read whole, which are not kept here.
        """
        checkpoint, live = source.checkpoint, live or LiveRows()
        self.max_memory_bytes = max_memory_bytes
        self.sharded = live.sharded
        self._casts = self._served_casts = casts or {}
        self._only = live.is_own
        self._source = source
        self._checkpoint = checkpoint
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
        self._pruned = live.pruned
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
        """Return what finds the source's own rows: without cast, prune or the choice among duplicates. It shares the scans.

        Written rows stay as they are, and are decoded as before.
        """
        view = copy.copy(self)
        casts = self._casts if self._source.is_written else {}
        vars(view).update(_casts=casts, left_behind=Counter(), _is_unmodified=True)
        return view

    @property
    def is_live(self) -> bool:
        """Whether the model's own tables are what is exported."""
        return self._checkpoint.memory is not None or self._only is not None

    @property
    def is_of_source(self) -> bool:
        """Whether these are rows of the checkpoint, and not of written shards or of a base."""
        return not self._source.is_written

    @property
    def aliases(self) -> frozenset[str]:
        """Names of tables and dense parameters that the checkpoint has under another name alone."""
        payload = self._checkpoint.payload
        return frozenset() if payload is None else frozenset(name for name, _ in payload.aliases)

    def are_one(self, one: str, other: str) -> bool:
        """Whether the rows of two tables are the same bytes of the same files."""
        parts, blocks = self._checkpoint.parts, self._checkpoint.blocks
        spans = []
        for table in (one, other):
            its, column = parts.of_table(self._numbers[table]), self.stored_embedding(table).column
            first = [parts.first_row_of(part) for part in its]
            spans.append(np.stack([blocks.file[its, column], blocks.offset[its, column], parts.rows[its], first]))
        return np.array_equal(spans[0], spans[1]) and bool((spans[0][0] >= 0).all())

    def looked_up(self) -> list[str]:
        """Return the tables of which any id was looked up."""
        return [table for table, number in self._numbers.items() if number in self._found]

    def known(self, table: str) -> FoundRows | None:
        """Return all that was found of a table so far, None where nothing was looked up."""
        return self._found.get(self._numbers[table])

    def differ_by_settings(self, one: str, other: str) -> bool:
        """Whether settings may make other rows of the one table than of the other, where both have the same in the source."""
        defaults = [self._checkpoint.tables[self._numbers[table]].default_row for table in (one, other)]
        is_pruned = self._source.is_pruned is not None or any(map(len, self._pruned.values()))
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
            own = [source.decode(table, its) for its in (found.rows, source.default_row(table)[None])]
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
        self._source.fill_by_number(number, slot, found)
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
        if cast is None or not self._source.is_written:
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

    def read_ids(self, table: str) -> Iterator[np.ndarray]:
        """Yield the ids of a table in runs (int64), of a row-indexed one its row numbers. The next run overwrites a run."""
        for part in self._checkpoint.parts.of_table(self._numbers[table]):
            yield from read_ids(self._checkpoint, part)

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
            found = self._source.scan(number, self.stored_embedding(table), new, self.located)
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
        if not self._source.is_written and table not in self._replaced:
            own = np.where(found.has_row[:, None], found.rows, self.unmodified().default_row(table))
            now = np.where(found.is_kept[:, None], rows, self.default_row(table))
            if (self.decode(table, now) != own).any():
                self._replaced.add(table)
        return found.is_kept, rows, found.is_pruned & ~found.is_kept

    def scan(self, table: str, ids: np.ndarray) -> FoundRows:
        """Return all that a table holds of ids (int64, sorted, without duplicates), without keeping it."""
        nowhere = LocatedRows(self._checkpoint)  # of whole tables nothing is kept
        return self._source.scan(self._numbers[table], self.stored_embedding(table), ids, nowhere)

    def _cast_of(self, table: str) -> RowCast | None:
        return self._casts.get(self.written_name(table))

    def _served_cast_of(self, table: str) -> RowCast | None:
        return self._served_casts.get(self.written_name(table))

    def _encode(self, table: str, rows: np.ndarray) -> np.ndarray:
        cast = self._cast_of(table)
        return rows if cast is None or self._source.is_written else cast.encode(rows)
