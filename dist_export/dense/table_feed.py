"""Give the model's embedding tables the checkpoint's rows for one forward, and put back what was there before.

Just before rows are read, those of the checkpoint are put there. A table is a module with the surface of RecIS's HashTable
(``ids()``, ``insert(ids, embeddings)``, ``forward(ids)``), or a matrix (the weight of an ``nn.Embedding`` or ``nn.EmbeddingBag``,
another parameter, a buffer), which the checkpoint knows by its path within the model, or by that of its module: so do the
tables of an ``EmbeddingBagCollection`` that is not sharded. However a matrix is read, the operator that reads it is seen.
"""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping
from typing import Any

import torch
from torch import nn
from torch.utils.hooks import RemovableHandle

from dist_export.checkpoint.model_weights import plain_name
from dist_export.dense.feeds import RawIdFeed, WeightFeed
from dist_export.dense.hash_feed import HashFeed
from dist_export.dense.origins import Origins, address_of
from dist_export.dense.reads import TableReads
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample_rows import SampleRows
from dist_export.dense.table_names import TableNames
from dist_export.dense.unfed_tables import unregistered_seen
from dist_export.errors import ModelError
from dist_export.model.managed_collisions import (
    IdLookups,
    RawIdState,
    find_mapped,
    is_collision_module,
    put_state,
    read_raw_ids,
    say_changed_ids,
)
from dist_export.model.sparse_tables import constants_of, is_hash_table, is_of_library, say_computed
from dist_export.model.unwrap import is_lazy, list_modules


@contextlib.contextmanager
def checkpoint_rows(
    sparse_arch: nn.Module, *, sparse_model_name: str, finder: RowFinder, counts: SampleRows
) -> Iterator[None]:
    """Within this block, what the sparse arch reads of tables is the checkpoint's. Every rank for its own tables.

    Rows that the checkpoint overwrote are put back afterwards; rows that were not in a hash table before stay, for its
    surface has no way to take them out.

    Raises:
        ModelError: a hash table that the checkpoint does not have, or with rows of another width; an embedding whose path
            fits several tables.
    """
    undo: list[Callable[[], None]] = []
    handles: list[RemovableHandle] = []
    busy: set[str] = set()
    reads = TableReads(Origins(sparse_arch, sparse_model_name, counts), lambda: bool(busy))
    try:
        names = TableNames(finder, sparse_model_name)
        modules = list_modules(sparse_arch)
        with torch.no_grad():
            states = _put_raw_ids(modules, names, finder, undo)
        lookups = _watch_lookups(modules, names, finder, counts, states, handles)
        feeds = _Feeds(names, finder, counts, undo, reads, handles, busy)
        for module, paths in modules:
            feeds.add_module(module, paths, states, lookups)
        for module, paths in modules:
            feeds.add_tensors(module, paths)
        feeds.watch()
        counts.tables |= feeds.tables
        feeds.flip()
        feeds.look_into_scripts(modules)
        counts.knows_a_table = bool(feeds.tables or counts.sharded_tables) or any(
            names.has(name) for name, _ in sparse_arch.named_parameters()
        )
        hidden = unregistered_seen(sparse_arch, sparse_model_name, counts, reads, is_within_table=lambda: bool(busy))
        with hidden, reads.within(sparse_arch):
            yield
    finally:
        for handle in handles:
            handle.remove()
        with torch.no_grad():
            for step in reversed(undo):  # of all tables in one order: two of them may share their rows
                step()


class _Feeds:
    """What feeds the tables of one sparse arch."""

    def __init__(
        self,
        names: TableNames,
        finder: RowFinder,
        counts: SampleRows,
        undo: list[Callable[[], None]],
        reads: TableReads,
        handles: list[RemovableHandle],
        busy: set[str],
    ) -> None:
        """``busy`` has the hash tables that are being looked up."""
        self._names = names
        self._finder = finder
        self._counts = counts
        self._undo = undo
        self._reads = reads
        self._handles = handles
        self._by_weight: dict[int, list[WeightFeed]] = {}
        """id() of a weight -> what feeds it: one for each module that has it."""
        self._unknown: list[tuple[str, torch.Tensor]] = []
        """Embeddings whose own name is no table's."""
        self.tables: set[str] = set()
        """Tables of the checkpoint that the model has."""
        self._hashed: list[HashFeed] = []
        self._busy = busy

    def add_module(
        self,
        module: nn.Module,
        paths: list[str],
        states: Mapping[str, RawIdState],
        lookups: Mapping[str, IdLookups],
    ) -> None:
        """Take in a module that is a table by itself."""
        names, finder = self._names, self._finder
        if is_hash_table(module):
            feed = HashFeed(module, names.join(paths[0]), finder, self._counts, self._undo, self._busy)
            feed.take_over(self._undo)
            self._hashed.append(feed)
            self.tables.update(feed.tables)
            return
        if not isinstance(module, (nn.Embedding, nn.EmbeddingBag)):
            return
        path = plain_name(names.join(paths[0]))
        self._counts.embeddings.append(path)
        computed = say_computed(module)
        if computed:
            self._counts.computed[path] = computed
        name = next((name for name in map(names.find, paths) if name is not None), None)
        if name is None:
            self._unknown.append((path, module.weight))
            return
        if computed:  # rows are put into what is thrown away
            self._counts.unseen[name] = f"the weight of {path} is computed by {computed}, so no rows can be put into it"
        if self._is_sharded(name, module.weight):
            return
        state = states.get(name)
        if state is None and finder.table_of(name).raw_ids is not None:
            raise ModelError(
                f"table {name!r} goes by raw id in the checkpoint, but the model's {names.join(paths[0])} has no "
                "managed-collision module beside it, which maps raw ids to rows; give the model that was trained"
            )
        if module.weight.shape != (module.num_embeddings, module.embedding_dim):
            raise ModelError(_SHARDED.format(name))
        weight_feed: WeightFeed
        if state is not None:
            raw = RawIdFeed(module, name, finder, self._counts, self._undo, state, lookups.get(name))
            self._handles.append(module.register_forward_hook(raw.further.take_back, prepend=True, always_call=True))
            weight_feed = raw
        else:
            weight_feed = WeightFeed(module.weight, name, finder, self._counts, self._undo, kind=type(module).__name__)
        self._add(weight_feed, module.weight)
        self._hook(module, weight_feed)

    def _hook(self, module: nn.Module, feed: WeightFeed) -> None:
        """Follow the calls of a module. Its arguments are ids where it is torch's own; else the operators tell them."""

        def feed_first(own: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Any:
            with self._reads.unseen():
                return feed.before_lookup(own, args, kwargs)

        def enter(*_: Any) -> None:
            self._reads.enter(feed)

        def leave(*_: Any) -> None:
            self._reads.leave(feed)

        is_plain = type(module).forward in (nn.Embedding.forward, nn.EmbeddingBag.forward)
        if is_plain and "forward" not in vars(module):
            self._handles.append(module.register_forward_pre_hook(feed_first, with_kwargs=True))
        self._handles.append(module.register_forward_pre_hook(enter))
        self._handles.append(module.register_forward_hook(leave, prepend=True, always_call=True))

    def add_tensors(self, module: nn.Module, paths: list[str]) -> None:
        """Take in parameters and buffers that are tables by their names, whatever module has them."""
        for name, tensor in (*module._parameters.items(), *module._buffers.items()):  # noqa: SLF001 -- its own alone
            if not isinstance(tensor, torch.Tensor) or is_lazy(tensor) or tensor.dim() != 2:
                continue
            if id(tensor) in self._by_weight or is_collision_module(module):
                continue
            its = [f"{path}.{name}".removeprefix(".") for path in paths] + (paths if name == "weight" else [])
            found = (self._names.find(path) for path in its if path)
            table = next((table for table in found if table is not None), None)
            if table is None or self._is_sharded(table, tensor):
                continue
            shape = self._finder.rows_by_number(table), *self._finder.embedding_of(table).inner_shape
            if is_of_library(module) and shape != tuple(tensor.shape):
                self._counts.unseen[table] = (
                    f"the model's {self._names.join(plain_name(paths[0]))} ({type(module).__name__}) holds a part of it, or lays "
                    "it out in another way"
                )
                continue
            self._add(WeightFeed(tensor, table, self._finder, self._counts, self._undo), tensor)

    def _is_sharded(self, table: str, weight: torch.Tensor) -> bool:
        """Whether no rows can be put into a weight, as FSDP and DTensor have it; noted, or an error where it need not be."""
        is_sharded = hasattr(weight, "device_mesh") or hasattr(weight, "full_tensor")
        if self._finder.is_live and (table in self._finder.sharded or is_sharded):
            if table not in self._counts.sharded_tables:
                self._counts.sharded_tables.append(table)
            return True
        if is_sharded:
            raise ModelError(_SHARDED.format(table))
        return False

    def _add(self, feed: WeightFeed, weight: torch.Tensor) -> None:
        self._by_weight.setdefault(id(weight), []).append(feed)
        self.tables.add(feed.table)

    def watch(self) -> None:
        """Begin to watch the memory of all that was taken in."""
        weights = [feed for its in self._by_weight.values() for feed in its]
        for its in self._by_weight.values():
            for feed in its:
                feed.sharing = [other for other in its if other.table != feed.table]
                feed.own_undo = its[0].own_undo
                if self._finder.is_live and len({feed.table for feed in its}) > 1:
                    feed.puts_default = False  # it would be read as the row of the other table that has this weight
                self._reads.watch(feed)
        known = {address_of(feed.weight) for feed in weights} - {0}
        # a weight that another module has, too, is fed by that one's name
        self._counts.unknown_tables += [path for path, weight in self._unknown if address_of(weight) not in known]
        for hashed in self._hashed:
            hashed.watch(self._reads)

    def flip(self) -> None:
        """Change the memory of tables whose rows that nobody asks for are to show in the blocks, if any is read all the same.

        Bits are flipped in place, so that it costs no memory, and the same again puts them back.
        """
        done: set[tuple[int, ...]] = set()
        for feed in (feed for its in self._by_weight.values() for feed in its):
            weight = feed.weight
            span = address_of(weight), weight.storage_offset(), *weight.shape, *weight.stride()
            # memory that nothing was ever written to becomes real by a flip
            can_flip = (
                weight.dtype in _FLIPS and weight.numel() * weight.element_size() <= self._finder.max_memory_bytes
            )
            if feed.table in self._finder.flipped and can_flip and span not in done:
                done.add(span)
                flip_bits(weight)
                self._undo.insert(0, functools.partial(flip_bits, weight))

    def look_into_scripts(self, modules: list[tuple[nn.Module, list[str]]]) -> None:
        """Note tables that may be constants of scripted code, as ``torch.jit.freeze`` makes them: they have no names."""
        finder = self._finder
        for module, paths in modules:
            shapes = constants_of(module)
            for table in finder.exported_names() if shapes else ():
                shape = finder.rows_by_number(table), *finder.embedding_of(table).inner_shape
                if table not in self.tables and shape in shapes:
                    self._counts.unseen[table] = (
                        f"{self._names.join(plain_name(paths[0])) or 'the sparse arch'} is scripted and has a constant of its "
                        "shape, as torch.jit.freeze makes of a weight; give the module that is not frozen"
                    )


_FLIPS = {
    torch.float64: (torch.int64, 0x3F0123456789ABCD),
    torch.float32: (torch.int32, 0x38123456),
    torch.bfloat16: (torch.int16, 0x3812),
    torch.float16: (torch.int16, 0x1256),
}
"""Of a dtype: the integers of its size, and bits to flip. No usual value stays near what it was, and 0 becomes another one."""


def flip_bits(weight: torch.Tensor) -> None:
    """Change all values of a weight, of a dtype of ``_FLIPS``, in place; twice gives what was there before."""
    integers, bits = _FLIPS[weight.dtype]
    with torch.no_grad():
        weight.view(integers).bitwise_xor_(bits)


_SHARDED = (
    "table {!r} is sharded by FSDP or as a DTensor, so rows cannot be put into it for the sample; keep embedding tables out of "
    "fully_shard"
)


def _put_raw_ids(
    modules: list[tuple[nn.Module, list[str]]], names: TableNames, finder: RowFinder, undo: list[Callable[[], None]]
) -> dict[str, RawIdState]:
    """Give the managed-collision modules what the checkpoint knows of raw ids; return that by table."""
    states: dict[str, RawIdState] = {}
    tables = {name: finder.table_of(name) for name in finder.exported_names()}
    tables = {name: table for name, table in tables.items() if table.raw_ids is not None}
    for module, paths in modules if tables else ():
        path = names.join(plain_name(paths[0]))
        name = find_mapped(path, finder.table_names(), tables) if is_collision_module(module) else None
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
        is_zch = is_collision_module(module) and not say_changed_ids(module)
        name = find_mapped(path, finder.table_names(), zch) if is_zch else None
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
