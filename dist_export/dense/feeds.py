"""Put rows of the checkpoint into the matrices of a model just before it reads them, and note what is put back afterwards.

Rows of a matrix go by number: it is the weight of an ``nn.Embedding``, or a parameter that code of the caller's own reads.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn

from dist_export.dense.reads import DATA_PTR
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample_rows import SampleRows, WholeTable
from dist_export.errors import ModelError
from dist_export.formats.dtypes import DTYPES
from dist_export.model.managed_collisions import FurtherRow, IdLookups, RawIdState


class Feed:
    """What all tables share: which ids were fed already, and how to put rows back."""

    puts_default = False
    """Whether ids that the checkpoint lacks get the table's default row, as in serving."""

    def __init__(self, finder: RowFinder, counts: SampleRows, undo: list[Callable[[], None]], kind: str) -> None:
        self._kind = kind
        self._finder = finder
        self._counts = counts
        self._undo = undo
        self._fed = np.zeros(0, np.int64)
        self.sharing: list[WeightFeed] = []
        """What feeds other tables into the same memory: what one puts there, the others have to put there anew."""

    def new_of(self, ids: np.ndarray) -> np.ndarray:
        """Return those of the ids (int64) that were not fed yet, sorted and without duplicates, and note them as fed."""
        new = np.setdiff1d(np.unique(ids), self._fed, assume_unique=True)
        self._fed = np.union1d(self._fed, new)
        for other in self.sharing if len(new) else ():
            other._fed = np.setdiff1d(other._fed, new, assume_unique=True)  # noqa: SLF001 -- of its own kind
            other._whole = None  # noqa: SLF001
        return new

    def ids_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        """Return the ids that a module is called with. ModelError where they are no tensor."""
        ids = args[0] if args else kwargs.get("ids", kwargs.get("input"))
        if not isinstance(ids, torch.Tensor):
            raise ModelError(
                f"{self._kind} was called with {type(ids).__name__} in the place of its ids; the export feeds tables that "
                "look up a tensor of ids. If this module is the sparse arch itself, sparse_model_name is to name the one around "
                "it, which gets the batch"
            )
        return ids

    def numbers_of(self, ids: torch.Tensor) -> np.ndarray:
        """Return ids as int64, (n,)."""
        numbers: np.ndarray = ids.detach().reshape(-1).to("cpu", torch.int64).numpy()
        return numbers

    def feed(self, ids: np.ndarray) -> None:
        """Put the rows of ids (int64, sorted, without duplicates) into the table."""
        raise NotImplementedError

    def rows_of(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
        """Return the ids that the checkpoint holds, their rows in its dtype, cast there and back, and ids without a row.

        The last are those for which serving gives the default row.
        """
        has_row, rows = self._finder.find(table, ids)
        written = self._finder.written_name(table)
        num_left_behind = self._finder.left_behind.pop(written, 0)
        self._counts.count(written, ids, has_row, rows, num_left_behind=num_left_behind)
        self._counts.left_to_model += 0 if self.puts_default else num_left_behind
        if not self.puts_default and not has_row.all():
            self._counts.without_default.add(written)
        return ids[has_row], self.values_of(table, rows[has_row]), self._finder.lacking(table, ids, has_row)

    def values_of(self, table: str, rows: np.ndarray) -> torch.Tensor:
        """Return rows as they are written (uint8, (n, bytes)) in the checkpoint's dtype."""
        slot = self._finder.embedding_of(table)
        dtype = getattr(torch, DTYPES[slot.dtype].torch)
        values = (
            torch.from_numpy(self._finder.decode(table, rows).reshape(-1)).view(dtype).reshape(-1, *slot.inner_shape)
        )
        return other_rows(values) if table in self._finder.poisoned else values


def other_rows(rows: torch.Tensor) -> torch.Tensor:
    """Return rows of the same shape and dtype, each of which has other values in every column. Signs and sizes change."""
    if not rows.is_floating_point():
        return rows + 1
    columns = torch.arange(1, rows[0].numel() + 1 if len(rows) else 1, dtype=torch.float64).reshape(rows.shape[1:])
    return (rows.double() * -0.5 + 0.125 * columns.sqrt() + 0.25).to(rows.dtype)


class WeightFeed(Feed):
    """Feeds a matrix whose rows go by number: an id is a row of it."""

    puts_default = True

    def __init__(
        self,
        weight: torch.Tensor,
        table: str,
        finder: RowFinder,
        counts: SampleRows,
        undo: list[Callable[[], None]],
        *,
        kind: str = "",
    ) -> None:
        """Take the weight (rows, columns) of a table. ``kind`` is that of the module that has it, for messages."""
        super().__init__(finder, counts, undo, kind)
        self.weight = weight.detach()
        self.table = table
        self.own_undo: list[Callable[[], None]] = []
        """What gives back the memory of this table; those that share it have one list."""
        self._whole: tuple[np.ndarray, np.ndarray] | None = None
        """Of a table that was put in whole: which rows there are, and which rules leave behind (bool, (rows,))."""
        slot = finder.embedding_of(table)
        if slot.inner_shape != tuple(weight.shape[1:]):
            columns = weight.shape[1] if weight.dim() == 2 else list(weight.shape[1:])
            raise ModelError(
                f"table {table!r} has rows of {list(slot.inner_shape)} in the checkpoint, the model has {columns}"
            )
        self._is_whole_kept = False
        """Whether all rows were kept because the arch writes into them."""
        num_rows = finder.rows_by_number(table)
        if num_rows is not None and num_rows != len(weight):
            counts.other_sizes.append((table, num_rows, len(weight)))

    def before_lookup(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Feed what a module is about to look up."""
        self.take(self.numbers_of(self.ids_of(args, kwargs)))

    def take(self, ids: np.ndarray) -> None:
        """Feed these rows (int64, any order), each once. The model itself complains of numbers that are no row's."""
        new = self.new_of(ids[(ids >= 0) & (ids < len(self.weight))])
        if len(new):
            self._counts.note_reads(self.table, self.comparable(new))
        if self._whole is not None and not self._finder.is_recording:
            has_row, is_left = (flags[new] for flags in self._whole)
            num_left = int(np.count_nonzero(is_left))
            self._counts.count_ids(self._finder.written_name(self.table), has_row, num_left_behind=num_left)
        elif len(new):
            with torch.no_grad():
                self.feed(new)

    def comparable(self, ids: np.ndarray) -> np.ndarray:
        """Return those of the rows that are the same each time a batch is looked up."""
        return ids

    def feed(self, ids: np.ndarray) -> None:
        """Put these rows into the weight."""
        # also rows that nothing is put into: with max_norm the lookup itself changes them
        self._keep(torch.from_numpy(ids).to(self.weight.device))
        if self._finder.is_recording:
            self._finder.record(self.table, ids)
            return
        if self._finder.is_live:
            for other in self.sharing:  # its rows are in this very memory: what is put here would be found as its own
                self._finder.keep(other.table, ids)
        held, rows, _ = self.rows_of(self.table, ids)
        if self.puts_default:
            self.weight[torch.from_numpy(ids).to(self.weight.device)] = self._default()
        self.weight[torch.from_numpy(held).to(self.weight.device)] = rows.to(self.weight)

    def _keep(self, positions: torch.Tensor | slice) -> None:
        weight = self.weight
        before = weight[positions].clone()

        def put_back() -> None:
            weight[positions] = before

        for undo in (self._undo, self.own_undo):
            undo.append(put_back)

    def _default(self) -> torch.Tensor:
        default = self._finder.default_row(self.table)[None]
        return self.values_of(self.table, default).to(self.weight)

    def take_whole(self, how: str) -> None:
        """Feed all rows, for an operator ``how`` that does not say which it reads.

        Raises:
            ModelError: the table, whose own values are kept meanwhile, is larger than the memory budget.
        """
        self._counts.whole_reads.add(self.table)
        if self._whole is not None or self._finder.is_recording:
            return
        num_bytes = self.weight.numel() * self.weight.element_size()
        if num_bytes > self._finder.max_memory_bytes:
            if how == DATA_PTR:
                self._counts.unseen[self.table] = (
                    f"its memory is given away ({how}), and all of its {num_bytes:,} bytes are more than max_memory"
                )
                return
            raise ModelError(
                f"table {self.table!r} is read as a whole by the sparse arch ({how}), so that all of its rows are put into the "
                f"model for the sample; its {num_bytes:,} bytes are more than max_memory. Raise max_memory, or look rows up by "
                "id: nn.Embedding, F.embedding, weight[ids], torch.index_select"
            )
        for other in self.sharing:
            other._fed, other._whole = other._fed[:0], None  # noqa: SLF001 -- of its own kind
        with torch.no_grad():
            for step in reversed(self.own_undo):  # a model in memory is the source of its own rows
                step()
            self._keep(slice(None))
            self._feed_whole(how)

    def note_write(self, how: str) -> None:
        """Keep all rows, to be put back: the operator ``how`` is about to write into them.

        Raises:
            ModelError: of a model in memory, whose rows are the ones that are exported: the write is refused before it happens.
        """
        if self._finder.is_live:
            raise ModelError(
                f"table {self.table!r}: the sparse arch writes into it while it runs in eval mode ({how}), so the export itself "
                "would change the trained rows. Nothing was written. Do this in training only (if self.training), or write "
                "the changed rows into the table before the export"
            )
        self._counts.changed[self.table] = how
        num_bytes = self.weight.numel() * self.weight.element_size()
        if not self._is_whole_kept and num_bytes <= self._finder.max_memory_bytes:
            self._is_whole_kept = True
            with torch.no_grad():
                self._keep(slice(None))

    def note_renorm(self, max_norm: float) -> None:
        """Note that the model's rows are not those that the package has, once they are looked up."""
        self._counts.changed[self.table] = f"max_norm={max_norm:g}"

    def note_ambiguous(self, how: str) -> None:
        """Note it where settings make other rows of the one table than of the other: either may be meant."""
        for other in self.sharing:
            if self._finder.differ_by_settings(self.table, other.table):
                self._counts.unseen[self.table] = (
                    f"it and {other.table!r} have one weight in the model and other settings, and "
                    f"{how} reads it past their modules"
                )

    def _feed_whole(self, how: str) -> None:
        finder, table = self._finder, self.table
        digest = xxhash.xxh3_128()
        flags: list[tuple[np.ndarray, np.ndarray]] = []
        default = self._default() if self.puts_default else None
        for ids in finder.pieces(table, len(self.weight)):
            has_row, rows, is_left = finder.find_piece(table, ids)
            digest.update(has_row.tobytes())
            digest.update(rows[has_row].tobytes())
            piece = self.weight[int(ids[0]) : int(ids[-1]) + 1]
            if default is not None and not has_row.all():
                piece[torch.from_numpy(~has_row).to(piece.device)] = default
            values = self.values_of(table, rows[has_row]).to(piece)
            piece[torch.from_numpy(has_row).to(piece.device)] = values
            flags.append((has_row, is_left))
        has_row, is_left = (np.concatenate(its) if its else np.zeros(0, bool) for its in zip(*flags, strict=True))
        self._whole = has_row, is_left
        num_found = int(np.count_nonzero(has_row))
        self._counts.whole[finder.written_name(table)] = WholeTable(
            table, how, len(self.weight), num_found, digest.hexdigest()
        )


class RawIdFeed(WeightFeed):
    """Feeds an embedding behind a managed-collision module: it is asked for rows, and the package has raw ids."""

    def __init__(
        self,
        module: nn.Embedding | nn.EmbeddingBag,
        table: str,
        finder: RowFinder,
        counts: SampleRows,
        undo: list[Callable[[], None]],
        state: RawIdState,
        lookups: IdLookups | None,
    ) -> None:
        super().__init__(module.weight, table, finder, counts, undo, kind=type(module).__name__)
        self._state = state
        self._lookups = lookups
        self.further = FurtherRow(module)

    def before_lookup(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Feed the rows; a number after the last row, which ``lookups`` gives to unknown ids, is the default row."""
        super().before_lookup(module, args, kwargs)  # passes over numbers that are no row's
        ids = self.ids_of(args, kwargs)
        if self._lookups is None or not bool((ids == len(self._state.ids)).any()):
            return None
        default = self.values_of(self.table, self._finder.default_row(self.table)[None])[0]
        positions = self.further.put(ids, default)
        if args:
            return (positions, *args[1:]), kwargs
        return args, {**kwargs, "ids" if "ids" in kwargs else "input": positions}

    def comparable(self, ids: np.ndarray) -> np.ndarray:
        """Return none: which row an unknown id falls back to depends on whose rows are put in."""
        return ids[:0]

    def take_whole(self, how: str) -> None:
        """Note that its rows are read without ids: which raw ids they are of is not asked then."""
        self._counts.whole_reads.add(self.table)
        self._counts.unseen[self.table] = f"its rows go by raw id, and the sparse arch reads it as a whole ({how})"

    def feed(self, ids: np.ndarray) -> None:
        """Put these rows into the weight; what is recorded are their raw ids."""
        if self._finder.is_recording:
            self._keep(torch.from_numpy(ids).to(self.weight.device))
            ids = ids[(ids >= 0) & (ids < len(self._state.ids))]
            raw = self._state.ids_of(ids)
            self._finder.record(self.table, np.unique(raw[raw != self._state.empty]))
            return
        super().feed(ids)

    def rows_of(self, table: str, ids: np.ndarray) -> tuple[np.ndarray, torch.Tensor, np.ndarray]:
        """Return the rows' numbers (of ``ids``) whose raw id the checkpoint holds, these rows, and the other numbers."""
        raw = self._state.ids_of(ids)
        if self._finder.is_unmodified:
            rows = self._finder.rows_at(table, ids, raw != self._state.empty)
            has_row = (raw != self._state.empty) | self._counts_unknown
            self._counts.count(self._finder.written_name(table), ids, has_row, rows)
            return ids, self.values_of(table, rows), ids[:0]
        known = np.flatnonzero(raw != self._state.empty)
        order = known[np.argsort(raw[known])]
        held, found, _ = super().rows_of(table, raw[order])
        num_unknown = 0 if self._counts_unknown else len(ids) - len(known)
        written = self._finder.written_name(table)
        self._counts.asked[written] += num_unknown
        self._counts.missing[written] += num_unknown
        numbers = ids[order[np.searchsorted(raw[order], held)]]
        return numbers, found, np.setdiff1d(ids, numbers, assume_unique=True)

    @property
    def _counts_unknown(self) -> bool:
        """Whether unknown ids are counted where they are mapped: several of them may get one row."""
        return self._lookups is not None and self._lookups.is_counted
