"""Run the sparse arch on the sample a few times more, to see whether its blocks are made of the rows that were put in.

Rows that a table has and that nobody saw being read are changed in place: blocks that change with them come from code that reads
past what an export sees (another thread, a NumPy view). Where the arch computes with tensors from elsewhere, each table also gets
other rows in turn: blocks that do not change come from what the arch has kept. And the same batch must read the same rows twice.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.archive.output_diff import has_same_values
from dist_export.dense.blocks import Blocks
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample import run_sparse_arch
from dist_export.dense.sample_rows import SampleRows
from dist_export.errors import ModelError
from dist_export.runtime.ranks import Ranks

_MOST_RUNS = 32
"""Above so many tables, some of them get other rows in one run."""

_PAST_US = "its rows are read past torch's operators or in another thread, where no rows are put in"
_KEPT = "the blocks do not change with its rows: the sparse arch keeps rows or blocks from one call to the next"
_OTHER_READS = (
    "the sparse arch read other rows of it when it was given the same batch again: it keeps rows between calls, or draws ids at "
    "random"
)
_NEVER = (
    "nothing read it, while the sparse arch computes with a tensor of its width that is neither registered nor of the batch "
    "({}): it may be rows that were kept from an earlier call"
)


def compare_reads(first: SampleRows, again: SampleRows) -> dict[str, str]:
    """Return by table why two runs on one batch say that rows are kept: they did not read the same ones."""
    found = {}
    tables = {*first.reads, *again.reads, *first.whole_reads, *again.whole_reads}
    for table in sorted(tables & first.tables & again.tables):
        is_whole = {table in rows.whole_reads for rows in (first, again)}
        none = np.zeros(0, np.int64)
        is_same = np.array_equal(first.reads.get(table, none), again.reads.get(table, none))
        if len(is_whole) > 1 or not (is_same or is_whole == {True}):
            found[table] = _OTHER_READS
    return found


class Probe:
    """Looks at what the blocks of the sample depend on. All ranks at once: the sparse arch may be collective."""

    def __init__(
        self, ranks: Ranks, sparse_arch: nn.Module, data: Any, finder: RowFinder, *, sparse_model_name: str
    ) -> None:
        self._ranks = ranks
        self._run = functools.partial(run_sparse_arch, sparse_arch, data, sparse_model_name=sparse_model_name)
        self._finder = finder

    def look(self, blocks: Blocks, rows: SampleRows, *, changes_rows: bool) -> dict[str, str]:
        """Return by table why the blocks are not of the rows that it was given. All ranks, with one answer.

        Args:
            blocks: what the arch gave for the batch.
            rows: what it read for that.
            changes_rows: whether settings may change rows; else a model in memory has the very rows that are exported.
        """
        gathered = self._ranks.all_gather(
            "compare the reads of the sample",
            lambda: (rows.tables, rows.whole_reads, rows.whole_reads | rows.reads.keys()),
        )
        every, whole, read = (sorted(set().union(*its)) for its in zip(*gathered, strict=True))
        is_live = self._finder.is_live
        mine: list[SampleRows] = []
        unfed: dict[str, str] = {}
        if changes_rows or not is_live:
            unfed = self._find_unfed([table for table in every if not (is_live and table in whole)], blocks, mine)
        told = self._ranks.all_gather(
            "compare the reads of two runs",
            lambda: (
                [compare_reads(rows, its) for its in mine[:1]],
                [*rows.outside, *(mine[0].outside if mine else ())],
            ),
        )
        unfed |= {table: why for found, _ in told for its in found for table, why in its.items()}
        shapes = sorted({shape for _, its in told for shape in its})
        if unfed or not shapes:
            return unfed
        found = self._find_kept(read, blocks)
        for shape in shapes:
            its = [table for table in every if table not in read and self._is_wide(table, shape)]
            found |= dict.fromkeys(its, _NEVER.format(list(shape)))
        return found

    def _is_wide(self, table: str, shape: tuple[int, ...]) -> bool:
        return self._finder.embedding_of(table).inner_shape == shape[-1:]

    def _find_unfed(self, tables: Sequence[str], blocks: Blocks, mine: list[SampleRows]) -> dict[str, str]:
        """Return the tables whose unread memory the blocks depend on; ``mine`` gets what this rank read."""

        def differs(some: Sequence[str]) -> bool:
            return self._differs(blocks, lambda: self._finder.probe(flipped=some), mine)

        if not tables or not differs(tables) or differs(()):  # else it is another one each time, whatever it is given
            return {}
        return dict.fromkeys(_bisect(list(tables), differs), _PAST_US)

    def _find_kept(self, tables: Sequence[str], blocks: Blocks) -> dict[str, str]:
        """Return the tables whose rows the blocks do not depend on, although they are read."""
        num_runs = min(len(tables), _MOST_RUNS)
        found: dict[str, str] = {}
        for some in (list(tables[first::num_runs]) for first in range(num_runs)):
            finder = functools.partial(self._finder.probe, poisoned=some)
            if not self._differs(blocks, finder, []):
                found |= dict.fromkeys(some, _KEPT)
        return found

    def _differs(self, blocks: Blocks, finder: Callable[[], RowFinder], mine: list[SampleRows]) -> bool:
        """Run once more. Returns whether the blocks of any rank are others than ``blocks``, or the arch fails."""

        def run() -> bool:
            try:
                now, rows = self._run(finder=finder())
            except ModelError:
                return True
            mine.append(rows)
            return not _is_same(blocks.tensors, now.tensors)

        return any(self._ranks.all_gather("run the sparse arch on the sample again", run, may_block=True))


def _bisect(tables: list[str], differs: Callable[[Sequence[str]], bool]) -> list[str]:
    """Return those of the tables that each by itself make a difference, where all together do."""
    if len(tables) == 1:
        return tables
    halves = tables[: len(tables) // 2], tables[len(tables) // 2 :]
    return [table for half in halves if differs(half) for table in _bisect(half, differs)]


def _is_same(one: Mapping[str, torch.Tensor], other: Mapping[str, torch.Tensor]) -> bool:
    return one.keys() == other.keys() and all(has_same_values(one[name], other[name]) for name in one)


def refuse_unregistered(
    ranks: Ranks, rows: SampleRows, is_allowed: Callable[[str], bool], *, is_exported: bool
) -> list[str]:
    """Refuse parameters that the sparse arch reads and does not register: no state_dict holds them. All ranks.

    Args:
        rows: what this rank's sample read.
        is_allowed: whether a setting lets the one at a path pass.
        is_exported: whether tables are exported; else a note is enough.

    Returns notes. Raises ModelError, on all ranks.
    """
    told = ranks.all_gather("look for parameters that are not registered", lambda: dict(rows.unregistered))
    every: dict[str, str] = {path: kind for its in reversed(told) for path, kind in its.items()}

    def refuse() -> None:
        refused = [f"{path} ({kind})" for path, kind in sorted(every.items()) if not is_allowed(path)]
        if refused and is_exported:
            more = f" and {len(refused) - 3:,} more" if len(refused) > 3 else ""
            raise ModelError(
                f"the sparse arch reads {', '.join(refused[:3])}{more}, which it does not register: neither state_dict() nor the "
                "package has it, so the scores would be of the model's own values. Nothing was written. Make it an attribute of "
                "a module of the sparse arch (nn.ModuleList, nn.ModuleDict or nn.ParameterList, not a list, dict or closure); "
                "or allow_missing_tables: [patterns] lets the model's own values pass"
            )

    ranks.check("refuse parameters that are not registered", refuse)
    return [
        f"{path} ({kind}) is not registered in the sparse arch: the sample used the model's own values"
        for path, kind in sorted(every.items())
    ]
