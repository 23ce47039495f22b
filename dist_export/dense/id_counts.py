"""How many ids the sample looked up, over all ranks."""

from __future__ import annotations

from collections import Counter
from dataclasses import dataclass, field

from dist_export.dense.sample_rows import SampleRows
from dist_export.runtime.ranks import Ranks


@dataclass(slots=True)
class IdCounts:
    """Ids of the sample batch by table, over all ranks."""

    asked: Counter[str] = field(default_factory=Counter)
    missing: Counter[str] = field(default_factory=Counter)
    left_behind: Counter[str] = field(default_factory=Counter)
    """That rules of ``prune`` leave out."""
    left_to_model: int = 0
    """Of these, ids whose rows the model itself gave."""
    is_asked: bool = False
    """Whether any rank read a row of any table."""
    is_any_known: bool = False
    """Whether any rank read a table that the checkpoint has."""

    def by_table(self) -> dict[str, dict[str, int]]:
        """Return the counts as they are in the manifest's ``run``, ordered by table."""
        return {
            "asked": dict(sorted(self.asked.items())),
            "missing": dict(sorted(self.missing.items())),
            "left_behind": dict(sorted(self.left_behind.items())),
        }


def count_ids(ranks: Ranks, rows: SampleRows) -> IdCounts:
    """Add up what each rank looked up. All ranks."""
    gathered = ranks.all_gather(
        "count the ids of the sample",
        lambda: (
            dict(rows.asked),
            dict(rows.missing),
            dict(rows.left_behind),
            rows.left_to_model,
            bool(rows.whole),
            rows.knows_a_table,
        ),
    )
    counts = IdCounts()
    for asked, missing, left_behind, left_to_model, is_whole, knows_a_table in gathered:
        counts.asked.update(asked)
        counts.missing.update(missing)
        counts.left_behind.update(left_behind)
        counts.left_to_model += left_to_model
        counts.is_asked |= bool(asked) or is_whole
        counts.is_any_known |= knows_a_table
    return counts
