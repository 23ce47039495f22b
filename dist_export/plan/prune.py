"""Find the rows that the rules of ``prune`` leave out. A rule reads the id of a row or one of its slots. Pure.

Pruned rows are never listed. The census evaluates the rules once, and each gather evaluates them again on the same bytes.
Both results must agree, so the order of all arithmetic here does not depend on how many rows are evaluated at a time.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from fnmatch import fnmatchcase
from typing import NamedTuple, Protocol

import numpy as np
import xxhash

from dist_export.checkpoint.metadata import Checkpoint, SlotMeta, TableMeta
from dist_export.checkpoint.row_reader import RowReader
from dist_export.config.prune_rules import ALLOW_LIST, DENY_LIST, EMPTY, NORM, REPLACED, SAME, SLOT_VALUE, RowRule
from dist_export.errors import PlanError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.id_list import IdList
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.formats.row_encodings import decode_int8
from dist_export.plan.table_view import find_mistake

KEPT = 0
"""The code of a row to which no rule applies. Other codes are 1 + the index of the rule among the rules of its table."""


class LeftRows(Protocol):
    """Tells which rows another package makes needless: a base has the same bytes, or a delta has a newer row.

    See ``delta/same_rows.py`` and ``delta/replaced_rows.py``.
    """

    def find(self, part: int, first_row: int, ids: np.ndarray, is_kept: np.ndarray, reader: RowReader) -> np.ndarray:
        """Return which rows of a part are left out (bool, (n,)). Any thread, with a reader of its own.

        Args:
            part: the part of the source.
            first_row: the first of n neighbouring rows within it.
            ids: int64, (n,).
            is_kept: bool, (n,): which rows the rules keep. The others are not among those that are returned.
            reader: reads rows of the source.
        """

    @property
    def num_bytes(self) -> int:
        """Bytes that it holds in memory for long, apart from one bit a row."""

    def digest(self) -> bytes:
        """Return a digest of the other package, which together with the source decides what is left out."""


class TableRule(NamedTuple):
    """One rule as it applies to one table."""

    reason: str
    slot: SlotMeta | None
    """The slot that the rule reads; None for the ids."""
    limit: int | float
    ids: IdList | None
    place: int | None = 0
    """Index in the setting ``prune``; None for a rule that is not in the settings."""

    def applies(self, ids: np.ndarray, rows: Mapping[int, np.ndarray]) -> np.ndarray:
        """Return which rows are pruned (bool, (n,)). Rows with NaN in the slot are kept, because comparisons are false.

        Args:
            ids: int64 (n,).
            rows: slot column -> uint8 (n * row_bytes,), for the slots that rules read.
        """
        if self.reason == EMPTY:
            is_empty: np.ndarray = ids == np.int64(self.limit)
            return is_empty
        if self.slot is None:
            assert self.ids is not None
            is_listed = self.ids.contains(ids)
            return ~is_listed if self.reason == ALLOW_LIST else is_listed
        values = _values_of(rows[self.slot.column], self.slot, len(ids))
        return _is_below(values[:, 0], self.limit) if self.reason == SLOT_VALUE else _is_short(values, self.limit)


@dataclass(frozen=True, slots=True, eq=False, kw_only=True)
class Pruning:
    """The rules of each table, in the order in which they are tried. The first rule that applies gives the reason."""

    rules: tuple[tuple[TableRule, ...], ...]
    asked: tuple[RowRule, ...] = ()
    """The rules as the settings state them."""
    lists: Mapping[str, IdList] = field(default_factory=dict)
    """Path, as in the settings -> the ids of that file."""
    same: LeftRows | None = None
    """Which further rows another package makes needless. The last rule of a table counts them, if its reason is theirs."""
    rank_of_part: np.ndarray | None = None
    """In a delta (int64): the rank that compares each part with the base, and so need not do it again to move its rows."""

    def leaving(self, same: LeftRows, rank_of_part: np.ndarray) -> Pruning:
        """Return these rules, with the rows left out that ``same`` finds among those that the rules keep."""
        last = TableRule(SAME, None, 0, None, None)
        rules = tuple((*rules, last) for rules in self.rules)
        return replace(self, rules=rules, same=same, rank_of_part=rank_of_part)

    def of_settings(self) -> Pruning:
        """Return the rules without what a delta leaves to its base: what they leave out, serving finds nowhere."""
        if self.same is None:
            return self
        return replace(self, rules=tuple(rules[:-1] for rules in self.rules), same=None, rank_of_part=None)

    @property
    def is_delta(self) -> bool:
        """Whether rows are left to a base."""
        return any(rule.reason == SAME for rules in self.rules for rule in rules)

    def __bool__(self) -> bool:
        """Whether any table has a rule."""
        return any(self.rules)

    @property
    def most_rules(self) -> int:
        """The largest number of rules of one table."""
        return max(map(len, self.rules), default=0)

    @property
    def num_bytes(self) -> int:
        """Bytes that lists of ids take in memory."""
        lists = {id(rule.ids): rule.ids for rules in self.rules for rule in rules if rule.ids is not None}
        return sum(its.num_bytes for its in lists.values()) + (0 if self.same is None else self.same.num_bytes)

    def columns_of(self, table: int) -> tuple[int, ...]:
        """Return the slots that the rules of a table read."""
        return tuple(sorted({rule.slot.column for rule in self.rules[table] if rule.slot is not None}))

    def digest(self) -> bytes:
        """Return a digest of everything that decides which rows are pruned, with the listed ids."""
        hasher = xxhash.xxh3_128()
        for table, rules in enumerate(self.rules):
            for rule in rules:
                column = -1 if rule.slot is None else rule.slot.column
                hasher.update(f"{table} {rule.reason} {column} {rule.limit!r}\0".encode())
                hasher.update(b"" if rule.ids is None else rule.ids.digest)
        hasher.update(b"" if self.same is None else self.same.digest())
        return hasher.digest()


def plan_pruning(checkpoint: Checkpoint, rules: Sequence[RowRule], lists: Mapping[str, IdList]) -> Pruning:
    """Return the rules of each table.

    Args:
        checkpoint: the tables that are exported.
        rules: the rules in the order of the settings.
        lists: path -> ids, for the files that the rules name.

    Raises:
        PlanError: a pattern matches no table, a table does not have the slot or has several values a row in it, or a table
            is row-indexed.
    """
    names = [table.name_in_source for table in checkpoint.tables]
    found = [_leave_empty_rows(table) for table in checkpoint.tables]
    for place, rule in enumerate(rules):
        setting = f"prune[{place}]"
        for pattern in rule.tables:
            if mistake := find_mistake(f"{setting}.tables", pattern, names):
                raise mistake
        for number, name in enumerate(names):
            if any(fnmatchcase(name, pattern) for pattern in rule.tables):
                found[number].append(_apply_to_table(rule, checkpoint, number, place, lists))
    return Pruning(rules=tuple(map(tuple, found)), asked=tuple(rules), lists=lists)


def _leave_empty_rows(table: TableMeta) -> list[TableRule]:
    """Return the rule that leaves out rows without an id; no rule if a table cannot have such rows."""
    return [] if table.empty_id is None else [TableRule(EMPTY, None, table.empty_id, None, None)]


def match_rules(rules: Sequence[TableRule], ids: np.ndarray, rows: Mapping[int, np.ndarray]) -> np.ndarray:
    """Return which rule prunes each row (uint16, (n,)): 0 for a row that is kept, else 1 + an index into ``rules``.

    ``ids`` and ``rows`` are those of :meth:`TableRule.applies`.
    """
    codes = np.zeros(len(ids), np.uint16)
    with np.errstate(over="ignore", invalid="ignore"):
        for place, rule in enumerate(rules):
            if rule.reason not in (SAME, REPLACED):  # asked of LeftRows, after all rules
                codes[(codes == KEPT) & rule.applies(ids, rows)] = 1 + place
    return codes


def _apply_to_table(
    rule: RowRule, checkpoint: Checkpoint, number: int, place: int, lists: Mapping[str, IdList]
) -> TableRule:
    setting = f"prune[{place}]"
    table = checkpoint.tables[number]
    name = table.name_in_source
    if not table.is_hashed:
        raise PlanError(
            f"{setting}: the rows of table {name!r} go by number, so none can be left behind; name the table in to_hash_tables, "
            "which writes the numbers as ids"
        )
    if rule.reason in (DENY_LIST, ALLOW_LIST):
        return TableRule(rule.reason, None, 0, lists[rule.path], place)
    slot = _find_slot(rule.slot if rule.reason == SLOT_VALUE else EMBEDDING_SLOT, table, checkpoint, setting)
    if rule.reason == NORM:
        return TableRule(NORM, slot, float(rule.limit), None, place)
    if slot.stored_shape is not None:
        raise PlanError(
            f"{setting}: slot {rule.slot!r} of table {name!r} has shape {list(slot.stored_shape)}, which does not go with the "
            "rows of its table, so no rule can go by it"
        )
    if slot.is_ignored:
        raise PlanError(
            f"{setting}: slot {rule.slot!r} of table {name!r} has older values in rows that a delta did not compare "
            "(delta_ignore_slots), so a rule would leave out other rows. Export from the checkpoint, or leave the rule out"
        )
    if math.prod(slot.values_shape) != 1:
        raise PlanError(
            f"{setting}: slot {rule.slot!r} of table {name!r} has rows of {list(slot.values_shape)}; a rule compares slots of "
            "one value a row"
        )
    is_float = bool(slot.encoding) or DTYPES[slot.dtype].torch.startswith(("float", "bfloat"))
    return TableRule(SLOT_VALUE, slot, float(rule.limit) if is_float else math.ceil(rule.limit), None, place)


def _find_slot(name: str, table: TableMeta, checkpoint: Checkpoint, setting: str) -> SlotMeta:
    found = next((slot for slot in table.slots if slot.name == name), None)
    if found is None:
        having = [t.name_in_source for t in checkpoint.tables if any(slot.name == name for slot in t.slots)]
        raise PlanError(
            f"{setting}: table {table.name_in_source!r} has no slot {name!r}; tables that have it: "
            f"{', '.join(having) or 'none'}. Let tables match those alone"
        )
    return found


def _values_of(rows: np.ndarray, slot: SlotMeta, num_rows: int) -> np.ndarray:
    """Return the values of rows of a slot, of shape (num_rows, width), in a dtype that numpy can compare."""
    if slot.encoding:
        return decode_int8(rows.reshape(num_rows, slot.row_bytes))
    dtype = DTYPES[slot.dtype]
    values: np.ndarray = rows.view(dtype.numpy).reshape(num_rows, math.prod(slot.inner_shape))
    if dtype.torch == "bfloat16":
        values = (values.astype(np.uint32) << np.uint32(16)).view(np.float32)
    return values


def _is_below(values: np.ndarray, limit: float) -> np.ndarray:
    below: np.ndarray
    if values.dtype.kind == "f":
        below = values.astype(np.float64) < limit
    elif not -(1 << 63) <= limit < 1 << 63:
        below = np.full(len(values), limit > 0)
    else:
        below = values.astype(np.int64) < np.int64(limit)
    return below


def _is_short(values: np.ndarray, limit: float) -> np.ndarray:
    """Return which rows have an L2 norm of at most ``limit``."""
    if limit == 0:  # compare the values, because squares of tiny values are rounded to 0
        is_zero: np.ndarray = np.logical_not((values != 0).any(axis=1))
        return is_zero
    sums = np.zeros(len(values), np.float64)
    # add value by value, because numpy's own sums depend on the number of rows
    for column in np.asarray(values.T, np.float64, order="C"):
        sums += column * column
    short: np.ndarray = np.less_equal(np.sqrt(sums), limit)
    return short
