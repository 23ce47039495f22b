"""Cast rows on their way from source to shard, and count their losses: values that do not fit, and errors.

The counts must not depend on which thread casts which rows when, but sums of floats depend on their order. Errors are therefore
summed in a fixed order: by block of rows from the beginning of each gather, then over the blocks, then over the gathers.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from dist_export._version import VERSION
from dist_export.errors import TransferError
from dist_export.formats.row_encodings import RowCast
from dist_export.plan.casts import CastCount, cast_of
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import WORK_DIRECTORY, Directory

Counts = dict[int, CastCount]
"""Losses by index into ``SparsePlan.gathers``."""


def cast_blocks(
    cast: RowCast,
    rows: np.ndarray,
    out: np.ndarray,
    *,
    step: int,
    count: CastCount,
    first_row: int,
    dropped: np.ndarray,
    id_of: Callable[[int], int],
) -> CastCount:
    """Cast neighbouring rows of one gather, and return ``count`` with their losses added.

    Args:
        cast: the cast.
        rows: uint8, (n, source_bytes). Dropped rows are overwritten.
        out: uint8, (n, target_bytes). It is filled.
        step: how many rows are cast at once, :meth:`~dist_export.plan.memory_budget.MemoryBudget.cast_rows` of this cast.
        count: the losses of the gather's rows before these. Their number is a multiple of ``step``.
        first_row: the number of the first of these rows within its part.
        dropped: which of these rows are dropped or pruned (int64, relative to the first). They are not counted.
        id_of: returns the id of a row of the part.
    """
    rows[dropped] = 0
    total, worst, nans, beyond = count.total, count.worst, count.nans, count.out_of_range
    first = -1
    for begin in range(0, len(rows), step):
        end = min(begin + step, len(rows))
        found = cast.encode_into(out[begin:end], rows[begin:end])
        total += found.total
        worst = max(worst, found.worst)
        nans += found.nans
        beyond += found.out_of_range
        if first < 0 <= found.first:
            first = first_row + begin + found.first
    is_first = count.first_row < 0 <= first
    return CastCount(
        values=count.values + (len(rows) - len(dropped)) * cast.dim,
        nans=nans,
        out_of_range=beyond,
        worst=worst,
        total=total,
        first_row=first if is_first else count.first_row,
        first_id=id_of(first) if is_first else count.first_id,
    )


def write_counts(target: Directory, plan: SparsePlan, counts: Counts) -> None:
    """Store the losses of gathers beside the receipts, so that a rerun need not cast rows of complete shards again."""
    note = _Note(plan=_name_of(plan), counts={str(number): count for number, count in counts.items()})
    target.write(f"{WORK_DIRECTORY}/{_PREFIX}{min(counts)}.json", msgspec.json.encode(note))


def read_counts(target: Directory, plan: SparsePlan) -> Counts:
    """Return the losses that an interrupted export of the same plan stored."""
    found: Counts = {}
    kept = target.child(WORK_DIRECTORY)
    for name in kept.names():
        if not name.startswith(_PREFIX):
            continue
        try:
            note = _NOTES.decode(kept.read(name))
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
            continue  # truncated by a crash: these rows are cast again
        if note.plan == _name_of(plan):
            found |= {int(number): count for number, count in note.counts.items()}
    return found


_PREFIX = "losses-"
"""Sorts after the name of the commit marker, because these files must be removed last."""


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    plan: str
    counts: dict[str, CastCount]
    """Losses by index into the plan's gathers."""


_NOTES = msgspec.json.Decoder(_Note)


def _name_of(plan: SparsePlan) -> str:
    """Return a name of the plan, which covers the source, and of the version, because versions may sum errors differently."""
    return f"{VERSION} {plan.digest}"


def refuse_overflow(plan: SparsePlan, counts: Counts) -> None:
    """Raise TransferError if values do not fit. It names the tables, the counts and the first row of each table."""
    parts = plan.checkpoint.parts
    overflow: dict[int, list[int]] = {}
    for number in sorted(counts):
        if counts[number].overflow:
            overflow.setdefault(int(parts.table[plan.gathers[number].part]), []).append(number)
    told = []
    for table, numbers in sorted(overflow.items()):
        meta = plan.checkpoint.tables[table]
        column, cast = next(
            (slot.column, cast)
            for slot in plan.slots_of(table)
            if (cast := cast_of(meta.slots[slot.column], slot)) is not None
        )
        first = counts[numbers[0]]
        nans = sum(counts[number].nans for number in numbers)
        beyond = sum(counts[number].out_of_range for number in numbers)
        what = ([f"{beyond:,} beyond {cast.range_text}"] if beyond else []) + ([f"{nans:,} NaN"] if nans else [])
        key = plan.checkpoint.blocks.key[plan.gathers[numbers[0]].part, column]
        told.append(
            f"table {meta.name!r}: {nans + beyond:,} values do not fit {cast.name} ({', '.join(what)}), the first in row "
            f"{first.first_row:,} of {key!r} (id {first.first_id})"
        )
    if told:
        more = f"; {len(told) - 3} more tables" if len(told) > 3 else ""
        raise TransferError(
            f"{'; '.join(told[:3])}{more}. No manifest was written. Mend the rows, give the table another dtype, or set "
            "on_overflow: clamp, which takes over the shards that are written"
        )
