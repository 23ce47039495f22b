"""The counting of ids and the search for repeated ones, shared out over ranks and threads."""

from __future__ import annotations

from dist_export.checkpoint.metadata import Checkpoint
from dist_export.plan.census import (
    Census,
    UniqueTask,
    count_row_indexed_rows,
    deal_unique_tasks,
    merge_censuses,
    plan_unique_tasks,
)
from dist_export.plan.memory_budget import MemoryBudget
from dist_export.plan.prune import Pruning
from dist_export.plan.target_slices import Targets
from dist_export.runtime.ranks import Ranks
from dist_export.runtime.threads import run_threads
from dist_export.transfer.duplicates import DuplicateIds
from dist_export.transfer.id_scan import check_unique, take_census


def count_rows(
    ranks: Ranks,
    checkpoint: Checkpoint,
    targets: tuple[Targets, ...],
    shares: list[list[int]],
    budget: MemoryBudget,
    rules: Pruning,
    duplicates: DuplicateIds,
) -> Census:
    """Count the rows of all parts, each rank those of its share. All ranks. ``duplicates`` takes in ids that stand twice."""
    mine = shares[ranks.rank * budget.threads : (ranks.rank + 1) * budget.threads]

    def count(share: list[int]) -> Census:
        return take_census(
            checkpoint,
            targets,
            share,
            held_ids=budget.held_ids,
            duplicates=duplicates,
            pruning=rules,
            tuning=budget.tuning,
        )

    counts = ranks.all_gather("count the ids", lambda: merge_censuses(run_threads(count, mine)))
    row_indexed = ranks.check(
        "count numbered rows",
        lambda: count_row_indexed_rows(checkpoint, targets, granule_rows=budget.tuning.granule_rows),
    )
    return merge_censuses([*counts, row_indexed])


def search_rest(
    ranks: Ranks, checkpoint: Checkpoint, census: Census, budget: MemoryBudget, duplicates: DuplicateIds
) -> None:
    """Search for ids that stand twice where the count did not: in large parts, and in several of a slice. All ranks."""
    unique_tasks = plan_unique_tasks(checkpoint, census, held_ids=budget.held_ids)
    if not unique_tasks:
        return
    tasks = ranks.check(
        "share out the search for repeated ids",
        lambda: deal_unique_tasks(checkpoint, unique_tasks, ranks.rank, ranks.world_size),
    )

    def search(share: list[UniqueTask]) -> None:
        check_unique(
            checkpoint, share, held_ids=budget.held_ids, duplicates=duplicates, run_rows=budget.tuning.run_rows
        )

    def search_mine() -> None:
        run_threads(search, [tasks[thread :: budget.threads] for thread in range(budget.threads)])

    ranks.all_gather("search for ids that stand twice", search_mine)
