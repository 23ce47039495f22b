"""Decide anew which rows of a sample are pruned and which default row a table has, from the settings as the user wrote them.

Nothing here is shared with the code that prunes: patterns, comparisons and norms are written a second time, in plain Python on
single values. Where a norm is so near to its bound that rounding decides, either answer is right.
"""

from __future__ import annotations

import bisect
import math
from collections.abc import Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from dist_export.checkpoint.metadata import SlotMeta
from dist_export.config.needs import DriftSettings
from dist_export.dense.row_check import NO_PACKAGE, check_names, is_far, is_far_int8, match_name, read_values
from dist_export.dense.row_lookup import RowFinder
from dist_export.errors import ParityError
from dist_export.formats.dtypes import DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.manifest import TableEntry

Rules = Sequence[Mapping[str, Any]]
"""The setting ``prune``."""
Defaults = Mapping[str, "str | Sequence[float]"]
"""The setting ``default_row``."""

_RANGE = 1e150
"""Squares of what is within this and its inverse are float64 numbers."""


def check_settings(
    config: DriftSettings,
    source: RowFinder,
    written: RowFinder,
    entries: Sequence[TableEntry],
    lists: Mapping[str, np.ndarray],
) -> None:
    """Compare what the export made of ``rename_tables``, ``prune`` and ``default_row`` with the settings. Any rank.

    Arguments as those of :func:`check_pruned` and :func:`check_default_rows`. ParityError.
    """
    check_names({name: source.written_name(name) for name in source.looked_up()}, config.rename_tables)
    check_pruned(config.prune, config.on_duplicate, lists, source, written)
    check_default_rows(config.default_row, entries, written)


def check_pruned(
    rules: Rules, on_duplicate: str, lists: Mapping[str, np.ndarray], source: RowFinder, written: RowFinder
) -> None:
    """Compare which ids of the sample the export has pruned with what the rules say. Any rank, for its own lookups.

    Args:
        rules: the setting ``prune``.
        on_duplicate: the setting: which of the rows that the rules leave of an id is exported.
        lists: path -> ids of the file (int64, sorted), of the files that rules name.
        source: of the checkpoint, as it looked up the sample's rows.
        written: of the shards, as it looked up the same.

    Raises:
        ParityError: a row is pruned that no rule applies to, is there although one does, or is not the one of several rows.
    """
    for table in source.looked_up():
        if source.table_of(table).is_hashed and written.has_table(table):
            _check_table(table, _rules_of(table, rules), on_duplicate, lists, source, written)


def check_default_rows(defaults: Defaults, entries: Sequence[TableEntry], written: RowFinder) -> None:
    """Compare the default rows of all tables with what ``default_row`` says. Any rank.

    Args:
        defaults: the setting.
        entries: of the manifest.
        written: of the shards; what it gives for ids without a row is in the sample.

    Raises:
        ParityError: a table has another default row, in the manifest or in the sample.
    """
    for entry in entries:
        name = entry.name if entry.source_name is msgspec.UNSET else entry.source_name
        asked = next((values for pattern, values in defaults.items() if match_name(pattern, name) is not None), None)
        if name not in written.exported_names() or (asked is None and written.table_of(name).raw_ids is not None):
            continue  # of its own accord, a managed-collision table has the row that its module gives unknown ids
        dim = written.embedding_of(name).values_shape
        expected = [0.0] * math.prod(dim) if asked is None or isinstance(asked, str) else [float(v) for v in asked]
        stated = entry.default_row
        values = [0.0] * len(expected) if stated is msgspec.UNSET or isinstance(stated, str) else list(stated)
        if values != expected or (asked is None and stated is not msgspec.UNSET):
            raise ParityError(
                f"table {name!r}: the default row in the manifest is {_say(stated)}, but default_row makes it "
                f"{'none' if asked is None else _say(asked)}. {NO_PACKAGE}"
            )
        if _is_other_row(expected, written.default_row(name), written.stored_embedding(name)):
            raise ParityError(
                f"table {name!r}: ids without a row had another row in the sample than default_row gives them, "
                f"{'zeros' if asked is None else _say(asked)}. {NO_PACKAGE}"
            )


def is_pruned(rule: Mapping[str, Any], number: int, values: Sequence[float], listed: np.ndarray | None) -> bool | None:
    """Return whether one rule applies to one row; None where it depends on rounding.

    Args:
        rule: of the setting ``prune``.
        number: the row's id.
        values: of the slot that the rule looks at; empty for lists.
        listed: the ids of the rule's file (int64, sorted); None for other rules.
    """
    if listed is not None:
        place = bisect.bisect_left(listed, number)
        is_there = place < len(listed) and int(listed[place]) == number
        return is_there if "deny" in rule else not is_there
    if "below" in rule:
        return bool(values[0] < _number(rule["below"]))
    limit = _number(rule["norm_at_most"])
    if limit == 0:
        return all(value == 0 for value in values)
    norm = math.hypot(*values)
    if not math.isfinite(norm):
        return False
    if abs(norm - limit) <= (len(values) + 4) * 2.0**-52 * limit or any(0 < x < 1 / _RANGE for x in map(abs, values)):
        return None
    return None if norm > _RANGE else norm <= limit


def _check_table(
    table: str,
    rules: Rules,
    on_duplicate: str,
    lists: Mapping[str, np.ndarray],
    source: RowFinder,
    written: RowFinder,
) -> None:
    before, now = source.known(table), written.known(table)
    assert before is not None
    ids, parts, rows = source.located.of(source.number_of(table))
    states = _judge(table, rules, lists, source, ids, parts, rows)
    positions: dict[int, list[int]] = {}
    for place, number in enumerate(ids.tolist()):
        positions.setdefault(number, []).append(place)
    was_kept = dict(zip(before.ids.tolist(), before.is_kept.tolist(), strict=True))
    is_there = {} if now is None else dict(zip(now.ids.tolist(), now.has_row.tolist(), strict=True))
    for number, its in positions.items():
        kept = [place for place in its if states[place] is False]
        if not kept and any(states[place] is None for place in its):
            continue
        for decided in (was_kept.get(number), is_there.get(number)):
            if decided is not None and decided != bool(kept):
                raise ParityError(
                    f"table {table!r}: the id {number} of the sample {'is exported' if decided else 'is left behind'}, but by "
                    f"the rules of prune it is {'exported' if kept else 'left behind'}. {NO_PACKAGE}"
                )
        if len(kept) > 1 and all(states[place] is not None for place in its):
            chosen = kept[-1 if on_duplicate == "last" else 0]
            row = source.located.read(source.stored_embedding(table), parts[[chosen]], rows[[chosen]])[0]
            if (row != before.kept[np.searchsorted(before.ids, number)]).any():
                raise ParityError(
                    f"table {table!r}: of the rows of id {number} of the sample another one is exported than on_duplicate: "
                    f"{on_duplicate} takes. {NO_PACKAGE}"
                )


def _judge(
    table: str,
    rules: Rules,
    lists: Mapping[str, np.ndarray],
    source: RowFinder,
    ids: np.ndarray,
    parts: np.ndarray,
    rows: np.ndarray,
) -> list[bool | None]:
    """Return whether any rule leaves each row behind; None where it depends on rounding."""
    meta = source.table_of(table)
    found: list[bool | None] = [meta.empty_id is not None and number == meta.empty_id for number in ids.tolist()]
    for rule in rules:
        name = rule.get("slot", EMBEDDING_SLOT if "norm_at_most" in rule else None)
        path = rule.get("deny", rule.get("allow"))
        listed = None if path is None else lists.get(path)
        if path is not None and listed is None:
            raise ParityError(
                f"table {table!r}: a rule of prune with the list {path!r} is for it, but the export did not apply the rule. "
                f"{NO_PACKAGE}"
            )
        values: list[list[float]] = [[] for _ in range(len(ids))]
        if name is not None:
            slot = next(slot for slot in meta.slots if slot.name == name)
            values = _numbers(source.located.read(slot, parts, rows), slot)
        for place, number in enumerate(ids.tolist()):
            answer = is_pruned(rule, number, values[place], listed)
            found[place] = True if answer or found[place] else None if answer is None else found[place]
    return found


def _rules_of(table: str, rules: Rules) -> Rules:
    """Return the rules that are for a table, by its name in the checkpoint."""
    patterns = [[rule["tables"]] if isinstance(rule["tables"], str) else rule["tables"] for rule in rules]
    return [
        rule
        for rule, its in zip(rules, patterns, strict=True)
        if any(match_name(pattern, table) is not None for pattern in its)
    ]


def _numbers(rows: np.ndarray, slot: SlotMeta) -> list[list[float]]:
    """Return the values of rows of a slot (uint8, (n, bytes)), read by torch; whole numbers stay whole."""
    if not len(rows):
        return []  # torch reads no rows whose bytes lie apart, as those of an empty slice of columns do
    if slot.encoding:
        dim = rows.shape[1] - 8
        tail = torch.from_numpy(np.ascontiguousarray(rows[:, dim:])).view(torch.float32)
        packed = torch.from_numpy(np.ascontiguousarray(rows[:, :dim])) * tail[:, :1] + tail[:, 1:]
        return packed.double().tolist()
    kind = getattr(torch, DTYPES[slot.dtype].torch)
    values = torch.from_numpy(np.ascontiguousarray(rows)).view(kind)
    return (values.double() if kind.is_floating_point else values).tolist()


def _number(value: Any) -> float | int:
    return float(value) if isinstance(value, str) else value


def _is_other_row(expected: Sequence[float], row: np.ndarray, slot: SlotMeta) -> bool:
    """Whether a row as it is stored (uint8, (bytes,)) is not what its dtype has nearest to the expected values."""
    values = torch.tensor([list(expected)], dtype=torch.float64)
    name = DTYPES[slot.dtype].torch
    if name == "uint8" and len(row) == len(expected) + 8:
        return bool(is_far_int8(values, row[None], slot.dtype)[0])
    if not name.startswith(("float", "bfloat")):
        return bool(read_values(row[None], slot.dtype)[0].tolist() != list(expected))
    return bool(is_far(values, row[None], slot.dtype)[0])


def _say(row: Any) -> str:
    if row is msgspec.UNSET:
        return "none"
    return (
        row
        if isinstance(row, str)
        else f"[{', '.join(f'{value:g}' for value in row[:4])}{', ...' if len(row) > 4 else ''}]"
    )
