"""Compare a checkpoint with a package: its rows as an export would write them, each id looked up, and the dense parameters."""

from __future__ import annotations

import glob
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, get_args

import msgspec
import numpy as np

from dist_export.checkpoint.detect import AUTO, DCP, SAFETENSORS, TORCH, detect_format
from dist_export.checkpoint.metadata import Checkpoint, SlotMeta, TableMeta
from dist_export.checkpoint.model_weights import ModelWeights, plain_name
from dist_export.checkpoint.row_reader import RowReader
from dist_export.config.schema import ExportConfig
from dist_export.config.sparse_settings import CastDtype
from dist_export.delta.mismatch import describe_slot, describe_slot_entry
from dist_export.diff.dense import compare_state, list_state
from dist_export.diff.entries import DenseDiff, PackageDiff, ScoresDiff, TableDiff
from dist_export.diff.layers import count_rows, is_row_indexed
from dist_export.diff.rows import COPIES, MOST_ROWS, compare_slot
from dist_export.errors import UserError
from dist_export.formats.recis import EMBEDDING_SLOT, ID_SLOT
from dist_export.formats.row_encodings import RowCast
from dist_export.humanize import few
from dist_export.manifest import Manifest, SlotEntry, TableEntry
from dist_export.package.reader import Package
from dist_export.pipeline.inputs import find_dense
from dist_export.pipeline.planning import choose_tables, open_tables, plan_sparse
from dist_export.plan.casts import cast_of
from dist_export.plan.plan import SparsePlan
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import run_threads
from dist_export.storage.directory import Directory
from dist_export.verify.work_split import share_out

_THREADS = 2
_NO_MODULE = "."
"""The path of no module."""
NOT_COMPARED = "rows and dense parameters are compared with a checkpoint: not the code of the dense arch, and no scores"
NO_DENSE = (
    "only rows are compared with this checkpoint, which has no dense parameter of the package's names; and no scores"
)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class _Paired:
    """A table of the checkpoint, and the same of the package."""

    number: int
    """Of the checkpoint's."""
    entry: TableEntry
    slots: tuple[tuple[SlotMeta, RowCast | None, SlotEntry], ...]
    """Those that are compared: as the checkpoint stores them, how they are cast, and as the package has them."""
    others: tuple[str, ...]
    not_compared: str = ""


class _Run(NamedTuple):
    """Rows ``first`` to ``last`` - 1 of a part of the checkpoint."""

    table: str
    part: int
    first: int
    last: int
    num_bytes: int


class _Counts(NamedTuple):
    """What a run holds; ``missing`` are rows that the package lacks."""

    table: str
    same: int
    changed: int
    missing: int
    max_abs: float


def settings_as(package: Manifest, checkpoint: Checkpoint) -> dict[str, Any]:
    """Return the settings with which an export of a checkpoint writes tables, slots and dtypes as a package has them."""
    entries = {_name_of(table): table for table in package.tables}
    left_out = () if package.left_out_tables is msgspec.UNSET else package.left_out_tables
    names = [table.name for table in checkpoint.tables]
    found: dict[str, Any] = {"keep_slots": [], "drop_slots": [], "rename_tables": {}, "dtype": []}
    found["drop_tables"] = [glob.escape(its.name) for its in left_out if its.name in names and its.name not in entries]
    for table in checkpoint.tables:
        entry = entries.get(table.name)
        if entry is None:
            continue
        pattern, kept = glob.escape(table.name), {slot.name: slot for slot in entry.kept}
        if entry.name != table.name:
            found["rename_tables"][pattern] = entry.name
        slot = kept[EMBEDDING_SLOT]
        dtype = slot.dtype if slot.encoding is msgspec.UNSET else "int8"
        if dtype in get_args(CastDtype):
            found["dtype"].append({pattern: dtype})
        for its in table.slots:
            if its.name not in (ID_SLOT, EMBEDDING_SLOT):
                found["keep_slots" if its.name in kept else "drop_slots"].append(f"{pattern}.{glob.escape(its.name)}")
    return found


def compare_checkpoint(
    ranks: Ranks, directory: Directory, package: Package, given: Mapping[str, Any], *, is_first: bool
) -> PackageDiff:
    """Compare rows and dense parameters of a checkpoint with those of a package, a delta with its base. All ranks.

    Args:
        ranks: they share the rows.
        directory: of the checkpoint.
        package: open, on each rank.
        given: settings of the checkpoint, and ``max_memory``.
        is_first: whether the checkpoint is A.

    Raises:
        CheckpointError: it cannot be read, or has an id twice, unless ``on_duplicate`` says which row counts.
        PlanError: the settings do not fit it.
    """
    config = ExportConfig(
        ckpt_dir=directory.location.given,
        export_dir=package.directory.location.given,
        filter_sparse_opt=True,
        num_shards=1,
        **given,
    )
    weights = ranks.run("look at the tables", lambda: _weights_of(directory, package.manifest, given))
    opened = open_tables(ranks, directory, config, weights=weights)
    asked = ranks.run("look at the package", lambda: config.with_changes(**settings_as(package.manifest, opened)))
    # an id that the checkpoint has twice is refused here: which of its rows is to be compared?
    plan = plan_sparse(ranks, choose_tables(ranks, opened, asked), asked, world_size=ranks.world_size).plan
    pairs = {its.entry.name: its for its in _pair_tables(plan, package)}
    budget = config.max_memory_bytes // _THREADS
    runs = [run for its in pairs.values() for run in _cut_runs(plan.checkpoint, its, max_bytes=budget)]
    shares = share_out(np.array([run.num_bytes for run in runs], np.int64), ranks.world_size * _THREADS)
    mine = [runs[share] for share in shares[ranks.rank * _THREADS : (ranks.rank + 1) * _THREADS]]

    def read() -> list[_Counts]:
        found = run_threads(lambda share: _compare_runs(plan, package, pairs, share), mine)
        return [count for share in found for count in share]

    counts = [count for its in ranks.all_gather("compare the rows", read) for count in its]
    tables = ranks.run("add up", lambda: _add_counts(plan, package, pairs, counts, is_first=is_first))

    def compare_parameters() -> tuple[DenseDiff | None, list[str]]:
        parameters = find_dense(config, directory, opened, weights)
        if package.manifest.dense is None or parameters is None:
            return DenseDiff(), []
        held = parameters.load()
        values, unnamed = list_state(package, held)
        return compare_state(held, values, is_first=is_first), unnamed

    dense, unnamed = ranks.broadcast("compare the dense parameters", compare_parameters)
    names = [directory.url, package.directory.url]
    digests = ["", package.manifest.digest]
    rules = () if package.manifest.prune is msgspec.UNSET else package.manifest.prune
    told = ["no rules", msgspec.json.encode(rules).decode()]
    order = (0, 1) if is_first else (1, 0)
    return PackageDiff(
        a=names[order[0]],
        b=names[order[1]],
        digest_a=digests[order[0]],
        digest_b=digests[order[1]],
        tables=tables,
        dense=dense or DenseDiff(),
        scores=ScoresDiff(),
        settings={"prune": (told[order[0]], told[order[1]])} if rules else {},
        not_compared=_say_not_compared(dense, unnamed),
    )


def _say_not_compared(dense: DenseDiff | None, unnamed: Sequence[str]) -> str:
    told = NOT_COMPARED if dense is not None else NO_DENSE
    lacks = f"; nor {few(list(unnamed))} of the score program, of which the checkpoint has no tensor by that name"
    return told + (lacks if unnamed else "")


def _weights_of(directory: Directory, package: Manifest, given: Mapping[str, Any]) -> ModelWeights | None:
    """Return which tensors are tables, where the checkpoint does not say it: those of the package, as far as they are there."""
    asked = given.get("format", AUTO)
    if given.get("treat_as_tables") or detect_format(directory, asked=asked) not in (DCP, SAFETENSORS, TORCH):
        return None
    tables = frozenset(plain_name(_name_of(table)) for table in package.tables)
    return ModelWeights(sparse_name="", dense_name=_NO_MODULE, tables=tables, elsewhere=frozenset())


def _pair_tables(plan: SparsePlan, package: Package) -> list[_Paired]:
    """Return the tables that both have."""
    entries = {table.name: table for table in package.manifest.tables}
    return [
        _pair(number, table, plan.selection.kept[number], entries[table.name], package)
        for number, table in enumerate(plan.checkpoint.tables)
        if table.name in entries
    ]


def _pair(number: int, table: TableMeta, kept: Sequence[SlotMeta], entry: TableEntry, package: Package) -> _Paired:
    ours = {slot.name: slot for slot in kept if slot.name != ID_SLOT}
    theirs = {slot.name: slot for slot in entry.kept if slot.name != ID_SLOT}
    others = [f"slot {name!r} is only in the checkpoint" for name in ours if name not in theirs]
    others += [f"slot {name!r} is only in the package" for name in theirs if name not in ours]
    slots = []
    for name, slot in ours.items():
        other = theirs.get(name)
        if other is None:
            continue
        if describe_slot(slot) == describe_slot_entry(other):
            stored = table.slots[slot.column]
            slots.append((stored, cast_of(stored, slot), other))
        else:
            others.append(
                f"slot {name!r} is {describe_slot(slot)} in the checkpoint, {describe_slot_entry(other)} in the package"
            )
    reason = ""
    if is_row_indexed(package, entry) and table.has_ids:
        reason = "the checkpoint has a hash table, the package a row-indexed table"
    elif not any(other.name == EMBEDDING_SLOT for *_, other in slots):
        reason = "the rows of both are of different kinds"
    return _Paired(number=number, entry=entry, slots=tuple(slots), others=tuple(others), not_compared=reason)


def _cut_runs(checkpoint: Checkpoint, paired: _Paired, *, max_bytes: int) -> list[_Run]:
    if paired.not_compared:
        return []
    width = max((slot.row_bytes for slot, *_ in paired.slots), default=1)
    step = int(min(MOST_ROWS, max(1, max_bytes // (COPIES * (width + 8)))))
    runs = []
    for part in checkpoint.parts.of_table(paired.number):
        rows = int(checkpoint.parts.rows[part])
        for first in range(0, rows, step):
            last = min(first + step, rows)
            runs.append(_Run(paired.entry.name, part, first, last, (last - first) * width))
    return runs


def _compare_runs(
    plan: SparsePlan, package: Package, pairs: Mapping[str, _Paired], runs: Iterable[_Run]
) -> list[_Counts]:
    with RowReader(plan.checkpoint) as reader:
        return [_compare_run(plan, package, pairs[run.table], run, reader) for run in runs]


def _compare_run(plan: SparsePlan, package: Package, paired: _Paired, run: _Run, reader: RowReader) -> _Counts:
    table, num_rows = plan.checkpoint.tables[paired.number], run.last - run.first
    raw = np.empty(num_rows * 8, np.uint8)
    reader.read_into(raw, run.part, 0, run.first, num_rows)
    ids = raw.view(np.int64)
    is_row = np.ones(num_rows, bool) if table.empty_id is None else ids != table.empty_id
    is_row[plan.dropped.rows_in(run.part, run.first, num_rows)] = False
    has_row, is_changed, max_abs = is_row, np.zeros(num_rows, bool), 0.0
    for stored, cast, entry in paired.slots:
        held = np.empty(num_rows * stored.row_bytes, np.uint8)
        reader.read_into(held, run.part, stored.column, run.first, num_rows)
        rows = held.reshape(num_rows, stored.row_bytes)
        rows = rows if cast is None else cast.encode(rows)
        found, has_row = package.lookup(run.table, ids, slot=entry.name, raw=True)
        is_other, most = compare_slot(found, rows, entry, entry, has_row & is_row)
        is_changed |= is_other
        max_abs = max(max_abs, most)
    num_missing = int(np.count_nonzero(is_row & ~has_row))
    num_changed = int(np.count_nonzero(is_changed))
    return _Counts(
        run.table, int(np.count_nonzero(is_row)) - num_missing - num_changed, num_changed, num_missing, max_abs
    )


def _add_counts(
    plan: SparsePlan, package: Package, pairs: Mapping[str, _Paired], counts: Sequence[_Counts], *, is_first: bool
) -> tuple[TableDiff, ...]:
    def describe(name: str, ours: int, theirs: int, **more: Any) -> TableDiff:
        """``ours`` and ``theirs``: rows that only the checkpoint has, and only the package."""
        new, deleted = (theirs, ours) if is_first else (ours, theirs)
        return TableDiff(name=name, new=new, deleted=deleted, **more)

    found = []
    checkpoint = plan.checkpoint
    for number, table in enumerate(checkpoint.tables):
        rows = int(checkpoint.parts.rows[checkpoint.parts.of_table(number)].sum())
        paired = pairs.get(table.name)
        if paired is None:
            found.append(describe(table.name, rows, 0, slots=("the table is only in the checkpoint",)))
            continue
        total = count_rows(paired.entry)
        if paired.not_compared:
            reason = paired.not_compared
            found.append(describe(table.name, rows, total, slots=paired.others, not_compared=reason))
            continue
        its = [count for count in counts if count.table == table.name]
        same, changed, missing = (sum(getattr(count, name) for count in its) for name in ("same", "changed", "missing"))
        left = total - same - changed
        if left < 0:
            raise UserError(
                f"{package.directory.url}: table {table.name!r} has more rows than its manifest says; `verify` tells more"
            )
        most = max((count.max_abs for count in its), default=0.0)
        found.append(describe(table.name, missing, left, same=same, changed=changed, max_abs=most, slots=paired.others))
    names = {table.name for table in checkpoint.tables}
    only = [entry for entry in package.manifest.tables if entry.name not in names]
    where = ("the table is only in the package",)
    return (*found, *(describe(entry.name, 0, count_rows(entry), slots=where) for entry in only))


def _name_of(table: TableEntry) -> str:
    """Return the name that the trainer has for a table."""
    return table.name if table.source_name is msgspec.UNSET else table.source_name
