"""Put rows of the checkpoint into the hash tables of a model just before it looks them up.

A hash table is a module with the surface of RecIS's: ``ids()``, ``insert(ids, embeddings)`` and ``forward(ids)``.
"""

from __future__ import annotations

import contextlib
import functools
import types
from collections.abc import Callable, Iterator
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.dense.feeds import Feed
from dist_export.dense.hash_access import HashAccess, Learned, memory_of
from dist_export.dense.reads import TableReads
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample_rows import SampleRows
from dist_export.errors import ModelError
from dist_export.formats.recis import CHILD_BITS
from dist_export.model.user_errors import said

_ID_MASK = (1 << CHILD_BITS) - 1


class HashFeed(Feed):
    """Feeds a hash table through ``insert``. What it lacks is put into its answer, for no id can be taken out again."""

    puts_default = True

    def __init__(
        self,
        module: nn.Module,
        path: str,
        finder: RowFinder,
        counts: SampleRows,
        undo: list[Callable[[], None]],
        busy: set[str],
    ) -> None:
        """``busy`` has the tables that are being looked up, and is shared: a table may be wrapped by one of its name."""
        super().__init__(finder, counts, undo, type(module).__name__)
        self._module = module
        self._children = _children_of(module)
        self.tables = tables_of(module, path)
        for name in self.tables:
            if not finder.has_table(name):
                raise ModelError(
                    f"the model's table {name!r} ({path}) is not in the checkpoint, which has "
                    f"{', '.join(finder.table_names()) or 'none'}"
                )
        self._path = path
        self._lacking: list[tuple[str, torch.Tensor, torch.Tensor]] = []
        """Table, ids as the module is asked for them (int64, (n,)), and the row that serving gives for them."""
        self._defaulted = np.zeros(0, np.int64)
        """Those of these ids that have it in the module."""
        self._lookup: Callable[..., Any] = module.forward
        """The module's own."""
        self._access = HashAccess(
            module, self._lookup, finder.learned.setdefault(id(module), Learned()), max_bytes=finder.max_memory_bytes
        )
        self._busy = busy
        self._reads: TableReads | None = None

    def lookup(self, *args: Any, **kwargs: Any) -> Any:
        """Feed, and look up as the module does; in the place of its ``forward``, which code may call by itself, too."""
        if self._is_busy:
            return self._lookup(*args, **kwargs)
        with self._by_itself():
            new = self.new_of(self.numbers_of(self.ids_of(args, kwargs)))
            if len(new):
                self._counts.note_reads(self.tables[0], new)
                with torch.no_grad():
                    self.feed(new)
                if self._reads is not None:
                    self.watch(self._reads)
            if self._children is None:
                self._counts.called.update(map(self._finder.written_name, self.tables))
            output = self.fill(args, kwargs, self._lookup(*args, **kwargs))
            return self._lookup(*args, **kwargs) if output is None else output

    @property
    def _is_busy(self) -> bool:
        """Whether one of the module's methods is called, by itself or by us."""
        return not self._busy.isdisjoint(self.tables)

    @contextlib.contextmanager
    def _by_itself(self) -> Iterator[None]:
        before = set(self._busy)
        self._busy.update(self.tables)
        try:
            yield
        finally:
            self._busy.intersection_update(before)

    def take_over(self, undo: list[Callable[[], None]]) -> None:
        """Stand before the module's methods; ``undo`` gets what gives them back."""
        own: Any = self._module

        def put(name: str, method: Callable[..., Any]) -> None:
            before = vars(own).get(name, self)
            object.__setattr__(own, name, method)
            undo.append(
                lambda: object.__delattr__(own, name) if before is self else object.__setattr__(own, name, before)
            )

        put("forward", self.lookup)
        for name in methods_of(type(own)):
            put(name, functools.partial(self._watch, getattr(own, name), name))

    def _watch(self, method: Callable[..., Any], name: str, *args: Any, **kwargs: Any) -> Any:
        """Call another method of the module, which may give its rows to whoever calls it."""
        if not self._is_busy:
            self.note_unseen(f"{name}()")
        with self._by_itself():
            return method(*args, **kwargs)

    def note_unseen(self, how: str) -> None:
        """Note that rows are read in a way that cannot be fed. What a table reads by itself may be another one's memory."""
        if self._busy:
            return
        for table in self.tables:
            self._counts.unseen[table] = (
                f"it is a hash table that the sparse arch reads by {how}, not by looking ids up"
            )

    def watch(self, reads: TableReads) -> None:
        """Let code that reads the module's memory past its methods be seen, also after rows were put in."""
        self._reads = reads
        reads.forget(self.note_unseen)
        for tensor in memory_of(self._module):
            reads.watch_memory(tensor, self.note_unseen)

    def feed(self, ids: np.ndarray) -> None:
        """Insert the rows of these ids, as the module is asked for them."""
        if self._children is None:
            self._feed_table(_name_of(self._module, self._path), ids, 0)
            return
        child_of_id = (ids.view(np.uint64) >> np.uint64(CHILD_BITS)).astype(np.int64)
        for child in np.unique(child_of_id).tolist():
            if child >= len(self._children):
                raise ModelError(
                    f"the coalesced table {self._path} was asked for child {child}, but has {len(self._children)}: "
                    f"{self._children}"
                )
            id_bits = np.sort(ids[child_of_id == child] & _ID_MASK)
            self._feed_table(self._children[child], id_bits, np.uint64(child << CHILD_BITS).astype(np.int64))

    def _feed_table(self, name: str, ids: np.ndarray, high: Any) -> None:
        """Feed one table; ``high`` is what the module's own ids have above the bits of these (int64)."""
        if self._finder.is_recording:
            self._finder.record(name, ids)
            return
        held, rows, lacking = self.rows_of(name, ids)
        self._insert(name, held | high, rows)
        if len(lacking):
            default = self.values_of(name, self._finder.default_row(name)[None])[0]
            self._lacking.append((name, torch.from_numpy(lacking | high), default))

    def fill(self, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Put the default row in the place of what the table gives for ids without a row, as serving does.

        A table that does more than look rows up gets the default row inserted for them. Returns None where it has to be asked
        once more.
        """
        ids = self.ids_of(args, kwargs)
        for name, lacking, default in self._lacking:
            is_lacking = torch.isin(ids, lacking.to(ids.device, ids.dtype))
            if not bool(is_lacking.any()):
                continue
            is_rows = isinstance(output, torch.Tensor) and output.shape == (*ids.shape, *default.shape)
            if not is_rows or self._access.learned.is_more_than_lookup:
                self._insert_defaults(name, lacking, default)
                output = None
            elif output is not None:
                where = is_lacking.reshape(*ids.shape, *[1] * default.dim())
                output = torch.where(where, default.to(output), output)
        return output

    def _insert_defaults(self, name: str, lacking: torch.Tensor, default: torch.Tensor) -> None:
        new = np.setdiff1d(lacking.numpy(), self._defaulted, assume_unique=True)
        if not len(new):
            return
        self._defaulted = np.union1d(self._defaulted, new)
        with torch.no_grad():
            self._insert(name, new, default.expand(len(new), *default.shape).contiguous())
        if self._reads is not None:
            self.watch(self._reads)

    def _insert(self, name: str, held: np.ndarray, rows: torch.Tensor) -> None:
        """Put rows in. What the table had for these ids itself is put back later; where that cannot be, it is left alone."""
        if not len(held):
            return
        access = self._access
        ids = torch.from_numpy(np.ascontiguousarray(held)).to(access.device)
        is_live, device = access.has_own(ids), access.device
        new, known = ids[~is_live], ids[is_live]
        self._put(name, new, rows[~is_live.cpu()])
        access.learned.inserted = np.union1d(access.learned.inserted, new.cpu().numpy())
        if not len(known):
            return
        own = access.own_rows(known, rows[is_live.cpu()])
        if own is None:
            answer = access.ask(known)
            if answer is not None and answer.shape[1:] != rows.shape[1:]:
                raise self._other_width(name, answer, rows)
            self._counts.unseen[name] = (
                "its forward gives other rows than were inserted, and it has no embeddings() that gives its own, so nothing was "
                "put in the place of rows that could not be put back"
            )
            return
        if own.shape[1:] != rows.shape[1:]:
            raise self._other_width(name, own, rows)
        module: Any = self._module
        self._undo.append(lambda: module.insert(known, own.to(device)))
        self._put(name, known, rows[is_live.cpu()])

    def _put(self, name: str, ids: torch.Tensor, rows: torch.Tensor) -> None:
        if not len(ids):
            return
        try:
            self._access.insert(ids, rows)
        except Exception as error:
            raise ModelError(
                f"table {name!r}: {self._path} does not take the checkpoint's rows, {rows.dtype} {list(rows.shape[1:])}: "
                f"{said(error)}"
            ) from error
        answer = self._access.look_at(ids, rows)
        if answer is not None and answer.shape[1:] != rows.shape[1:]:
            raise self._other_width(name, answer, rows)
        if self._access.keeps_rows:
            self._counts.unseen[name] = (
                "its forward gives rows that it keeps from earlier calls, not those that are inserted"
            )

    def _other_width(self, name: str, own: torch.Tensor, rows: torch.Tensor) -> ModelError:
        return ModelError(
            f"table {name!r} has rows of {list(rows.shape[1:])} in the checkpoint, the model's ({self._path}) are "
            f"{list(own.shape[1:])}"
        )


def tables_of(module: nn.Module, path: str) -> list[str]:
    """Return the table of a hash table module at ``path``, or its tables where it is coalesced. ModelError without a name."""
    return _children_of(module) or [_name_of(module, path)]


def methods_of(kind: type) -> list[str]:
    """Return the public methods that a class adds to ``nn.Module``, without those by which a table is fed."""
    names = {
        name
        for base in kind.__mro__
        if base is not object and not issubclass(nn.Module, base)
        for name, value in vars(base).items()
        if isinstance(value, types.FunctionType) and not name.startswith("_")
    }
    return sorted(name for name in names if not hasattr(nn.Module, name) and name != "insert")


def _children_of(module: Any) -> list[str] | None:
    children = list(getattr(module, "children_hashtable", None) or [])
    is_coalesced = getattr(module, "coalesce", len(children) > 1)
    return children if is_coalesced and children else None


def _name_of(module: Any, path: str) -> str:
    name = getattr(module, "name", None)
    if not isinstance(name, str):
        name = getattr(module, "_name", None)
    if not isinstance(name, str):
        raise ModelError(f"the table at {path} has neither a name nor a _name, so its rows cannot be found")
    return name
