"""The sample once more, from what was written: rows of the shards, scores of the program in the package."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import numpy as np
from torch import nn
from torch.export import ExportedProgram

from dist_export.config.needs import DenseSettings
from dist_export.dense.blocks import Blocks
from dist_export.dense.model_head import ModelHead
from dist_export.dense.row_lookup import LiveRows, RowFinder
from dist_export.dense.sample import SAMPLE, run_sparse_arch
from dist_export.dense.sample_rows import SampleRows
from dist_export.dense.sample_run import SampleRun
from dist_export.dense.source_rows import SourceRows
from dist_export.dense.used_inputs import as_loaded
from dist_export.errors import ModelError, ParityError
from dist_export.formats.package_entries import FilesParityEntry
from dist_export.manifest import DriftEntry
from dist_export.runtime.ranks import Ranks


class WrittenScores:
    """Compares what was written with the model on the checkpoint's rows. :meth:`score` once, on all ranks."""

    def __init__(
        self, ranks: Ranks, config: DenseSettings, sampled: SampleRun, load_program: Callable[[], ExportedProgram]
    ) -> None:
        """``load_program``: loads the program from the package. Rank 0."""
        self._ranks = ranks
        self._config = config
        self._sampled = sampled
        self._load_program = load_program
        self._program: ExportedProgram | None = None
        self.from_files: FilesParityEntry | None = None
        self.drift: DriftEntry | None = None
        """Both on rank 0."""
        self.drift_counts: dict[str, int] = {}
        """Ids that all batches of the drift looked up, over all ranks."""

    def score(
        self,
        written: SourceRows | None,
        check_rows: Callable[[SampleRows, RowFinder], None],
        beside: Callable[[Callable[[Any], Blocks], Blocks], None] | None,
    ) -> None:
        """Score the sample and the batches after it, and compare. All ranks.

        ``written`` and ``beside`` are as :meth:`~dist_export.dense.stage.DenseStage.score` takes them. ``check_rows`` compares
        what a rank has looked up with the source.
        """
        ranks, sampled = self._ranks, self._sampled
        first: tuple[Blocks, SampleRows] | None = None
        run_again: Callable[..., tuple[Blocks, SampleRows]] = _refuse_to_run
        reads_rows = False
        if written is not None:
            assert sampled.sparse_arch is not None
            finder = self._open_rows(written)
            run_again = functools.partial(self._run_again, sampled.sparse_arch, finder)
            first = ranks.run(
                "score the sample from the shards", lambda: run_again(sampled.data, what=SAMPLE), may_block=True
            )
            blocks, rows = first
            ranks.check("compare the rows of the sample", lambda: check_rows(rows, finder))
            reads_rows = any(ranks.all_gather("count the rows of the sample", lambda: rows.num_found > 0))
            if beside is not None:
                beside(lambda data: run_again(data, head=sampled.head())[0], blocks)
        sampled.data = sampled.sparse_arch = sampled.dense_arch = None
        ranks.broadcast("compare the scores", lambda: self._compare(first and first[0], reads_rows=reads_rows))
        self.drift = sampled.drift.score(
            first, run_again, sampled.sample, sampled.used, self._take_program, changes_rows=sampled.changes_rows
        )
        if self.drift is not None and first is not None:
            self.drift_counts = sampled.drift.gather_counts()

    def _open_rows(self, written: SourceRows) -> RowFinder:
        """Return what finds the rows of the written shards that the batches look up."""
        sampled = self._sampled
        finder = RowFinder(
            written,
            names=sampled.model_names,
            casts=sampled.casts,
            live=LiveRows(
                is_own=self._is_own_row if sampled.is_live else None,
                sharded=sampled.looked_up.sharded_tables,
                pruned=sampled.pruned,
            ),
            max_memory_bytes=self._config.max_memory_bytes,
        )
        finder.learned = {} if sampled.finder is None else sampled.finder.learned
        wanted = sampled.drift.wanted
        if sampled.is_live:  # of a model in memory, what another rank holds is not looked for
            wanted = {table: ids[self._is_own_row(table, ids)] for table, ids in wanted.items()}
        finder.want(wanted)
        return finder

    def _is_own_row(self, table: str, ids: np.ndarray) -> np.ndarray:
        """Whether this rank's own table holds these ids (bool) for export, as far as a batch has asked for them."""
        finder = self._sampled.finder
        known = None if finder is None else finder.known(table)
        is_own = np.zeros(len(ids), bool)
        if known is not None:
            is_known = np.isin(ids, known.ids)
            is_own[is_known] = known.of(ids[is_known]).is_kept
        return is_own

    def _run_again(
        self,
        sparse_arch: nn.Module,
        finder: RowFinder,
        data: Any,
        what: str = "a further batch",
        head: ModelHead | None = None,
    ) -> tuple[Blocks, SampleRows]:
        name = self._config.sparse_model_name
        try:
            return run_sparse_arch(sparse_arch, data, sparse_model_name=name, finder=finder, what=what, head=head)
        except ModelError as error:
            raise ParityError(
                f"{error}. It ran with the checkpoint's rows before, and fails with those of the written shards. No manifest "
                "was written"
            ) from error

    def _compare(self, blocks: Blocks | None, *, reads_rows: bool) -> None:
        """Compare scores of ``blocks``, which the sparse arch gave when it ran again; None where it did not. Rank 0."""
        comparison, changes_rows = self._sampled.comparison(), self._sampled.changes_rows
        self._program = program = self._load_program()
        self.from_files = comparison.of_files(program, blocks, changes_rows=changes_rows, reads_rows=reads_rows)

    def _take_program(self) -> ExportedProgram:
        """Return the program as it was written. Once, after it was compared. Rank 0."""
        program, self._program = self._program, None
        assert program is not None
        return as_loaded(program, self._load_program)


def _refuse_to_run(*_: Any, **__: Any) -> tuple[Blocks, SampleRows]:
    raise AssertionError("there are no shards to run on")
