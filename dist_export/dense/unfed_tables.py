"""Hash tables that an export gives no rows: those that the sparse arch does not register, and all of the dense arch."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Collection, Iterator
from typing import Any

import torch
from torch import nn

from dist_export.dense.hash_access import memory_of
from dist_export.dense.origins import address_of
from dist_export.dense.reachable_tables import find_tables, name_of_table, say_table
from dist_export.dense.reads import TableReads
from dist_export.dense.rest_tables import answers_of, refuse_tables_read
from dist_export.dense.sample_rows import SampleRows
from dist_export.errors import ModelError
from dist_export.humanize import few
from dist_export.runtime.ranks import Ranks


@contextlib.contextmanager
def unregistered_seen(
    sparse_arch: nn.Module, path: str, counts: SampleRows, reads: TableReads, *, is_within_table: Callable[[], bool]
) -> Iterator[None]:
    """Within this block, ``counts`` gets the tables that the sparse arch reads and does not register. Any rank, for itself.

    ``is_within_table``: whether a registered table is at work, whose inner ones are its own affair.
    """
    registered = {id(module) for module in sparse_arch.modules()}
    weights = {address_of(tensor) for tensor in sparse_arch.parameters() if tensor.numel()} - {0}
    found = find_tables(sparse_arch, path)

    def is_given(table: nn.Module) -> bool:
        """Whether its rows are those of a registered table, which it has within or whose weight it has, too."""
        held = {address_of(tensor) for tensor in memory_of(table)}
        return not (weights.isdisjoint(held) and registered.isdisjoint(map(id, table.modules())))

    hidden = {place: table for place, table in found.items() if not is_given(table)}

    def note(place: str, table: nn.Module) -> None:
        if is_within_table():
            return
        counts.hidden_tables.setdefault(place, say_table(place, table))
        counts.unseen[name_of_table(table) or place] = f"the sparse arch does not register it ({place})"

    with _seen(sparse_arch, hidden, note, reads):
        yield


@contextlib.contextmanager
def dense_tables_refused(dense_arch: nn.Module, path: str, tables: Collection[str]) -> Iterator[None]:
    """Refuse, at the end of this block, the tables that the dense arch has read. Rank 0. ModelError.

    Args:
        dense_arch: the copy that is traced.
        path: of the dense arch.
        tables: names of the checkpoint's. Any other table passes if all that it holds is in the dense arch's state_dict.
    """
    state = dense_arch.state_dict(keep_vars=True).values()
    # extra state is of any class
    saved = {address_of(value) for value in state if isinstance(value, torch.Tensor)} - {0}
    found = find_tables(dense_arch, path)
    read: dict[str, nn.Module] = {}

    def is_loaded(table: nn.Module) -> bool:
        held = {address_of(tensor) for tensor in memory_of(table)}
        names = {name_of_table(table), *(getattr(table, "children_hashtable", None) or ())}
        return names.isdisjoint(tables) and bool(held) and held <= saved

    others = {place: table for place, table in found.items() if not is_loaded(table)}
    reads = TableReads()
    try:
        with _seen(dense_arch, others, read.setdefault, reads), reads.within(dense_arch):
            yield
    except Exception as error:
        if not read:
            raise
        try:
            refuse_tables_read(read, sorted(read))
        except ModelError as refused:
            raise refused from error
    refuse_tables_read(read, sorted(read))


@contextlib.contextmanager
def _seen(
    arch: nn.Module,
    tables: dict[str, nn.Module],
    note: Callable[[str, nn.Module], Any],
    reads: TableReads,
) -> Iterator[None]:
    """Within this block, ``note`` gets those of the tables that ``arch`` reads while it is called."""
    is_running = False

    def begin(*_: Any) -> None:
        nonlocal is_running
        is_running = True

    def end(*_: Any) -> None:
        nonlocal is_running
        is_running = False

    def take(place: str, _: Any) -> None:
        if is_running:
            note(place, tables[place])

    with contextlib.ExitStack() as stack:
        for place, table in tables.items():
            called = functools.partial(_first, take, place)  # it may fail for its rows, and give no answer
            stack.callback(nn.Module.register_forward_pre_hook(table, called).remove)
            for tensor in memory_of(table):
                reads.watch_memory(tensor, lambda _, place=place, table=table: take(place, table))  # type: ignore[misc]
        stack.callback(nn.Module.register_forward_pre_hook(arch, begin, prepend=True).remove)
        stack.callback(nn.Module.register_forward_hook(arch, end, always_call=True).remove)
        stack.enter_context(answers_of(tables, take))
        yield


def _first(take: Callable[[str, Any], None], place: str, table: nn.Module, _: Any) -> None:
    take(place, table)


def refuse_unregistered_tables(ranks: Ranks, rows: SampleRows, *, is_exported: bool) -> list[str]:
    """Refuse tables that the sparse arch reads and does not register: they are given no rows. All ranks.

    ``is_exported``: whether tables are exported; else a note is enough. Returns notes. Raises ModelError, on all ranks.
    """
    told = ranks.all_gather("look for tables that are not registered", lambda: sorted(rows.hidden_tables.values()))
    every = sorted({table for its in told for table in its})

    def refuse() -> None:
        if every and is_exported:
            raise ModelError(
                f"the sparse arch looks ids up in {few(every)}, which it does not register: an export finds tables among "
                "registered modules alone, so the scores would be those of the model's own rows. Nothing was written. "
                "Register the table as a module of the sparse arch, for example in nn.ModuleList or nn.ModuleDict in place of "
                "a list, dict, object or closure"
            )

    ranks.check("refuse tables that are not registered", refuse)
    return [f"{table} is not registered in the sparse arch: the sample used the model's own rows" for table in every]
