"""Give the model's embedding tables the checkpoint's rows for one forward, and put back what was there before.

A pre-hook on each table inserts, just before a lookup, the rows of the ids that it is about to look up. A table is a
module with the surface of RecIS's HashTable (``ids()``, ``insert(ids, embeddings)``, ``forward(ids)``), or an
``nn.Embedding`` or ``nn.EmbeddingBag``, which the checkpoint knows by its path within the model, or by that of its weight:
so do the tables of an ``EmbeddingBagCollection`` that is not sharded.
"""

from __future__ import annotations

import contextlib
from collections import Counter
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import numpy as np
import torch
import xxhash
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_export.checkpoint.collisions import find_table
from dist_export.checkpoint.model_weights import plain_name
from dist_export.dense.blame import said
from dist_export.dense.collisions import (
    FurtherRow,
    IdLookups,
    RawIdState,
    is_collision_module,
    put_state,
    read_raw_ids,
    say_changed_ids,
)
from dist_export.dense.model_tables import is_of_library
from dist_export.dense.plain_copy import unwrap
from dist_export.dense.rows import RowFinder
from dist_export.dense.table_names import TableNames
from dist_export.errors import ModelError
from dist_export.layout.dtypes import DTYPES
from dist_export.layout.recis import CHILD_BITS

_ID_MASK = (1 << CHILD_BITS) - 1
_RUN_IDS = 1 << 20
_MAX_WHOLE_ROWS = 100_000
"""Of a table that is put into the model whole, for it is not known which rows are looked up."""


class SampleRows:
    """The ids that a sample looked up, by table, and what it found."""

    def __init__(self) -> None:
        self.asked: Counter[str] = Counter()
        self.missing: Counter[str] = Counter()
        """Ids that the checkpoint has no row of; those that rules leave behind are counted apart."""
        self.left_behind: Counter[str] = Counter()
        self.left_to_model = 0
        """Of these, ids for which the model was left with what it has itself, for the default row was not put in."""
        self.knows_a_table = False
        """Whether a table of the sparse arch, or a parameter that may be one, is a table of the checkpoint."""
        self.unknown_tables: list[str] = []
        self.sharded_tables: list[str] = []
        """Tables that rows cannot be put into, of a model that is exported from memory: it has used its own."""
        self.rows: dict[str, dict[int, str | None]] = {}
        """Table -> id -> xxh3-64 of its row in hexadecimal, None for an id that the table has not."""
        self.other_sizes: list[tuple[str, int, int]] = []
        """Tables by number that have another number of rows in the model: table, rows in the checkpoint, in the model."""

    @property
    def num_found(self) -> int:
        """How many rows came from the checkpoint."""
        return self.asked.total() - self.missing.total() - self.left_behind.total()

    def count(
        self, table: str, ids: np.ndarray, has_row: np.ndarray, rows: np.ndarray, *, num_left_behind: int = 0
    ) -> None:
        """Take in a lookup of ``ids`` (int64, (n,)), its answer (bool, (n,)) and the rows (uint8, (n, row_bytes))."""
        self.asked[table] += len(ids)
        self.missing[table] += int(np.count_nonzero(~has_row)) - num_left_behind
        self.left_behind[table] += num_left_behind
        found = self.rows.setdefault(table, {})
        for number, is_there, row in zip(ids.tolist(), has_row.tolist(), rows, strict=True):
            found[number] = hash_row(row) if is_there else None


def hash_row(row: np.ndarray) -> str:
    """Return the xxh3-64 of a row's bytes, in hexadecimal."""
    return xxhash.xxh3_64_hexdigest(row.data)


@contextlib.contextmanager
def checkpoint_rows(
    sparse_arch: nn.Module, *, sparse_model_name: str, finder: RowFinder, counts: SampleRows
) -> Iterator[None]:
    """Within this block, lookups in the sparse arch give the checkpoint's rows. Every rank for its own tables.

    Rows that the checkpoint overwrote are put back afterwards; rows that were not in a hash table before stay, for its
    surface has no way to take them out.

    Raises:
        ModelError: a hash table that the checkpoint does not have, or with rows of another width; an embedding whose path
            fits several tables.
    """
    undo: list[Callable[[], None]] = []
    handles: list[RemovableHandle] = []
    try:
        names = TableNames(finder, sparse_model_name)
        modules = _modules_with_paths(sparse_arch)
        uses = Counter(
            id(module.weight) for module, _ in modules if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
        )
        with torch.no_grad():
            states = _put_raw_ids(modules, names, finder, undo)
        lookups = _watch_lookups(modules, names, finder, counts, states, handles)
        for module, paths in modules:
            feed = _make_feed(module, paths, names, finder, counts, undo, states, lookups)
            if feed is not None:
                if isinstance(feed, _WeightFeed) and finder.is_live and uses[id(module.weight)] > 1:
                    feed.puts_default = False  # it would be read as the row of the other table that has this weight
                handles.append(module.register_forward_pre_hook(feed.before_lookup, with_kwargs=True))
                if isinstance(feed, _HashFeed):  # before the caller's own hooks, which get what the table gives
                    handles.append(module.register_forward_hook(feed.after_lookup, prepend=True, with_kwargs=True))
                if isinstance(feed, _RawIdFeed):
                    handles.append(module.register_forward_hook(feed.further.take_back, prepend=True, always_call=True))
        if not finder.is_recording:  # the ids that code looks up without a module are not known
            _feed_parameters(modules, names, finder, counts, undo)
        counts.knows_a_table = bool(handles or counts.sharded_tables) or any(
            names.has(name) for name, _ in sparse_arch.named_parameters()
        )
        yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for step in reversed(undo):  # of all tables in one order: two of them may share their rows
                step()


def _feed_parameters(
    modules: list[tuple[nn.Module, list[str]]],
    names: TableNames,
    finder: RowFinder,
    counts: SampleRows,
    undo: list[Callable[[], None]],
) -> None:
    """Give parameters that are tables, and that no module looks rows up in, all of the checkpoint's rows."""
    if finder.is_live:
        return
    fed = {
        id(getattr(module, "weight", None))
        for module, _ in modules
        if isinstance(module, (nn.Embedding, nn.EmbeddingBag))
    }
    bare = [
        (f"{paths[0]}.{name}".removeprefix("."), parameter)
        for module, paths in modules
        if not is_of_library(module)  # a library's sharded table is a part of the whole
        for name, parameter in module._parameters.items()  # noqa: SLF001 -- its own alone
        if parameter is not None and id(parameter) not in fed
    ]
    for path, parameter in bare:
        table = names.find(path) if parameter.dim() == 2 and not hasattr(parameter, "device_mesh") else None
        if table is None or finder.rows_by_number(table) != len(parameter):
            continue
        if len(parameter) > _MAX_WHOLE_ROWS:
            raise ModelError(
                f"table {table!r} is a parameter ({path}) that no embedding module looks rows up in, and with {len(parameter):,} "
                f"rows more than the {_MAX_WHOLE_ROWS:,} that are put into the model for the sample; look them up with an "
                "nn.Embedding"
            )
        shim = nn.Embedding(len(parameter), parameter.shape[1], _weight=parameter.data, _freeze=True)
        _WeightFeed(shim, table, finder, counts, undo).feed(np.arange(len(parameter), dtype=np.int64))


def _modules_with_paths(root: nn.Module) -> list[tuple[nn.Module, list[str]]]:
    """Return each module once, with all its paths. Wrappers are left out: what they wrap is there too."""
    found: dict[int, tuple[nn.Module, list[str]]] = {}
    for path, module in root.named_modules(remove_duplicate=False):
        if unwrap(module) is module:
            found.setdefault(id(module), (module, []))[1].append(path)
    return list(found.values())


def _make_feed(
    module: nn.Module,
    paths: list[str],
    names: TableNames,
    finder: RowFinder,
    counts: SampleRows,
    undo: list[Callable[[], None]],
    states: Mapping[str, RawIdState],
    lookups: Mapping[str, IdLookups],
) -> _Feed | None:
    if callable(getattr(module, "ids", None)) and callable(getattr(module, "insert", None)):
        return _HashFeed(module, names.join(paths[0]), finder, counts, undo)
    if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
        return None
    name = next((name for name in map(names.find, paths) if name is not None), None)
    if name is None:
        counts.unknown_tables.append(plain_name(names.join(paths[0])))
        return None
    if finder.is_live and (name in finder.sharded or hasattr(module.weight, "device_mesh")):
        counts.sharded_tables.append(name)
        return None
    state = states.get(name)
    if state is None and finder.table_of(name).raw_ids is not None:
        raise ModelError(
            f"table {name!r} goes by raw id in the checkpoint, but the model's {names.join(paths[0])} has no managed-collision "
            "module beside it, which maps raw ids to rows; give the model that was trained"
        )
    if state is not None:
        return _RawIdFeed(module, name, finder, counts, undo, state, lookups.get(name))
    return _WeightFeed(module, name, finder, counts, undo)


def _put_raw_ids(
    modules: list[tuple[nn.Module, list[str]]], names: TableNames, finder: RowFinder, undo: list[Callable[[], None]]
) -> dict[str, RawIdState]:
    """Give the managed-collision modules what the checkpoint knows of raw ids; return that by table."""
    states: dict[str, RawIdState] = {}
    tables = {name: finder.table_of(name) for name in finder.exported_names()}
    tables = {name: table for name, table in tables.items() if table.raw_ids is not None}
    for module, paths in modules if tables else ():
        path = names.join(plain_name(paths[0]))
        name = find_table(path, tables) if is_collision_module(module) else None
        if name is not None and name not in states and (state := read_raw_ids(tables[name])) is not None:
            put_state(module, path, state, undo)
            states[name] = state
    return states


def _watch_lookups(
    modules: list[tuple[nn.Module, list[str]]],
    names: TableNames,
    finder: RowFinder,
    counts: SampleRows,
    states: Mapping[str, RawIdState],
    handles: list[RemovableHandle],
) -> dict[str, IdLookups]:
    """Follow the lookups of HashZCH modules, which give an id that they do not know the row of another one; by table."""
    found: dict[str, IdLookups] = {}
    zch = {name: state for name, state in states.items() if state.rows is None}
    for module, paths in modules if zch and not finder.is_recording else ():
        path = names.join(plain_name(paths[0]))
        name = find_table(path, zch) if is_collision_module(module) and not say_changed_ids(module) else None
        if name is None or name in found:
            continue

        def count(num_unknown: int, gets_other: bool, table: str = name) -> None:
            counts.asked[finder.written_name(table)] += num_unknown
            counts.missing[finder.written_name(table)] += num_unknown
            if gets_other:
                finder.mark_replaced(table)

        found[name] = IdLookups(zch[name], is_kept=finder.is_unmodified, count=count)
        handles.append(module.register_forward_hook(found[name].after_lookup, prepend=True, with_kwargs=True))
    return found


class _Feed:
    """What both kinds of table share: which ids were fed already, and how to put rows back."""

    puts_default = False
    """Whether ids that the checkpoint lacks get the table's default row, as in serving."""

    def __init__(
        self, module: nn.Module, finder: RowFinder, counts: SampleRows, undo: list[Callable[[], None]]
    ) -> None:
        self._module = module
        self._finder = finder
        self._counts = counts
        self._undo = undo
        self._fed = np.zeros(0, np.int64)

    def before_lookup(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        ids = self.ids_of(args, kwargs)
        asked = np.unique(ids.detach().reshape(-1).to("cpu", torch.int64).numpy())
        new = np.setdiff1d(asked, self._fed, assume_unique=True)
        self._fed = np.union1d(self._fed, new)
        if len(new):
            with torch.no_grad():
                self.feed(new)

    def ids_of(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> torch.Tensor:
        ids = args[0] if args else kwargs.get("ids", kwargs.get("input"))
        if not isinstance(ids, torch.Tensor):
            raise ModelError(
                f"{type(self._module).__name__} was called with {type(ids).__name__} in the place of its ids; the export "
                "feeds tables that look up a tensor of ids"
            )
        return ids

    def feed(self, ids: np.ndarray) -> None:
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
        return ids[has_row], self.values_of(table, rows[has_row]), self._finder.lacking(table, ids, has_row)

    def values_of(self, table: str, rows: np.ndarray) -> torch.Tensor:
        """Return rows as they are written (uint8, (n, bytes)) in the checkpoint's dtype."""
        slot = self._finder.embedding_of(table)
        dtype = getattr(torch, DTYPES[slot.dtype].torch)
        return torch.from_numpy(self._finder.decode(table, rows).reshape(-1)).view(dtype).reshape(-1, *slot.inner_shape)


class _HashFeed(_Feed):
    """Feeds a hash table through ``insert``. What it lacks is put into its answer, for no id can be taken out again."""

    puts_default = True

    def __init__(
        self, module: nn.Module, path: str, finder: RowFinder, counts: SampleRows, undo: list[Callable[[], None]]
    ) -> None:
        super().__init__(module, finder, counts, undo)
        children = list(getattr(module, "children_hashtable", None) or [])
        is_coalesced = getattr(module, "coalesce", len(children) > 1)
        self._children = children if is_coalesced and children else None
        for name in self._children or [_name_of(module, path)]:
            if not finder.has_table(name):
                raise ModelError(
                    f"the model's table {name!r} ({path}) is not in the checkpoint, which has "
                    f"{', '.join(finder.table_names()) or 'none'}"
                )
        self._path = path
        self._lacking: list[tuple[torch.Tensor, torch.Tensor]] = []
        """Ids as the module is asked for them (int64, (n,)), and the row that it gives for them."""

    def feed(self, ids: np.ndarray) -> None:
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
            bare = np.sort(ids[child_of_id == child] & _ID_MASK)
            self._feed_table(self._children[child], bare, np.uint64(child << CHILD_BITS).astype(np.int64))

    def _feed_table(self, name: str, ids: np.ndarray, high: Any) -> None:
        """Feed one table; ``high`` is what the module's own ids have above the bits of these (int64)."""
        if self._finder.is_recording:
            self._finder.record(name, ids)
            return
        held, rows, lacking = self.rows_of(name, ids)
        self._insert(name, held | high, rows)
        if len(lacking):
            default = self.values_of(name, self._finder.default_row(name)[None])[0]
            self._lacking.append((torch.from_numpy(lacking | high), default))

    def after_lookup(self, _: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> Any:
        """Put the default row in the place of what the table gives for ids without a row, as serving does."""
        ids = self.ids_of(args, kwargs)
        for lacking, default in self._lacking:
            is_lacking = torch.isin(ids, lacking.to(ids.device, ids.dtype))
            if not isinstance(output, torch.Tensor) or output.shape != (*ids.shape, *default.shape):
                self._counts.left_to_model += int(is_lacking.sum())  # it does more than look rows up
                continue
            where = is_lacking.reshape(*ids.shape, *[1] * default.dim())
            output = torch.where(where, default.to(output), output)
        return output

    def _insert(self, name: str, held: np.ndarray, rows: torch.Tensor) -> None:
        if not len(held):
            return
        module: Any = self._module
        live = module.ids()
        device = live.device
        ids = torch.from_numpy(np.ascontiguousarray(held)).to(device)
        is_live = torch.zeros_like(ids, dtype=torch.bool)
        for some in live.reshape(-1).split(_RUN_IDS):  # isin sorts what it is given, so never all of a table
            is_live |= torch.isin(ids, some)
        known = ids[is_live]
        if len(known):
            # forward, not __call__: our own hook must not run again
            before = module.forward(known).detach().clone()
            self._check_width(name, before, rows)
            self._undo.append(lambda: module.insert(known, before.to(device)))
        try:
            module.insert(ids, rows.to(device))
        except Exception as error:
            raise ModelError(
                f"table {name!r}: {self._path} does not take the checkpoint's rows, {rows.dtype} {list(rows.shape[1:])}: "
                f"{said(error)}"
            ) from error
        self._check_width(name, module.forward(ids[:1]), rows)

    def _check_width(self, name: str, own: torch.Tensor, rows: torch.Tensor) -> None:
        if own.shape[1:] != rows.shape[1:]:
            raise ModelError(
                f"table {name!r} has rows of {list(rows.shape[1:])} in the checkpoint, the model's ({self._path}) are "
                f"{list(own.shape[1:])}"
            )


class _WeightFeed(_Feed):
    """Feeds an ``nn.Embedding`` or ``nn.EmbeddingBag``: an id is a row of its weight."""

    puts_default = True

    def __init__(
        self,
        module: nn.Embedding | nn.EmbeddingBag,
        table: str,
        finder: RowFinder,
        counts: SampleRows,
        undo: list[Callable[[], None]],
    ) -> None:
        super().__init__(module, finder, counts, undo)
        self._table = table
        slot = finder.embedding_of(table)
        if slot.inner_shape != (module.embedding_dim,):
            raise ModelError(
                f"table {table!r} has rows of {list(slot.inner_shape)} in the checkpoint, the model has {module.embedding_dim}"
            )
        weight = module.weight
        if hasattr(weight, "full_tensor") or weight.shape != (module.num_embeddings, module.embedding_dim):
            raise ModelError(
                f"table {table!r} is sharded by FSDP or as a DTensor, so rows cannot be put into it for the sample; keep "
                "embedding tables out of fully_shard"
            )
        num_rows = finder.rows_by_number(table)
        if num_rows is not None and num_rows != module.num_embeddings:
            counts.other_sizes.append((table, num_rows, module.num_embeddings))

    def feed(self, ids: np.ndarray) -> None:
        weight: torch.Tensor = self._module.weight.detach()  # type: ignore[operator]
        ids = ids[(ids >= 0) & (ids < len(weight))]  # the module itself complains about the others
        if self._finder.is_recording:
            self._finder.record(self._table, ids)
            return
        held, rows, _ = self.rows_of(self._table, ids)
        # rows that the checkpoint lacks are kept too: with max_norm the lookup itself changes them
        asked = torch.from_numpy(ids).to(weight.device)
        before = weight[asked].clone()

        def put_back() -> None:
            weight[asked] = before

        self._undo.append(put_back)
        if self.puts_default:
            weight[asked] = self.values_of(self._table, self._finder.default_row(self._table)[None]).to(weight)
        weight[torch.from_numpy(held).to(weight.device)] = rows.to(weight)


class _RawIdFeed(_WeightFeed):
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
        super().__init__(module, table, finder, counts, undo)
        self._state = state
        self._lookups = lookups
        self.further = FurtherRow(module)

    def before_lookup(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
        """Feed the rows; a number after the last row, which ``lookups`` gives to unknown ids, is the default row."""
        super().before_lookup(module, args, kwargs)  # passes over numbers that are no row's
        ids = self.ids_of(args, kwargs)
        if self._lookups is None or not bool((ids == len(self._state.ids)).any()):
            return None
        default = self.values_of(self._table, self._finder.default_row(self._table)[None])[0]
        places = self.further.put(ids, default)
        if args:
            return (places, *args[1:]), kwargs
        return args, {**kwargs, "ids" if "ids" in kwargs else "input": places}

    def feed(self, ids: np.ndarray) -> None:
        if self._finder.is_recording:
            ids = ids[(ids >= 0) & (ids < len(self._state.ids))]
            raw = self._state.ids_of(ids)
            self._finder.record(self._table, np.unique(raw[raw != self._state.empty]))
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


def _name_of(module: Any, path: str) -> str:
    name = getattr(module, "name", None)
    if not isinstance(name, str):
        name = getattr(module, "_name", None)
    if not isinstance(name, str):
        raise ModelError(f"the table at {path} has neither a name nor a _name, so its rows cannot be found")
    return name
