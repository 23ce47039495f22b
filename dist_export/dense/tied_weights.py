"""What the model has once and the checkpoint under several names: it must have the same values under all of them.

That holds of tensors that are one, and of the common elements of tensors whose memory overlaps in part.

``load_state_dict`` leaves the values of the last name everywhere. An export reads each name where it is, a table's rows into the
shards and the others into the program, and a sample shows no difference in what it does not look at.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Iterable, Mapping
from typing import Any, NamedTuple, TypeAlias

import numpy as np
import torch
from torch import nn

from dist_export.archive.output_diff import has_same_values
from dist_export.checkpoint.dense import DenseParameters
from dist_export.checkpoint.model_weights import distinct_names, is_below, plain_name
from dist_export.config.needs import ModelValues
from dist_export.dense.found_rows import number_pieces
from dist_export.dense.origins import address_of
from dist_export.dense.overlaps import Layout, find_common, find_overlaps
from dist_export.dense.row_lookup import RowFinder
from dist_export.errors import ModelError
from dist_export.formats.dtypes import DTYPES
from dist_export.model.unwrap import is_lazy, unwrap
from dist_export.runtime.ranks import Ranks

_BYTES_PER_ELEMENT = 64
"""What the comparison of an element takes, with its position."""

_Rows: TypeAlias = tuple[np.ndarray, torch.Tensor]
"""Which of the asked rows are there (bool), and those."""


class _Overlap(NamedTuple):
    """Two tensors of the model of which some elements are the same bytes."""

    one: tuple[str, ...]
    other: tuple[str, ...]
    """The names of each, as those of a tie."""
    layouts: tuple[Layout, Layout]


class _Tie(NamedTuple):
    """One tensor of the model that has several names."""

    names: tuple[str, ...]
    """Within the model, without elements of wrappers; in order."""
    num_rows: int


def refuse_torn_weights(
    ranks: Ranks,
    model: Any,
    finder: RowFinder | None,
    parameters: DenseParameters | None,
    config: ModelValues,
    *,
    max_memory_bytes: int,
) -> None:
    """Compare what the checkpoint has under the names of one tensor, all of it, a piece at a time. All ranks share the pieces.

    Args:
        finder: of tables; None without any. It is asked if its rows are the checkpoint's.
        parameters: of the checkpoint; None where the model in memory is exported, which has one value.

    Raises:
        ModelError: on all ranks, where two of them differ.
    """
    if parameters is None:
        return
    paths = plain_name(config.sparse_model_name), plain_name(config.dense_model_name)
    told = ranks.all_gather("look for tied weights", lambda: _look(unwrap(model), paths))
    ties = sorted({tie for its, _ in told for tie in its})
    overlaps = sorted({overlap for _, its in told for overlap in its})
    if not ties and not overlaps:
        return
    state = ranks.check("read what is tied", parameters.load)
    tables = None if finder is None or finder.is_live or not finder.is_of_source else finder
    held = _Held(state, tables, paths[0])

    def refuse() -> None:
        for tie in ties:
            for one, other in held.pairs(tie):
                read = _Pair(held, one, other)
                pieces = number_pieces(tie.num_rows, held.row_bytes((one, other)), max_memory_bytes)
                for ids in (ids for place, ids in enumerate(pieces) if place % ranks.world_size == ranks.rank):
                    if (row := read.first_apart(ids)) is not None:
                        raise ModelError(_say_torn(one, other, row))
        for overlap in overlaps[ranks.rank :: ranks.world_size]:
            _refuse_torn_overlap(held, overlap, max_memory_bytes)

    ranks.run("compare what is tied", refuse, may_block=True)


def _say_torn(one: str, other: str, row: int) -> str:
    return (
        f"the model has one tensor for {one!r} and {other!r}, but the checkpoint has different values for them, first in row "
        f"{row:,}: the model would hold those of one alone. Nothing was written. Export a checkpoint of this model, or give a "
        "model that does not tie them"
    )


def _refuse_torn_overlap(held: _Held, overlap: _Overlap, max_memory_bytes: int) -> None:
    """Compare what the checkpoint has for the common bytes of two tensors. ModelError where it differs."""
    one, other = held.first_of(overlap.one), held.first_of(overlap.other)
    if one is None or other is None:
        return
    mine, theirs = overlap.layouts
    dtypes = None if mine.dtype == theirs.dtype else (_dtype_of(mine), _dtype_of(theirs))
    if dtypes is not None:
        mine, theirs = mine.as_bytes, theirs.as_bytes
    pair = _Pair(held, one, other)
    rows = mine.rows_within(theirs.begin, theirs.end)
    for ids in number_pieces(len(rows), mine.row_elements * _BYTES_PER_ELEMENT, max_memory_bytes):
        piece = range(rows.start + int(ids[0]), rows.start + int(ids[-1]) + 1)
        if (row := pair.first_apart_in(piece, mine, theirs, dtypes)) is not None:
            raise ModelError(
                f"{one!r} and {other!r} of the model are partly the same memory, but the checkpoint has different values there, "
                f"first in row {row:,} of {one!r}: the model would hold those of one alone. Nothing was written. Export a "
                "checkpoint of this model, or give a model in which each has memory of its own"
            )


def _look(root: nn.Module, arches: tuple[str, str]) -> tuple[list[_Tie], list[_Overlap]]:
    """Return what is registered under several names, and what overlaps in part: one within an arch, and all saved."""
    paths: dict[Any, list[str]] = {}
    tensors: dict[Any, torch.Tensor] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        hidden = module._non_persistent_buffers_set  # noqa: SLF001 -- torch has no public way to ask
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):  # noqa: SLF001 -- its own alone
            if isinstance(tensor, torch.Tensor) and not is_lazy(tensor) and name not in hidden and tensor.numel():
                key = _identity_of(tensor)
                tensors[key] = tensor
                paths.setdefault(key, []).append(f"{path}.{name}" if path else name)
    names = distinct_names(path for its in paths.values() for path in its)
    named = {key: tuple(sorted({names[path] for path in its})) for key, its in paths.items()}
    ties = [
        _Tie(several, len(tensors[key]) if tensors[key].dim() else 1)
        for key, several in named.items()
        if len(several) > 1 and _is_in_arch(several, arches)
    ]
    keys = [key for key, tensor in tensors.items() if address_of(tensor)]
    overlaps = [
        _Overlap(named[keys[one]], named[keys[other]], (mine, theirs))
        for one, other, mine, theirs in find_overlaps({place: tensors[key] for place, key in enumerate(keys)})
        if _is_in_arch((*named[keys[one]], *named[keys[other]]), arches)
    ]
    return ties, overlaps


def _is_in_arch(names: Iterable[str], arches: Iterable[str]) -> bool:
    return any(is_below(name, path) for name in names for path in arches)


def _identity_of(tensor: torch.Tensor) -> Any:
    """Return the same for what lies at one place. What has no memory of its own is itself alone."""
    if not address_of(tensor):
        return id(tensor)
    return tensor.device, tensor.data_ptr(), tensor.shape, tensor.stride(), tensor.dtype


class _Held:
    """What a checkpoint has of names within the model."""

    def __init__(self, state: Mapping[str, Any], tables: RowFinder | None, sparse_path: str) -> None:
        """``tables``: None if no rows are exported, or those of another checkpoint."""
        self._state = state
        self._tables = tables
        self._dense_names = _by_plain_name(state)
        names = [] if tables is None else [name for name in tables.exported_names() if _is_by_row(tables, name)]
        self._table_names = _by_plain_name(names)
        begin = f"{sparse_path}."  # a checkpoint may be of the sparse arch alone
        self._cut = "" if any(name.startswith(begin) for name in self._table_names) else begin

    def pairs(self, tie: _Tie) -> list[tuple[str, str]]:
        """Return the names to compare: the first that the checkpoint has with each other one."""
        aliases = frozenset() if self._tables is None else self._tables.aliases
        there = [name for name in tie.names if self.table_of(name) or self._dense_of(name)]
        there = [name for name in there if name not in aliases]  # it is the very tensor of another name
        return [(there[0], name) for name in there[1:] if not self._is_same_place(there[0], name)]

    def first_of(self, names: Iterable[str]) -> str | None:
        """Return the first of these names that the checkpoint has; None if it has none."""
        return next((name for name in names if self.table_of(name) or self._dense_of(name)), None)

    def table_of(self, name: str) -> str | None:
        """Return the table that has this name within the model; None if it has none."""
        paths = [name, name.removesuffix(".weight")]
        paths += [path.removeprefix(self._cut) for path in paths if self._cut and path.startswith(self._cut)]
        return next((self._table_names[path] for path in paths if path in self._table_names), None)

    def _dense_of(self, name: str) -> str | None:
        return self._dense_names.get(name)

    def _is_same_place(self, one: str, other: str) -> bool:
        """Whether the checkpoint has both as the same bytes of a file, which need not be read. Known of two tables alone."""
        tables = [self.table_of(name) for name in (one, other)]
        return self._tables is not None and None not in tables and self._tables.are_one(*map(str, tables))

    def row_bytes(self, names: Iterable[str]) -> int:
        """Return the bytes of the widest row of any of these tables; of tensors, which are read as a whole, 1."""
        tables = [table for table in map(self.table_of, names) if table is not None]
        return max((self._tables.stored_embedding(its).row_bytes for its in tables if self._tables), default=1)

    def reader(self, name: str) -> Callable[[np.ndarray], _Rows | None]:
        """Return what gives rows by their numbers; nothing for a tensor that cannot be read."""
        table, finder = self.table_of(name), self._tables
        if table is not None and finder is not None:
            slot = finder.stored_embedding(table)
            dtype = getattr(torch, DTYPES[slot.dtype].torch)

            def scan(ids: np.ndarray) -> _Rows:
                found = finder.scan(table, ids)
                rows = torch.from_numpy(found.rows[found.has_row].reshape(-1)).view(dtype)
                return found.has_row, rows.reshape(-1, *slot.inner_shape)

            return scan

        @functools.cache
        def read() -> Any:
            return self._state[self._dense_names[name]]

        def cut(ids: np.ndarray) -> _Rows | None:
            value = read()
            if not isinstance(value, torch.Tensor):  # it is refused, or let pass, where it is loaded
                return None
            whole = value if value.dim() else value.reshape(1)
            return ids < len(whole), whole[int(ids[0]) : int(ids[-1]) + 1]

        return cut


class _Pair:
    """Two names of one tensor."""

    def __init__(self, held: _Held, one: str, other: str) -> None:
        self._readers = [held.reader(name) for name in (one, other)]

    def first_apart(self, ids: np.ndarray) -> int | None:
        """Return the first of these rows (int64, in order, without gaps) that both have, with other values."""
        found = [read(ids) for read in self._readers]
        if any(its is None for its in found):
            return None
        (has_one, one), (has_other, other) = (its for its in found if its is not None)
        has_both = has_one & has_other
        one, other = one[torch.from_numpy(has_both[has_one])], other[torch.from_numpy(has_both[has_other])]
        place = _find_apart(one, other)
        return None if place is None else int(ids[has_both][place])

    def first_apart_in(
        self, rows: range, mine: Layout, theirs: Layout, dtypes: tuple[torch.dtype, torch.dtype] | None
    ) -> int | None:
        """Return the first of these rows with other values for the bytes that both have.

        ``dtypes``: in the model, if they differ; the layouts are those of bytes then.
        """
        at_one, other_rows, at_other = find_common(mine, rows, theirs)
        if not len(at_one):
            return None
        asked = [np.arange(its.start, its.stop, dtype=np.int64) for its in (rows, other_rows)]
        found = [read(ids) for read, ids in zip(self._readers, asked, strict=True)]
        values = []
        for place, layout in enumerate((mine, theirs)):
            its = found[place]
            if its is not None and dtypes is not None:
                its = (
                    its[0],
                    its[1].to(dtypes[place]).contiguous().reshape(-1).view(torch.uint8).reshape(len(its[1]), -1),
                )
            if its is None or (len(its[1]) and its[1][0].numel() != layout.row_elements):
                return None  # it is refused where it is loaded
            values.append(its)
        (has_one, one), (has_other, other) = values
        is_there = has_one[at_one // mine.row_elements] & has_other[at_other // theirs.row_elements]
        order = np.argsort(at_one[is_there], kind="stable")
        at_one, at_other = at_one[is_there][order], at_other[is_there][order]
        apart = _find_apart(_pick(one, has_one, at_one, mine), _pick(other, has_other, at_other, theirs))
        return None if apart is None else rows.start + int(at_one[apart]) // mine.row_elements


def _dtype_of(layout: Layout) -> torch.dtype:
    dtype = getattr(torch, layout.dtype.removeprefix("torch."))
    assert isinstance(dtype, torch.dtype)
    return dtype


def _pick(rows: torch.Tensor, has_row: np.ndarray, positions: np.ndarray, layout: Layout) -> torch.Tensor:
    """Return elements by their positions among the elements of all rows that were asked for, of those that are there."""
    row, within = np.divmod(positions, layout.row_elements)
    place = (np.cumsum(has_row) - 1)[row]
    return rows.reshape(-1)[torch.from_numpy(place * layout.row_elements + within)]


def _find_apart(one: torch.Tensor, other: torch.Tensor) -> int | None:
    """Return the first place where two tensors of one shape have other values; None if they are the same."""
    if one.dtype != other.dtype:
        wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
        one, other = one.to(wide), other.to(wide)
    if has_same_values(one, other):
        return None
    low, high = 0, len(one)
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if has_same_values(one[low:middle], other[low:middle]) else (low, middle)
    return low if high else None


def _by_plain_name(names: Iterable[str]) -> dict[str, str]:
    """Return the names by what they are without elements of wrappers; a name as it stands goes before another one."""
    every = list(names)
    return {plain_name(name): name for name in every} | {name: name for name in every}


def _is_by_row(finder: RowFinder, table: str) -> bool:
    return finder.table_of(table).raw_ids is None
