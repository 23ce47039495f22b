"""Run the unmodified model and the package on the same batches. Two passes: ids first, so that a table is scanned once.

The unmodified side is the caller's own model on the checkpoint's own rows and dense parameters: no cast, no prune, no choice
among duplicates. The package's side is the written program on rows of the written shards, with the default row where they
have none. An id that the checkpoint has no row of gets serving's row on both sides: that is no drift, and is counted apart.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn
from torch.export import ExportedProgram

from dist_export.config.needs import DriftSettings
from dist_export.dense.blocks import Blocks, Outline, read_blocks
from dist_export.dense.drift_scores import DriftScores
from dist_export.dense.eager import DenseSample
from dist_export.dense.found_rows import LOCATION_BYTES
from dist_export.dense.probe import compare_reads
from dist_export.dense.reference import Reference, ReferenceRunner, run_with_others
from dist_export.dense.reference_check import describe_other_inputs
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample import SAMPLE, Batches, run_sparse_arch
from dist_export.dense.sample_rows import SampleRows
from dist_export.dense.unmeasured import Looked, refuse_early, refuse_late, why_unlooked, why_unmeasured
from dist_export.errors import ConfigError, DistExportError, ModelError
from dist_export.humanize import few
from dist_export.manifest import DriftEntry
from dist_export.model.user_errors import blame, said
from dist_export.runtime.ranks import Ranks

_COPIES = 6
"""How often a row is in memory, at most: as the source has it and as it is exported, of both sides, and while they are joined."""


@dataclass(slots=True)
class _Kept:
    """What the unmodified model gave for a batch. Rank 0."""

    reference: Reference | None
    """Without what went into it; None once it was compared."""
    why: str
    """How what went in differs from what the sparse arch gave; empty where it does not."""
    blocks: dict[str, torch.Tensor]
    """What its sparse arch gave, kept only where no rows are read from the package."""


_NO_DEFAULT = (
    "no default row can be put in for pruned ids: another table has the same weight, or it does more than look rows up"
)


@dataclass(slots=True)
class DriftCounts:
    """Ids that this rank looked up in all batches together: each counts once a batch."""

    ids: int = 0
    without_row: int = 0
    """Neither the checkpoint nor the package has a row."""
    pruned: int = 0
    """The checkpoint has a row, the package has none."""

    def add(self, unmodified: SampleRows, package: SampleRows) -> None:
        """Take in both sides of one batch; note in ``package`` where the model was left with rows that the package lacks."""
        self.ids += package.asked.total()
        lacking = package.missing.total() + package.left_behind.total()
        missing = unmodified.missing.total()
        pruned = max(0, lacking - missing)
        self.without_row += missing
        self.pruned += pruned
        for table in package.without_default if pruned else ():
            package.unseen.setdefault(table, _NO_DEFAULT)


@dataclass(slots=True)
class DriftRun:
    """Holds the batches and what the unmodified model gave for them. All ranks call its methods, unless one says so."""

    ranks: Ranks
    config: DriftSettings
    batches: list[Any] = field(default_factory=list)
    """This rank's, the sample first. As many on every rank."""
    wanted: dict[str, np.ndarray] = field(default_factory=dict)
    """Ids of all batches, by the model's name of the table; sorted, without duplicates."""
    notes: list[str] = field(default_factory=list)
    counts: DriftCounts = field(default_factory=DriftCounts)
    _first_reads: list[SampleRows] = field(default_factory=list)
    """What the sparse arch read when it was first given each batch."""
    _kept: list[_Kept] = field(default_factory=list)
    _sample: list[SampleRows] = field(default_factory=list)
    """What the sample showed before the unmodified model ran."""
    _looked_up: list[SampleRows] = field(default_factory=list)

    def take(self, sample: Any, batches: Batches) -> None:
        """Take batches after the ``sample``, as long as every rank has one and no dataset fails."""
        taken: list[Any] = [sample] if self.config.drift_batches else []

        def take() -> tuple[bool, str]:
            try:
                batch = batches.take()
            except DistExportError:
                raise
            except Exception as error:  # noqa: BLE001 -- whatever it is, the export has its sample
                return False, f"the dataset fails: {said(error)}{blame(error)}"
            if batch.is_there:
                further.append(batch.data)
            return batch.is_there, ""

        while taken and len(taken) < self.config.drift_batches:
            further: list[Any] = []
            found = self.ranks.all_gather("take a further batch", take)
            self._note_failure(len(taken), [reason for _, reason in found])
            if not all(is_there for is_there, _ in found):
                break
            taken += further
        self.batches = taken

    def _note_failure(self, place: int, reasons: list[str]) -> bool:
        """Note that the batch at ``place`` ends the drift, where any rank has a reason. Returns whether one has."""
        failed = [rank for rank, reason in enumerate(reasons) if reason]
        if failed:
            where = f" of rank {failed[0]}" if len(reasons) > 1 else ""
            self.notes.append(f"drift is measured on the batches before batch {place + 1}{where}: {reasons[failed[0]]}")
        return bool(failed)

    def record(self, sparse_arch: nn.Module, finder: RowFinder | None) -> list[list[Outline]]:
        """Note which ids the batches look up, with the model's own rows, and let ``finder`` find them in one scan.

        Where their rows would not fit into ``max_memory``, the last batches are left out. Returns the outlines of the
        further batches by rank.
        """
        outlines: list[list[Outline]] = [[] for _ in range(self.ranks.world_size)]
        if len(self.batches) < 2:
            return outlines
        ids: list[dict[str, np.ndarray]] = []
        for place, data in enumerate(self.batches):
            recorder = None if finder is None else finder.recorder()
            found = self._run_recorder(sparse_arch, data, recorder, place)
            if self._note_failure(place, [reason for reason, _ in found]):
                self.batches = self.batches[:place]
                break
            ids.append({} if recorder is None else recorder.recorded())
            if place:
                for its, (_, outline) in zip(outlines, found, strict=True):
                    assert outline is not None
                    its.append(outline)
        fitting = min(self.ranks.all_gather("fit the rows into memory", lambda: self._count_fitting(ids, finder)))
        if fitting < len(self.batches):
            self.notes.append(
                f"drift is measured on {fitting} of {len(self.batches)} batches: the rows of more do not fit into max_memory"
            )
        self.batches = self.batches[:fitting]
        self.wanted = join_ids(ids[:fitting])
        if finder is not None:
            finder.want(self.wanted)
        return outlines

    def _run_recorder(
        self, sparse_arch: nn.Module, data: Any, recorder: RowFinder | None, place: int
    ) -> list[tuple[str, Outline | None]]:
        """Run the sparse arch on the batch at ``place``. Returns by rank why it failed, and else the outline. All ranks.

        The sample, at place 0, must not fail: ModelError.
        """
        name = self.config.sparse_model_name
        kept: list[Outline] = []

        def run() -> str:
            what = "it" if place else SAMPLE
            try:
                blocks, rows = run_sparse_arch(sparse_arch, data, sparse_model_name=name, finder=recorder, what=what)
                kept.append(blocks.outline())
                self.compare_reads(place, rows)
            except ModelError as error:
                if not place:
                    raise
                return str(error)
            return ""

        def work() -> tuple[str, Outline | None]:
            reason = run_with_others(self.ranks, f"drift/record/{place}", run) if place else run()
            return reason, kept[0] if kept else None

        return self.ranks.all_gather("record the ids of a batch", work, may_block=True)

    def _count_fitting(self, ids: list[dict[str, np.ndarray]], finder: RowFinder | None) -> int:
        """Return how many batches, one at least, have rows that fit into this rank's memory together."""
        fitting, num_bytes = 0, 0
        for by_table in ids:
            for table, numbers in by_table.items():
                assert finder is not None
                row_bytes = _COPIES * finder.embedding_of(table).row_bytes + LOCATION_BYTES + numbers.itemsize
                num_bytes += len(numbers) * row_bytes
            if fitting and num_bytes > self.config.max_memory_bytes:
                break
            fitting += 1
        return fitting

    def compare_reads(self, place: int, rows: SampleRows) -> None:
        """Note in ``rows`` where the batch at ``place`` has read other rows than the first time. This rank's."""
        if place == len(self._first_reads):
            self._first_reads.append(rows.without_digests())
        elif place < len(self._first_reads):
            rows.unseen |= compare_reads(self._first_reads[place], rows)

    def whole_tables(self) -> dict[str, int]:
        """Return the tables that any batch has read as a whole, each with the number of its rows in the model."""
        return {whole.table: whole.num_rows for rows in self._looked_up for whole in rows.whole.values()}

    def look_for_gaps(self, sample: SampleRows) -> None:
        """Refuse a bound for what cannot be measured, by what the ``sample`` has shown. All ranks; nothing is written yet.

        Raises:
            ModelError: on all ranks.
        """
        if self.config.need_export_sparse and self.config.drift_batches:
            self._sample = [sample.without_digests()]
            looked = Looked.at(self._sample, has_asked=any(len(ids) for ids in self.wanted.values()))
            refuse_early(self.ranks, self.config.max_drift, why_unmeasured(self.ranks, looked))

    def check_names(self, sample: DenseSample) -> None:
        """Refuse bounds for outputs that are not there. Rank 0. ConfigError names them."""
        bounds = self.config.max_drift
        unknown = [name for name in bounds if name not in sample.output_names] if isinstance(bounds, dict) else []
        if unknown:
            raise ConfigError(
                f"max_drift: {few(unknown)} is no output of the dense arch; its outputs: {', '.join(sample.output_names)}"
            )

    def run_unmodified(
        self, first: Reference, runner: ReferenceRunner, finder: RowFinder | None, *, reads_package: bool
    ) -> None:
        """Run the unmodified model on the further batches; it gave ``first`` for the sample.

        ``reads_package``: whether the other side will read rows of its own; else it takes the blocks of this one.
        """
        for place, data in enumerate(self.batches):
            reference: Reference | None = first
            if place:
                reference, reasons = runner.run_further(data, finder)
                if self._note_failure(place, reasons):
                    self.batches = self.batches[:place]
                    break
            assert reference is not None
            self.compare_reads(place, reference.rows)
            if self.ranks.rank == 0:
                blocks = {} if reads_package else read_blocks(reference.blocks).tensors
                slim = dataclasses.replace(reference, blocks={}, args=(), kwargs={}, rows=SampleRows())
                self._kept.append(_Kept(slim, describe_other_inputs(reference), blocks))
            self._looked_up.append(reference.rows.without_digests())
        if self.config.need_export_sparse and self._looked_up:
            refuse_early(self.ranks, self.config.max_drift, self._why_unmeasured())
            refuse_early(self.ranks, self.config.max_drift, why_unlooked(self.ranks, self._looked_up))

    def _why_unmeasured(self) -> str:
        return why_unmeasured(self.ranks, Looked.at([*self._sample, *self._looked_up]))

    def score(
        self,
        first: tuple[Blocks, SampleRows] | None,
        run_again: Callable[[Any], tuple[Blocks, SampleRows]],
        sample: DenseSample | None,
        names: tuple[str, ...],
        load: Callable[[], ExportedProgram],
        *,
        changes_rows: bool,
    ) -> DriftEntry | None:
        """Score the batches with the package, and compare. None without batches; the figures are those of rank 0.

        Args:
            first: what the sparse arch gave for the sample with the package's rows; None where the package has none.
            run_again: runs it on another batch. On every rank.
            sample: on rank 0, what the program is of.
            names: the inputs that the program takes.
            load: loads the written program. Rank 0.
            changes_rows: whether settings change a row of any batch, on any rank; else every batch must give equal scores.

        Raises:
            ParityError: on all ranks, where the program fails on a batch of its shapes or gives other outputs; where no setting
                changes a row, also for other scores.
            DriftError: on all ranks, for a drift above ``max_drift``, and for one that cannot be measured.
        """
        scores: list[DriftScores] = []

        def compare(place: int, tensors: Mapping[str, torch.Tensor]) -> None:
            assert sample is not None
            scores.extend([] if scores else [DriftScores(self.config, sample, names, load())])
            kept = self._kept[place]
            assert kept.reference is not None
            scores[0].add(place, tensors, kept.reference, kept.why, is_strict=bool(place) and not changes_rows)
            self._kept[place] = _Kept(None, "", {})

        for place, data in enumerate(self.batches):
            blocks: Blocks | None = None
            if first is not None:
                again = functools.partial(run_again, data)
                step = "score a batch from the shards"
                blocks, rows = self.ranks.run(step, again, may_block=True) if place else first
                self.compare_reads(place, rows)
                self.counts.add(self._looked_up[place], rows)

            def add(place: int = place, blocks: Blocks | None = blocks) -> None:
                compare(place, self._kept[place].blocks if blocks is None else blocks.tensors)

            self.ranks.broadcast("compare with the unmodified model", add)
            if blocks is not None:
                self._looked_up.append(rows.without_digests())
        self.batches = []
        if not self._looked_up:
            return None
        if self.config.need_export_sparse:
            reason = self._why_unmeasured()
            refuse_late(self.ranks, self.config.max_drift, reason)
            if reason:
                return DriftEntry(batches=0, rows=0, outputs={}, not_measured=reason)

        def bound() -> None:
            scores[0].refuse_drift()

        self.ranks.broadcast("bound the drift", bound)
        return scores[0].entry() if scores else DriftEntry(batches=0, rows=0, outputs={})

    def gather_counts(self) -> dict[str, int]:
        """Return how many ids were looked up on all ranks, and how many of them have no row, or none since they are pruned."""
        counted = self.ranks.all_gather("count the ids of the drift", lambda: self.counts)
        return {name: sum(getattr(its, name) for its in counted) for name in ("ids", "without_row", "pruned")}


def join_ids(ids: list[dict[str, np.ndarray]]) -> dict[str, np.ndarray]:
    """Return by table the ids of all batches, sorted, without duplicates."""
    tables = sorted({table for by_table in ids for table in by_table})
    return {t: np.unique(np.concatenate([by_table[t] for by_table in ids if t in by_table])) for t in tables}
