"""Why a drift cannot be measured: rows that the model reads and the export can neither see nor give it.

Both sides would have the model's own rows, and the difference of two equal sides is 0, whatever was trained.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

from dist_export.dense.sample_rows import SampleRows
from dist_export.errors import DriftError, ModelError
from dist_export.humanize import few
from dist_export.runtime.ranks import Ranks

_ADVICE = "Leave max_drift out, or give a model that looks ids up in its own tables, unsharded"


class Looked(NamedTuple):
    """What one rank's batches tell. Travels between the ranks."""

    sharded: tuple[str, ...]
    unseen: dict[str, str]
    """Table -> why the model has used its own rows."""
    is_any: bool
    """Whether any table was read."""

    @classmethod
    def at(cls, batches: Sequence[SampleRows], *, has_asked: bool = False) -> Looked:
        """Return what these batches tell. ``has_asked``: whether ids were looked up in any case."""
        unseen: dict[str, str] = {}
        for rows in reversed(batches):
            unseen |= rows.unseen
        sharded = {table for rows in batches for table in rows.sharded_tables}
        is_any = has_asked or any(rows.asked or rows.whole for rows in batches)
        return cls(tuple(sorted(sharded)), unseen, is_any)


def why_unmeasured(ranks: Ranks, mine: Looked) -> str:
    """Return why the drift says nothing of the rows that are exported, empty where it does. All ranks, with one answer."""
    told = ranks.all_gather("look for rows that the drift misses", lambda: mine)
    sharded = sorted({table for its in told for table in its.sharded})
    unseen: dict[str, str] = {}
    for its in reversed(told):
        unseen |= its.unseen
    reasons = [f"{few(sharded)} of the model in memory is sharded, and takes no rows"] if sharded else []
    reasons += [
        f"of table {table!r} the model has used its own rows: {why}" for table, why in sorted(unseen.items())[:3]
    ]
    if len(unseen) > 3:
        reasons.append(f"the same goes for {len(unseen) - 3:,} more tables")
    if not reasons and not any(its.is_any for its in told):
        reasons.append("no batch was seen to look up a table of the package")
    return "; ".join(reasons)


def why_unlooked(ranks: Ranks, batches: Sequence[SampleRows]) -> str:
    """Return of which table no batch had a row, though the model looks ids up in it; empty where each had one. All ranks."""
    called = {table for rows in batches for table in rows.called}
    found = {
        table for rows in batches for table in called if rows.asked[table] > rows.missing[table] or table in rows.whole
    }
    told = ranks.all_gather("look for tables without a row in any batch", lambda: (called, found))
    lacking = sorted(set().union(*(its for its, _ in told)).difference(*(its for _, its in told)))
    if not lacking:
        return ""
    return (
        f"no batch has an id of {few(lacking)} that the checkpoint has a row of, so the scores say nothing of its rows. Give "
        "batches with such ids"
    )


def refuse_early(ranks: Ranks, max_drift: float | dict[str, float] | None, reason: str) -> None:
    """Raise ModelError, on all ranks, where ``max_drift`` bounds what cannot be measured. Nothing is written yet."""

    def refuse() -> None:
        if reason and max_drift is not None:
            raise ModelError(
                f"max_drift bounds the drift, which cannot be measured: {reason}. Nothing was written. {_ADVICE}"
            )

    ranks.check("look for what bounds the drift", refuse)


def refuse_late(ranks: Ranks, max_drift: float | dict[str, float] | None, reason: str) -> None:
    """Raise DriftError, on all ranks, for the same after the shards were written."""

    def refuse() -> None:
        if reason and max_drift is not None:
            raise DriftError(
                f"max_drift bounds the drift, which cannot be measured: {reason}. No manifest was written, so there is no "
                f"package. {_ADVICE}"
            )

    ranks.check("look for what bounds the drift", refuse)
