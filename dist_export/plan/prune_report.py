"""Report what each rule of ``prune`` did: notes on likely mistakes, and tables that are left without rows. Pure."""

from __future__ import annotations

import numpy as np

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.config.prune_rules import DENY_LIST, EMPTY
from dist_export.errors import PlanError
from dist_export.humanize import count
from dist_export.plan.census import PrunedRows
from dist_export.plan.prune import Pruning

_SHOWN = 3


def count_by_rule(checkpoint: Checkpoint, pruning: Pruning, pruned: PrunedRows) -> np.ndarray:
    """Return how many rows each rule pruned: int64, (tables, rules), with the rules in the order of the setting."""
    counts = np.zeros((len(checkpoint.tables), len(pruning.asked)), np.int64)
    for table, rules in enumerate(pruning.rules):
        rows = pruned.rows[checkpoint.parts.of_table(table)].sum(axis=0)
        for place, rule in enumerate(rules):
            if rule.place is not None:
                counts[table, rule.place] += rows[place]
    return counts


def refuse_empty_tables(checkpoint: Checkpoint, pruning: Pruning, pruned: PrunedRows | None) -> None:
    """Raise PlanError if the rules prune all rows of a table. It names the first such table and the rows of each rule."""
    empty_tables = _find_empty(checkpoint, pruning, pruned)
    if empty_tables:
        others = f", nor of {count(len(empty_tables) - 1, 'other table')}" if len(empty_tables) > 1 else ""
        raise PlanError(
            f"{empty_tables[0]}{others}, so serving would find no row in it. Nothing was written. Mend the rule, leave the table "
            "out with drop_tables, or set on_empty_table: allow"
        )


def note_rules(checkpoint: Checkpoint, pruning: Pruning | None, pruned: PrunedRows | None) -> list[str]:
    """Return notes on tables whose rows are all pruned, and on deny lists that prune no row."""
    if pruning is None or pruned is None:
        return []
    empty_tables = _find_empty(checkpoint, pruning, pruned)
    others = count(len(empty_tables) - _SHOWN, "other table")
    more = [f"the rules of prune leave nothing of {others}"] if len(empty_tables) > _SHOWN else []
    rows = count_by_rule(checkpoint, pruning, pruned).sum(axis=0).tolist()
    return [*empty_tables[:_SHOWN], *more] + [
        f"prune[{place}].deny: no row of its tables has an id of {rule.path}, or an earlier rule took those that have one"
        for place, rule in enumerate(pruning.asked)
        if rule.reason == DENY_LIST and not rows[place]
    ]


def _find_empty(checkpoint: Checkpoint, pruning: Pruning, pruned: PrunedRows | None) -> list[str]:
    """Return a sentence for each table that has rows and loses all of them to the rules."""
    if pruned is None:
        return []
    told = []
    counts = count_by_rule(checkpoint, pruning, pruned)
    for number, table in enumerate(checkpoint.tables):
        its = checkpoint.parts.of_table(number)
        without_id = [place for place, rule in enumerate(pruning.rules[number]) if rule.reason == EMPTY]
        rows = int(checkpoint.parts.rows[its].sum()) - int(pruned.rows[its][:, without_id].sum())
        if rows and int(counts[number].sum()) == rows:
            by_rule = enumerate(counts[number].tolist())
            took = ", ".join(f"prune[{place}] took {taken:,}" for place, taken in by_rule if taken)
            told.append(
                f"the rules of prune leave none of the {rows:,} rows of table {table.name_in_source!r} ({took})"
            )
    return told
