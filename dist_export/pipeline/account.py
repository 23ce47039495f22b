"""The account of a source's payload: each tensor and byte is exported, in the program, dropped for a reason, or left out by name.

Pure. What the account adds up to is compared with :class:`~dist_export.checkpoint.payload.Payload`, which comes from headers and
metadata before anything is told apart.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from typing import NamedTuple

import msgspec

from dist_export.checkpoint.detect import RECIS
from dist_export.checkpoint.extra_state import EXTRA_STATE
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.model_weights import plain_name
from dist_export.checkpoint.payload import DENSE, STATE, Payload, count_payload, other_tensor
from dist_export.errors import CommitError
from dist_export.formats.dtypes import DTYPES
from dist_export.humanize import count, few
from dist_export.manifest import AccountEntry, AccountTensor, TableEntry
from dist_export.pipeline.planning import PlannedSparse
from dist_export.plan.dropped_rows import account_for
from dist_export.plan.plan import SparsePlan
from dist_export.plan.selection import BY_OPTIMIZER, BY_TRAINER, is_trainer_state
from dist_export.reporting.account_text import say_account

LIVE = "live"
EXPORTED, IN_PROGRAM, DROPPED, LEFT_OUT = "exported", "in_program", "dropped", "left_out"
BY_CAST = "cast"
NO_MODEL, NOT_TAKEN, NO_TABLES = "no_model", "not_served", "need_export_sparse"
"""Why a tensor is in no file: no model is exported, the model's dense arch does not have it, or no tables are exported."""

DenseMeta = Sequence[tuple[str, str, tuple[int, ...]]]


class TableFate(NamedTuple):
    """What becomes of a table's rows."""

    rows_in: int
    rows_out: int
    rows_dropped: Mapping[str, int]


class Fates(NamedTuple):
    """What becomes of dense tensors."""

    in_program: Collection[str] | None
    """Names of those that the program takes; None where there is no program."""
    is_filtered: bool
    """Whether trainer state is dropped: the filter is on."""
    as_ids: frozenset[str] = frozenset()
    """Names of those that raw ids are read from."""
    collision_modules: frozenset[str] = frozenset()
    """The modules that these are of; what else is in them is trainer state."""


def fates_by_entry(tables: Sequence[TableEntry]) -> list[TableFate]:
    """Return what became of the rows of each table, as the check of the written files has it."""
    return [TableFate(entry.rows_in, entry.rows_out, entry.rows_dropped) for entry in tables]


def fates_by_plan(planned: PlannedSparse) -> list[TableFate]:
    """Return what is to become of the rows of each table."""
    plan, fates = planned.plan, []
    for number in range(len(plan.checkpoint.tables)):
        rows = int(plan.checkpoint.parts.rows[plan.checkpoint.parts.of_table(number)].sum())
        dropped = account_for(plan.checkpoint, plan.dropped, number, pruned=planned.census.pruned, pruning=plan.pruning)
        fates.append(TableFate(rows, rows - dropped.rows, dropped.rows_by_reason))
    return fates


def _add_dense(payload: Payload, dense_state: DenseMeta) -> Payload:
    """Return the payload with the dense parameters that lie apart from it: in ``model.pt``, or in a model in memory."""
    tensors, num_bytes = count_payload((dtype, shape) for _, dtype, shape in dense_state)
    others = tuple(other_tensor(name, dtype, shape, DENSE) for name, dtype, shape in dense_state)
    return replace(
        payload,
        tensors=payload.tensors + tensors,
        num_bytes=payload.num_bytes + num_bytes,
        others=(*payload.others, *others),
    )


def account_export(
    checkpoint: Checkpoint | None,
    planned: PlannedSparse | None,
    tables: Sequence[TableFate],
    *,
    dense_state: DenseMeta,
    taken: Collection[str] | None,
    held: Collection[str] = frozenset(),
    is_filtered: bool,
    has_carried: bool = False,
) -> AccountEntry | msgspec.UnsetType:
    """Return the account of an export or of a plan, once it adds up; none where the source does not tell what it holds.

    Args:
        checkpoint: the source; None where it has no tables.
        planned: None where no tables are exported.
        tables: what becomes of each table of the plan.
        dense_state: (name, torch dtype name, shape) of the dense parameters of the source.
        taken: names of those that the program takes; None where there is no program.
        held: names, without wrappers, of what the score program has of the sparse arch.
        is_filtered: ``filter_sparse_opt``.
        has_carried: whether the tables of the plan are those of a base, and none of the source is exported.

    Raises:
        CommitError: a tensor or a byte is in none of the account's parts, or in two.
    """
    if checkpoint is None or checkpoint.payload is None:
        return msgspec.UNSET
    payload = checkpoint.payload
    if checkpoint.format in (RECIS, LIVE) and not checkpoint.has_state_tables:
        payload = _add_dense(payload, dense_state)
    if taken is not None and held:
        taken = {*taken, *(other.name for other in payload.others if plain_name(other.name) in held)}
    fates = Fates(taken, is_filtered=planned is not None and is_filtered)
    plan = None if planned is None else planned.plan
    account = make_account(payload, checkpoint, plan, None if has_carried else tables, fates)
    check_account(account, payload, checkpoint.directory.url)
    return account


def make_account(
    payload: Payload,
    checkpoint: Checkpoint,
    plan: SparsePlan | None,
    tables: Sequence[TableFate] | None,
    dense: Fates,
) -> AccountEntry:
    """Return the account.

    Args:
        payload: of the source, dense parameters included.
        checkpoint: the source as the settings see it.
        plan: None where nothing of the sparse files is exported.
        tables: what becomes of each table of the plan; None where none of the source is exported.
        dense: what becomes of dense tensors.
    """
    ledger = _Ledger(payload.aliases)
    if plan is not None and tables is not None:
        for number, fate in enumerate(tables):
            ledger.add_table(plan, number, fate)
    else:
        ledger.add_unexported(checkpoint)
    if plan is not None:
        for tensor in plan.selection.kept_dense:
            ledger.add(EXPORTED, "", tensor.num_bytes)
        for tensor, reason in plan.selection.dropped_dense:
            ledger.add(DROPPED, reason, tensor.num_bytes)
    else:
        for tensor in checkpoint.dense:
            ledger.add(LEFT_OUT, NO_TABLES, tensor.num_bytes)
    for table in checkpoint.left_out:
        ledger.add(LEFT_OUT, table.reason, table.num_bytes, tensors=table.tensors)
    if plan is not None:
        as_ids, modules = plan.checkpoint.raw_id_tensors()
        dense = dense._replace(as_ids=as_ids, collision_modules=modules)
    names = dict(payload.aliases)
    taken = None if dense.in_program is None else {names.get(name, name) for name in dense.in_program}
    for other in payload.others:
        became, reason = _fate_of(other.name, other.kind, dense._replace(in_program=taken))
        ledger.add(became, reason, other.num_bytes)
        ledger.others.append(
            AccountTensor(
                name=other.name,
                dtype=other.dtype,
                shape=other.shape,
                num_bytes=other.num_bytes,
                fate=became,
                reason=reason,
            )
        )
    return ledger.close()


def check_account(account: AccountEntry, payload: Payload, where: str) -> None:
    """Hold the account against the source. CommitError where a tensor or a byte is in none of its parts, or in two."""
    if (account.tensors, account.num_bytes) != (payload.tensors, payload.num_bytes):
        raise CommitError(
            f"{where}: the account of its payload does not add up: it holds {count(payload.tensors, 'tensor')} with "
            f"{payload.num_bytes:,} bytes, but the account has {account.tensors:,} with {account.num_bytes:,} bytes "
            f"({say_account(account)}). No manifest was written, so there is no package; report this"
        )


def _fate_of(name: str, kind: str, fates: Fates) -> tuple[str, str]:
    """Return what becomes of a tensor in no table, and why."""
    taken, is_filtered = fates.in_program, fates.is_filtered
    if name in fates.as_ids:
        return EXPORTED, ""
    if name.rpartition(".")[0] in fates.collision_modules:
        return DROPPED, BY_TRAINER
    if kind == STATE:
        return DROPPED, BY_OPTIMIZER
    if kind != DENSE:
        return LEFT_OUT, kind
    if is_filtered and is_trainer_state(name):
        return DROPPED, BY_TRAINER
    if taken is None:
        return LEFT_OUT, NO_MODEL
    module, mark, _ = name.partition(f".{EXTRA_STATE}")  # a module's extra state may be several tensors
    return (IN_PROGRAM, "") if name in taken or (mark and module + mark in taken) else (LEFT_OUT, NOT_TAKEN)


def list_dense_left(dense_state: DenseMeta, plan: SparsePlan) -> list[str]:
    """Return the dense parameters of the checkpoint that no file of a package of tables alone holds."""
    in_shards = {tensor.name for tensor in plan.selection.kept_dense}
    _, modules = plan.checkpoint.raw_id_tensors()  # whose state is in the shards as ids, or for training alone
    return [name for name, _, _ in dense_state if name not in in_shards and name.rpartition(".")[0] not in modules]


def note_dense_left(names: Sequence[str], checkpoint: Checkpoint) -> list[str]:
    """Return what is to be told of :func:`list_dense_left`."""
    if not names:
        return []
    listed = "The merged manifest lists them, as RecIS's does; with" if checkpoint.is_of_recis else "With"
    note = (
        f"{count(len(names), 'dense tensor')} of the checkpoint ({few(names)}): no file of the package holds their values, "
        f"because only tables are exported. {listed} model and dataset they are in the exported program"
    )
    return [note]


class _Ledger:
    """Sums up."""

    def __init__(self, aliases: Sequence[tuple[str, str]]) -> None:
        self._aliases = dict(aliases)
        self._counted: set[str] = set()
        self._tensors = 0
        self._sums: dict[str, Counter[str]] = {fate: Counter() for fate in (EXPORTED, IN_PROGRAM, DROPPED, LEFT_OUT)}
        self.others: list[AccountTensor] = []

    def add(self, fate: str, reason: str, num_bytes: int, *, tensors: int = 1) -> None:
        self._sums[fate][reason] += num_bytes
        self._tensors += tensors

    def add_table(self, plan: SparsePlan, number: int, fate: TableFate) -> None:
        """Take in a table, unless another one is the same tensor."""
        table = plan.checkpoint.tables[number]
        if not self._is_first(plan.checkpoint, table.name_in_source):
            return
        stored = {slot.column: slot for slot in table.stored_slots()}
        for slot in plan.slots_of(number):
            if slot.column not in stored:
                continue  # numbers of rows, written as ids
            before, after = stored[slot.column].row_bytes, slot.row_bytes
            self.add(EXPORTED, "", fate.rows_out * min(before, after))
            if before > after:
                self._sums[DROPPED][BY_CAST] += fate.rows_out * (before - after)
            for reason, rows in fate.rows_dropped.items():
                self._sums[DROPPED][reason] += rows * before
        for slot, reason in plan.selection.dropped[number]:
            self.add(DROPPED, reason, slot.num_bytes(fate.rows_in))

    def add_unexported(self, checkpoint: Checkpoint) -> None:
        """Take in the tables, where none of them is exported."""
        for number, table in enumerate(checkpoint.tables):
            if not self._is_first(checkpoint, table.name_in_source):
                continue
            rows = int(checkpoint.parts.rows[checkpoint.parts.of_table(number)].sum())
            stored = table.stored_slots()
            sizes = [slot.num_bytes(rows) for slot in stored]
            self.add(LEFT_OUT, NO_TABLES, sum(sizes), tensors=len(stored))
            self.others += [
                AccountTensor(
                    name=f"{table.name_in_source}.{slot.name}",
                    dtype=DTYPES[slot.dtype].torch,
                    shape=(rows, *slot.inner_shape) if slot.stored_shape is None else slot.stored_shape,
                    num_bytes=size,
                    fate=LEFT_OUT,
                    reason=NO_TABLES,
                )
                for slot, size in zip(stored, sizes, strict=True)
            ]

    def _is_first(self, checkpoint: Checkpoint, name: str) -> bool:
        """Whether a table is the first of those that are one tensor of the source."""
        names = {table.name_in_source for table in checkpoint.tables} | {table.name for table in checkpoint.left_out}
        source = self._aliases.get(name, name)
        is_first = source not in self._counted and (name == source or source not in names)
        if is_first:
            self._counted.add(source)
        return is_first

    def close(self) -> AccountEntry:
        sums = {fate: {reason: size for reason, size in its.items() if size} for fate, its in self._sums.items()}
        return AccountEntry(
            tensors=self._tensors,
            num_bytes=sum(its.total() for its in self._sums.values()),
            exported=sum(sums[EXPORTED].values()),
            in_program=sum(sums[IN_PROGRAM].values()),
            dropped=dict(sorted(sums[DROPPED].items())),
            left_out=dict(sorted(sums[LEFT_OUT].items())),
            others=tuple(self.others),
        )
