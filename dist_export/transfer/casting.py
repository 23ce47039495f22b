"""Cast rows on their way from source to shard, and count what they lose: values that do not fit, and errors.

What is counted must not depend on who casts which rows when, but sums of floats depend on their order. So errors are summed by
blocks of rows that are cut from the beginning of each gather, then the blocks of a gather in order, then the gathers.
"""

from __future__ import annotations

from collections.abc import Callable

import msgspec
import numpy as np

from dist_export._version import VERSION
from dist_export.errors import TransferError
from dist_export.formats.row_encodings import RowCast
from dist_export.plan.casts import CastCount, cast_of
from dist_export.plan.memory_budget import cast_rows
from dist_export.plan.plan import SparsePlan
from dist_export.storage.directory import WORK_DIRECTORY, Directory

Counts = dict[int, CastCount]
"""By place in ``SparsePlan.gathers``."""


def convert(
    cast: RowCast,
    rows: np.ndarray,
    out: np.ndarray,
    *,
    count: CastCount,
    first_row: int,
    dropped: np.ndarray,
    id_of: Callable[[int], int],
) -> CastCount:
    """Cast rows of one gather that are neighbours, and return ``count`` with these added.

    Args:
        cast: what to do.
        rows: uint8, (n, source_bytes); rows that are left behind are overwritten.
        out: uint8, (n, target_bytes); filled.
        count: of the rows of the gather before these, whose number is a multiple of ``cast_rows``.
        first_row: of these rows within their part.
        dropped: which of them are left behind (int64, from the first on): they count for nothing.
        id_of: gives the id of a row of the part.
    """
    rows[dropped] = 0
    step = cast_rows(cast.dim)
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
    """Keep what gathers lost beside the receipts, so that a rerun need not cast the rows of whole shards once more."""
    note = _Note(plan=_name_of(plan), counts={str(number): count for number, count in counts.items()})
    target.write(f"{WORK_DIRECTORY}/{_PREFIX}{min(counts)}.json", msgspec.json.encode(note))


def read_counts(target: Directory, plan: SparsePlan) -> Counts:
    """Return what an interrupted export of this very plan kept."""
    found: Counts = {}
    kept = target.child(WORK_DIRECTORY)
    for name in kept.names():
        if not name.startswith(_PREFIX):
            continue
        try:
            note = msgspec.json.decode(kept.read(name), type=_Note)
        except (FileNotFoundError, msgspec.MsgspecError, UnicodeDecodeError):
            continue  # cut short by a crash: these rows are cast once more
        if note.plan == _name_of(plan):
            found |= {int(number): count for number, count in note.counts.items()}
    return found


_PREFIX = "losses-"
"""Behind the marker of a commit, in the order of names: it is to be the last that is cleared away."""


class _Note(msgspec.Struct, frozen=True, kw_only=True):
    plan: str
    counts: dict[str, CastCount]
    """By place in the plan's gathers."""


def _name_of(plan: SparsePlan) -> str:
    """Name the plan, which covers the source too, and the version, which sums up errors in its own way."""
    return f"{VERSION} {plan.digest}"


def refuse_unfit(plan: SparsePlan, counts: Counts) -> None:
    """Raise where values did not fit. TransferError names table, numbers and the first place."""
    parts = plan.checkpoint.parts
    unfit: dict[int, list[int]] = {}
    for number in sorted(counts):
        if counts[number].unfit:
            unfit.setdefault(int(parts.table[plan.gathers[number].part]), []).append(number)
    told = []
    for table, numbers in sorted(unfit.items()):
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
