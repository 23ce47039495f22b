"""What the model has once and the checkpoint under several names: it must have the same values under all of them.

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
from dist_export.dense.row_lookup import RowFinder
from dist_export.errors import ModelError
from dist_export.formats.dtypes import DTYPES
from dist_export.model.unwrap import is_lazy, unwrap
from dist_export.runtime.ranks import Ranks

_Rows: TypeAlias = tuple[np.ndarray, torch.Tensor]
"""Which of the asked rows are there (bool), and those."""


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
    told = ranks.all_gather("look for tied weights", lambda: list(_list_ties(unwrap(model), paths)))
    if not (ties := sorted({tie for its in told for tie in its})):
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

    ranks.run("compare what is tied", refuse, may_block=True)


def _say_torn(one: str, other: str, row: int) -> str:
    return (
        f"the model has one tensor for {one!r} and {other!r}, but the checkpoint has different values for them, first in row "
        f"{row:,}: the model would hold those of one alone. Nothing was written. Export a checkpoint of this model, or give a "
        "model that does not tie them"
    )


def _list_ties(root: nn.Module, arches: Iterable[str]) -> Iterable[_Tie]:
    """Yield what is registered under several names, one of them within an arch, and is saved."""
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
    for key, its in paths.items():
        several = tuple(sorted({names[path] for path in its}))
        if len(several) > 1 and any(is_below(name, path) for name in several for path in arches):
            yield _Tie(several, len(tensors[key]) if tensors[key].dim() else 1)


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
        if one.dtype != other.dtype:
            wide = torch.complex128 if one.is_complex() or other.is_complex() else torch.float64
            one, other = one.to(wide), other.to(wide)
        if has_same_values(one, other):
            return None
        low, high = 0, int(has_both.sum())
        while high - low > 1:
            middle = (low + high) // 2
            low, high = (middle, high) if has_same_values(one[low:middle], other[low:middle]) else (low, middle)
        return int(ids[has_both][low]) if high else None


def _by_plain_name(names: Iterable[str]) -> dict[str, str]:
    """Return the names by what they are without elements of wrappers; a name as it stands goes before another one."""
    every = list(names)
    return {plain_name(name): name for name in every} | {name: name for name in every}


def _is_by_row(finder: RowFinder, table: str) -> bool:
    return finder.table_of(table).raw_ids is None
