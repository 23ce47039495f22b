"""Open the source on all ranks and plan the sparse part: the stages that end in a plan that every rank agrees on."""

from __future__ import annotations

import functools
import os
from collections.abc import Callable, Collection, Mapping
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import numpy as np

from dist_export.checkpoint.combined import join_checkpoints
from dist_export.checkpoint.detect import AUTO, RECIS, open_reader
from dist_export.checkpoint.dynamicemb_widths import confirm_widths
from dist_export.checkpoint.fallback_rows import find_fallbacks, needs_fallbacks, set_fallbacks
from dist_export.checkpoint.id_reader import first_source_of
from dist_export.checkpoint.metadata import Checkpoint, CheckpointReader
from dist_export.checkpoint.model_weights import ModelWeights
from dist_export.checkpoint.package_reader import PackageReader
from dist_export.checkpoint.package_source import find_package
from dist_export.checkpoint.recis.plain_tables import find_state_tables, note_state_tables, open_state
from dist_export.checkpoint.recis.reader import RecisReader
from dist_export.checkpoint.tensor_settings import TensorSettings
from dist_export.config.prune_rules import ALLOW_LIST, parse_rules
from dist_export.config.source_needs import (
    CheckpointTensors,
    ChosenTables,
    KeptSlots,
    OpenedTables,
    PlannedTables,
    PrunedRows,
)
from dist_export.delta.same_rows import BaseRows
from dist_export.dense.source_rows import SourceRows
from dist_export.errors import CheckpointError, CommitError, ExportError, PlanError
from dist_export.formats.id_list import IdList
from dist_export.formats.tuning import STANDARD, Tuning
from dist_export.ids.lists import read_id_list
from dist_export.package.reader import Package
from dist_export.package.served_table import estimate_bytes
from dist_export.pipeline.counting import count_rows, search_rest
from dist_export.plan.casts import cast_slots, check_defaults, round_defaults
from dist_export.plan.census import (
    Census,
    ranks_of_parts,
    share_parts,
)
from dist_export.plan.dropped_rows import drop_duplicates, drop_nothing
from dist_export.plan.memory_budget import MemoryBudget
from dist_export.plan.plan import SparsePlan
from dist_export.plan.prune import Pruning, plan_pruning
from dist_export.plan.prune_report import refuse_empty_tables
from dist_export.plan.selection import Selection, select, select_all
from dist_export.plan.shard_layout import plan_copy, plan_shards
from dist_export.plan.table_view import TableSettings, view_tables
from dist_export.plan.target_slices import Targets, plan_targets, resolve_num_shards
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import keep_freed_memory
from dist_export.storage.directory import Directory
from dist_export.transfer.duplicates import DuplicateIds, find_duplicate_rows
from dist_export.transfer.prune_filter import find_pruned

T = TypeVar("T")
_DEFAULT_THREADS = 4

_LISTS_SHARE = 4
"""All lists of ids together may take this part of ``max_memory``."""


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class PlannedSparse:
    """A plan, the census that it came from, and what each rank may hold while it carries the plan out."""

    plan: SparsePlan
    census: Census
    budget: MemoryBudget
    same: BaseRows | None = None
    """What a delta leaves to its base; None for a full package."""

    @property
    def id_lists(self) -> dict[str, np.ndarray]:
        """Path -> ids (int64, sorted) of the files that rules of ``prune`` name."""
        return {} if self.plan.pruning is None else {path: its.ids for path, its in self.plan.pruning.lists.items()}


def open_checkpoint(
    ranks: Ranks,
    directory: Directory,
    *,
    asked: str = AUTO,
    settings: TensorSettings = TensorSettings(),  # noqa: B008 -- immutable
) -> Checkpoint:
    """Read the indexes and, shared over the ranks, the headers. All ranks. CheckpointError is everyone's.

    Arguments as those of :func:`~dist_export.checkpoint.detect.open_reader`.
    """
    return read_metadata(ranks, lambda: open_reader(directory, asked=asked, settings=settings))


def tensor_settings_of(config: CheckpointTensors, weights: ModelWeights | None) -> TensorSettings:
    """Return what the settings say of the tensors of a checkpoint, and the model, where one is exported."""
    return TensorSettings(
        treat_as_tables=tuple(config.treat_as_tables),
        optimizer_slots=tuple(config.optimizer_slots),
        weights=weights,
        state_root=config.state_root,
        model_paths=(config.sparse_model_name, config.dense_model_name),
    )


def open_written(ranks: Ranks, directory: Directory, plan: SparsePlan) -> Checkpoint:
    """Read the headers and indexes of shards that were written by a plan, as a server finds them. All ranks.

    Default rows are those of the plan: they stand in the manifest, which is still to be written. So is what managed-collision
    modules of the source know, by which the model asks for rows.

    Raises:
        CommitError: they do not make whole tables. A failed export, where a source that does not is the user's mistake.
    """
    if all(table.is_hashed for table in plan.checkpoint.tables):
        written = read_metadata(ranks, lambda: RecisReader(directory), is_written=True)
    else:
        files = [file.name for file in plan.files]
        written = read_metadata(ranks, lambda: PackageReader(directory, files), is_written=True)
    planned = {table.name: table for table in plan.checkpoint.tables}
    tables = tuple(
        replace(table, default_row=planned[table.name].default_row, raw_ids=planned[table.name].raw_ids)
        if table.name in planned
        else table
        for table in written.tables
    )
    return replace(written, tables=tables)


def read_metadata(
    ranks: Ranks, open_it: Callable[[], CheckpointReader[Any]], *, is_written: bool = False
) -> Checkpoint:
    """Read the headers, shared over the ranks, with the reader that each rank opens. All ranks.

    CheckpointError is everyone's; CommitError in its place if the files ``is_written`` by this export.
    """

    def judged(work: Callable[[], T]) -> Callable[[], T]:
        return functools.partial(_blame_export, work) if is_written else work

    reader = ranks.check("open the checkpoint", judged(open_it))
    size = -(-len(reader.files) // ranks.world_size)
    mine = range(min(ranks.rank * size, len(reader.files)), min((ranks.rank + 1) * size, len(reader.files)))
    shares = ranks.all_gather("read the headers", judged(lambda: reader.read_headers(mine)))
    return ranks.check("match headers and indexes", judged(lambda: reader.assemble(shares)))


def _blame_export(work: Callable[[], T]) -> T:
    try:
        return work()
    except CheckpointError as error:
        # it is no checkpoint, and nobody has another copy of it
        fact = str(error).removesuffix(". Copy the checkpoint again, or take an earlier one")
        raise CommitError(f"{fact}. No manifest was written, so there is no package; run the export again") from error


def open_tables(
    ranks: Ranks,
    directory: Directory,
    config: OpenedTables,
    find_model_dims: Callable[[], Mapping[str, Collection[int]]] = dict,
    weights: ModelWeights | None = None,
) -> Checkpoint:
    """Open the source as what follows sees it: with the tables that are exported, under their new names. All ranks.

    ``find_model_dims`` returns the dimensions of the model's tables by name, where there is a model, and
    ``weights`` are what it says of the checkpoint's tensors.
    """
    checkpoint = open_checkpoint(ranks, directory, asked=config.format, settings=tensor_settings_of(config, weights))
    if checkpoint.format == RECIS and weights is not None and find_package(directory) is None:
        checkpoint = _add_state_tables(ranks, checkpoint, weights, is_filtered=bool(config.filter_sparse_opt))
    chosen = choose_tables(ranks, checkpoint, config)
    if needs_fallbacks(chosen):
        unknown = chosen
        rows = ranks.broadcast("read the rows of unknown ids", lambda: find_fallbacks(unknown))
        chosen = set_fallbacks(chosen, rows)
    if not config.dynamicemb_dims and all(table.width_confirmed_by is None for table in chosen.tables):
        return chosen  # the source states all dimensions
    return ranks.check(
        "compare the dimensions", lambda: confirm_widths(chosen, config.dynamicemb_dims, find_model_dims())
    )


def _add_state_tables(ranks: Ranks, checkpoint: Checkpoint, weights: ModelWeights, *, is_filtered: bool) -> Checkpoint:
    """Return a RecIS checkpoint with the model's tables that lie in ``model.pt``; a copy of files gets a warning instead."""
    directory, known = checkpoint.directory, [table.name for table in checkpoint.tables]
    held = ranks.broadcast("look for tables in model.pt", lambda: find_state_tables(directory, weights, known))
    if held is None:
        return checkpoint
    if not is_filtered:
        return replace(checkpoint, warnings=(*checkpoint.warnings, note_state_tables(directory, held)))
    state = read_metadata(ranks, lambda: open_state(directory, held))
    return ranks.check("put the tables together", lambda: join_checkpoints(checkpoint, state, kind=RECIS))


def choose_tables(ranks: Ranks, checkpoint: Checkpoint, config: ChosenTables) -> Checkpoint:
    """Return the source as what follows sees it. All ranks."""
    asked = TableSettings(
        select=config.select_tables,
        drop=config.drop_tables,
        rename=config.rename_tables,
        to_hash_tables=config.to_hash_tables,
        default_row=config.default_row,
    )
    return ranks.check(
        "choose the tables",
        lambda: round_defaults(view_tables(checkpoint, asked), config.default_row, config.dtypes),
    )


def choose(
    checkpoint: Checkpoint, config: KeptSlots, world_size: int
) -> tuple[Selection, tuple[Targets, ...], int | None]:
    """Plan the first stage, from headers alone: what is kept, the target slices, the number of shards."""
    if not config.filter_sparse_opt:
        if checkpoint.copy_hindrances:
            raise PlanError(
                f"{checkpoint.directory.url} cannot be copied as it is: {checkpoint.copy_hindrances[0]}. "
                "Set filter_sparse_opt: true, which writes new shards"
            )
        return select_all(checkpoint), plan_targets(checkpoint, None), None
    selection = select(
        checkpoint,
        optimizer_slots=tuple(config.optimizer_slots),
        drop_slots=tuple(config.drop_slots),
        keep_slots=tuple(config.keep_slots),
    )
    selection = cast_slots(checkpoint, selection, config.dtypes)
    check_defaults(checkpoint, selection)
    num_shards = resolve_num_shards(checkpoint, config.num_shards or "world_size", world_size=world_size)
    return selection, plan_targets(checkpoint, num_shards), num_shards


def plan_sparse(
    ranks: Ranks,
    checkpoint: Checkpoint,
    config: PlannedTables,
    *,
    world_size: int,
    base: Package | None = None,
    leaving: Pruning | None = None,
    tuning: Tuning = STANDARD,
) -> PlannedSparse:
    """Choose, count the id columns (each rank its share), lay out. All ranks; nothing is written.

    Rows that ``base`` has with the same bytes are left out; ``checkpoint`` is then one that fits it. ``leaving`` are rules that
    take the place of those of the settings. ``tuning``: the sizes of pieces, which become those of the budget.

    Raises:
        PlanError: settings that this checkpoint cannot meet, or whose rules leave nothing of a table.
        CheckpointError: an id that stands twice in a table, where ``on_duplicate`` is ``error``.
        ExportError: ranks that came to different plans, for they do not see the same source.
    """
    selection, targets, num_shards = ranks.check("choose what to keep", lambda: choose(checkpoint, config, world_size))
    pruning = ranks.check("read the rules for rows", lambda: leaving or read_pruning(checkpoint, config))

    def look() -> tuple[MemoryBudget, str]:
        room = config.max_memory_bytes - pruning.num_bytes - estimate_bytes(base)
        return MemoryBudget(room, count_threads(config.threads), tuning), checkpoint.digest_traces()

    # machines may have other cores and mount the source in other ways, and all ranks need one plan with one digest
    budget, disk_state = ranks.broadcast("share out the memory", look)
    checkpoint = replace(checkpoint, disk_state=disk_state)
    shares = share_parts(checkpoint, ranks.world_size * budget.threads)
    keep_freed_memory()
    duplicates = DuplicateIds(checkpoint, most=None if config.on_duplicate == "error" else budget.dropped_rows)

    def count(rules: Pruning, found: DuplicateIds) -> Census:
        return count_rows(ranks, checkpoint, targets, shares, budget, rules, found)

    def compare(dropped_in: Callable[[int, int, int], np.ndarray] | None = None) -> tuple[BaseRows | None, Pruning]:
        if base is None:
            return None, pruning
        open_rows = functools.partial(BaseRows, is_exact=config.compare == "exact", ignored=config.delta_ignore_slots)
        same = open_rows(checkpoint, selection, base, dropped_in=dropped_in, piece_bytes=tuning.compared_bytes)
        return same, pruning.leaving(same, ranks_of_parts(shares, budget.threads, len(checkpoint.parts)))

    same, rules = ranks.check("open the tables of the base", compare)
    census = count(rules, duplicates)
    search_rest(ranks, checkpoint, census, budget, duplicates)
    repair = config.on_misplaced == "repair" if config.filter_sparse_opt else None
    ranks.check("look for misplaced rows", lambda: _refuse_misplaced(checkpoint, census, repair=repair))
    dropped = drop_nothing()
    if config.on_duplicate != "error":
        found = find_duplicate_rows(ranks, checkpoint, duplicates, budget, pruning)
        dropped = drop_duplicates(checkpoint, found, keep=config.on_duplicate)
        if base is not None and len(dropped):  # of rows with one id, the wrong ones may have been compared
            same, rules = ranks.check("open the tables of the base", lambda: compare(dropped.rows_in))
            census = count(rules, DuplicateIds(checkpoint, most=budget.dropped_rows))

    def lay_out() -> SparsePlan:
        if config.on_empty_table == "error" and leaving is None:
            refuse_empty_tables(checkpoint, rules, census.pruned)
        if config.filter_sparse_opt:
            return plan_shards(
                checkpoint, selection, targets, census, num_shards=num_shards, dropped=dropped, pruning=rules
            )
        return plan_copy(checkpoint, selection)

    plan = ranks.check("lay out the shards", lay_out)
    _refuse_different(ranks, plan)
    return PlannedSparse(plan=plan, census=census, budget=budget, same=same)


def describe_source_rows(checkpoint: Checkpoint | None, planned: PlannedSparse | None) -> SourceRows | None:
    """Return the rows of the source, and which of them the plan leaves out. Without a plan none is."""
    if checkpoint is None:
        return None
    if planned is None:
        return SourceRows(checkpoint=checkpoint)
    return SourceRows(
        checkpoint=checkpoint,
        misplaced=planned.census.misplaced,
        dropped_in=planned.plan.dropped.rows_in,
        is_pruned=find_pruned(planned.plan.checkpoint, planned.plan.pruning and planned.plan.pruning.of_settings()),
    )


def describe_row_indexed_tables(plan: SparsePlan) -> list[str]:
    """Return a note on row-indexed tables, which not every server reads; nothing without such tables."""
    names = [table.name for table in plan.checkpoint.tables if not table.is_hashed]
    if not names:
        return []
    told = ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")
    what = f"{len(names)} tables are row-indexed" if len(names) > 1 else "1 table is row-indexed"
    return [f"{what} ({told}); for a server that reads hash tables alone set to_hash_tables"]


def read_pruning(checkpoint: Checkpoint, config: PrunedRows) -> Pruning:
    """Read the files that ``prune`` names, and say which rule applies to which table. Every rank for itself."""
    lists: dict[str, IdList] = {}
    room = config.max_memory_bytes // _LISTS_SHARE
    rules = parse_rules(config.prune)
    for place, rule in enumerate(rules):
        if rule.path and rule.path not in lists:
            setting = f"prune[{place}].{'allow' if rule.reason == ALLOW_LIST else 'deny'}"
            ids = read_id_list(rule.path, most_bytes=room, setting=setting, storage_options=config.storage_options)
            if not len(ids) and rule.reason == ALLOW_LIST:
                raise PlanError(f"{setting}: {rule.path} holds no ids, so every row would be pruned")
            lists[rule.path] = IdList(ids)
            room -= ids.nbytes
    return plan_pruning(checkpoint, rules, lists)


def count_threads(asked: int | None) -> int:
    """Return how many threads a rank gets: by default the cores that it has to itself, 4 at most."""
    if asked is not None:
        return asked
    ranks_here = int(os.environ.get("LOCAL_WORLD_SIZE", "1"))
    return max(1, min(_DEFAULT_THREADS, len(os.sched_getaffinity(0)) // max(ranks_here, 1)))


def _refuse_different(ranks: Ranks, plan: SparsePlan) -> None:
    """Raise ExportError on all ranks if they have different plans. All ranks."""
    digests = ranks.all_gather("compare the plans", lambda: plan.digest)
    if len(set(digests)) == 1:
        return

    def refuse() -> None:
        told = "; ".join(f"rank {rank}: {digest}" for rank, digest in enumerate(digests))
        raise ExportError(
            f"the ranks came to different plans, so they do not see the same {plan.checkpoint.directory.url} ({told}). "
            "Nothing was written. Check that it is one shared directory whose files no longer change"
        )

    ranks.run("agree on the plan", refuse)


def _refuse_misplaced(checkpoint: Checkpoint, census: Census, *, repair: bool | None) -> None:
    """Refuse rows outside the slice of their part where they are to stay, in a copy (None), or are said to be an error."""
    wrong = np.flatnonzero(census.misplaced)
    if not len(wrong) or repair:
        return
    part = int(wrong[0])
    table = int(checkpoint.parts.table[part])
    rows = int(census.misplaced[checkpoint.parts.of_table(table)].sum())
    tables = len(np.unique(checkpoint.parts.table[wrong]))
    others = f" ({tables - 1} more tables have some too)" if tables > 1 else ""
    file = first_source_of(checkpoint, part)
    claimed = checkpoint.parts.slice_of(part)
    raise PlanError(
        f"{checkpoint.directory.url} {'cannot be copied as it is' if repair is None else 'cannot be exported'}: "
        f"{rows:,} rows of table {checkpoint.tables[table].name!r} lie in another part's slice{others}, where RecIS's "
        f"loader drops them silently; the first part with such rows is {checkpoint.blocks.key[part, 0]!r} in {file}: "
        f"{int(census.misplaced[part]):,} of its {int(checkpoint.parts.rows[part]):,} rows lie outside "
        f"{claimed.begin}:{claimed.end} of {claimed.size}. "
        + (
            "Set filter_sparse_opt: true, which moves them to the slice that owns them (on_misplaced: repair)"
            if repair is None
            else "on_misplaced is error; set on_misplaced: repair, which moves them to the slice that owns them, or save the "
            "checkpoint anew"
        )
    )
