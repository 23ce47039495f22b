"""The sample batch: through the sparse arch, the copied dense arch and the caller's own model, before anything is written."""

from __future__ import annotations

import contextlib
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Any

import numpy as np
from torch import nn

from dist_export.checkpoint.dense import DenseParameters
from dist_export.checkpoint.model_weights import plain_name
from dist_export.config.needs import DenseSettings
from dist_export.dense.blocks import Blocks, Outline
from dist_export.dense.changed_numbers import note_changed_in_sparse, note_changed_numbers
from dist_export.dense.comparison import Comparison
from dist_export.dense.copied_arch import device_of
from dist_export.dense.drift_run import DriftRun
from dist_export.dense.eager import DenseSample, run_dense_arch
from dist_export.dense.fg import Features, check_inputs
from dist_export.dense.id_counts import count_ids
from dist_export.dense.missing_tables import find_missing, is_let_pass, refuse_missing
from dist_export.dense.model_head import ModelHead
from dist_export.dense.model_rest import ModelRest
from dist_export.dense.named_causes import naming_causes
from dist_export.dense.other_formats import refuse_wrong_sample
from dist_export.dense.own_values import list_sparse_modules
from dist_export.dense.pack import check_dtypes
from dist_export.dense.probe import Probe, refuse_unregistered
from dist_export.dense.reference import MODEL, Reference, ReferenceRunner
from dist_export.dense.reference_check import refuse_other_batch, refuse_other_inputs
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.same_blocks import gather_outlines, refuse_other_orders
from dist_export.dense.sample import Batches, check_input_names, cut_sample, run_sparse_arch
from dist_export.dense.sample_notes import (
    SCORES_BEHIND,
    note_constants,
    note_passed,
    note_pruned,
    note_rows,
    refuse_lacking,
)
from dist_export.dense.sample_rows import SampleRows
from dist_export.dense.source_rows import SourceRows
from dist_export.dense.tied_weights import refuse_torn_weights
from dist_export.dense.trace import check_dynamic_dims
from dist_export.dense.unfed_tables import dense_tables_refused, refuse_unregistered_tables
from dist_export.formats.row_encodings import RowCast
from dist_export.model.unwrap import move_to
from dist_export.model.user_objects import Objects
from dist_export.runtime.ranks import Ranks


class SampleRun:
    """Holds what the sample showed on this rank. :meth:`take`, then :meth:`open_rows`, then :meth:`run`, each on all ranks."""

    def __init__(
        self, ranks: Ranks, config: DenseSettings, objects: Objects, parameters: DenseParameters | None
    ) -> None:
        """``parameters`` are those of the checkpoint; None takes the values that are in the model."""
        self._ranks = ranks
        self._config = config
        self._objects = objects
        self._parameters = parameters
        self._batches: Batches | None = None
        self.data: Any = None
        """The sample, as the dataset gave it. None again once it is scored."""
        self.sparse_arch: nn.Module | None = None
        self.dense_arch: nn.Module | None = None
        """The caller's own. None again once it is scored."""
        self.sample: DenseSample | None = None
        """The copied dense arch and what it gives. Rank 0."""
        self.used: tuple[str, ...] = ()
        """Names of the inputs that the program takes. Rank 0, once it is traced."""
        self.looked_up = SampleRows()
        self.reference: Reference | None = None
        """What the caller's own model gave for the batch."""
        self.finder: RowFinder | None = None
        """Of the checkpoint; it knows all that the sample has looked up. None without tables."""
        self.casts: Mapping[str, RowCast] = {}
        self.model_names: dict[str, str] = {}
        """Name of a table in the package -> in the model, where the two differ."""
        self.pruned: dict[str, np.ndarray] = {}
        """Ids of the batches, by table, that rules leave behind."""
        self.changes_rows = False
        """Whether settings change a row that the sample of any rank looked up."""
        self.num_rows = 0
        """Examples of the sample, whole; 0 if that is not known."""
        self.counts: dict[str, dict[str, int]] = {}
        """Ids that the sample looked up, over all ranks: ``asked`` and ``missing`` by table."""
        self.drift = DriftRun(ranks, config)

    @property
    def is_live(self) -> bool:
        """Whether the model in memory is the source."""
        return self._parameters is None

    def take(self) -> None:
        """Take the sample and the batches after it from the dataset. ModelError, on all ranks, if a rank has none."""
        batches = self._ranks.all_gather("take a sample batch", self._take)
        self._ranks.check("look for ranks without a batch", lambda: refuse_lacking(batches))
        assert self._batches is not None
        self.drift.take(self.data, self._batches)

    def _take(self) -> bool:
        self._batches = self._batches or Batches(self._objects.dataset)
        batch = self._batches.take()
        self.data = batch.data
        return batch.is_there

    def open_rows(self, source: SourceRows | None, casts: Mapping[str, RowCast] | None) -> None:
        """Prepare lookups in the source; both as :class:`~dist_export.dense.row_lookup.RowFinder` takes them."""
        self.casts = casts or {}
        if source is not None:
            tables, budget = source.checkpoint.tables, self._config.max_memory_bytes
            self.model_names = {t.name: t.source_name for t in tables if t.source_name is not None}
            self.finder = RowFinder(source, names=self.model_names, casts=self.casts, max_memory_bytes=budget)

    def run(
        self,
        sparse_arch: nn.Module,
        dense_arch: nn.Module,
        copied: nn.Module,
        features: Features,
        *,
        restored: Sequence[str],
    ) -> list[str]:
        """Run the sample batch and the reference. All ranks. Returns notes.

        ``restored``: names within the model of what has the checkpoint's values in the sparse arch, besides tables.
        """
        ranks, config, finder = self._ranks, self._config, self.finder
        notes: list[str] = []
        assert self._batches is not None
        refuse_torn_weights(
            ranks, self._objects.model, finder, self._parameters, config, max_memory_bytes=config.max_memory_bytes
        )
        further = self.drift.record(sparse_arch, finder)
        blocks, rows = ranks.run(
            "run the sparse arch on the sample",
            lambda: run_sparse_arch(sparse_arch, self.data, sparse_model_name=config.sparse_model_name, finder=finder),
            may_block=True,
        )
        self.num_rows = blocks.outline().num_rows or 0
        self.looked_up = rows
        self._look_at_dependence(sparse_arch, blocks, rows)
        if ranks.world_size == 1 and self._parameters is not None:
            notes += ranks.check("look for numbers that forward changes", lambda: self._note_changed(sparse_arch))
        counts = count_ids(ranks, rows)
        self.counts = counts.by_table()
        lacking = find_missing(config, rows, restored)
        if finder is not None:
            names = finder.table_names()
            refuse_missing(ranks, config, rows, lacking, names, is_any_known=counts.is_any_known)
        notes += refuse_unregistered_tables(ranks, rows, is_exported=config.need_export_sparse)
        notes += refuse_unregistered(
            ranks, rows, lambda path: is_let_pass(path, config), is_exported=config.need_export_sparse
        )
        self.drift.look_for_gaps(rows)
        left = counts.left_behind.total()
        notes += note_rows(
            rows,
            finder,
            lacking,
            has_checkpoint=self._parameters is not None,
            is_asked=counts.is_asked,
        )
        notes += note_pruned(left, counts.left_to_model) if left else []
        outlines = gather_outlines(
            ranks,
            sparse_arch,
            blocks,
            self.data,
            self._batches,
            sparse_model_name=config.sparse_model_name,
            further=further,
        )
        notes += ranks.broadcast("run the dense arch on the sample", lambda: self._run(copied, blocks, features))
        ranks.broadcast("compare the order of the blocks", lambda: self._compare_orders(outlines))
        notes += self._run_reference(sparse_arch, dense_arch, finder, blocks)
        return notes

    def _look_at_dependence(self, sparse_arch: nn.Module, blocks: Blocks, rows: SampleRows) -> None:
        """Note in ``rows`` the tables of which the blocks are not made, or not alone, of what was put in. All ranks."""
        self.drift.compare_reads(0, rows)
        finder = self.finder
        if finder is not None:
            probe = Probe(self._ranks, sparse_arch, self.data, finder, sparse_model_name=self._config.sparse_model_name)
            rows.unseen |= probe.look(blocks, rows, changes_rows=bool(self.casts) or bool(self._config.prune))

    def _note_changed(self, sparse_arch: nn.Module) -> list[str]:
        """Return a note on numbers that the sparse arch changes and that its blocks are made of. In a single process."""
        name, finder = self._config.sparse_model_name, self.finder
        modules = list_sparse_modules(self._objects.model, sparse_arch, self._config.dense_model_name)

        def run() -> Blocks:
            its = None if finder is None else finder.probe()
            return run_sparse_arch(sparse_arch, self.data, sparse_model_name=name, finder=its)[0]

        return note_changed_in_sparse(modules, run, name)

    def _run_reference(
        self, sparse_arch: nn.Module, dense_arch: nn.Module, finder: RowFinder | None, blocks: Blocks
    ) -> list[str]:
        """Run the caller's own model on the batch, with the checkpoint's own rows and dense parameters. All ranks.

        ``blocks``: what the sparse arch gave for the batch by itself.
        """
        ranks, config = self._ranks, self._config
        runner = ReferenceRunner(
            ranks,
            self._objects.model,
            sparse_arch,
            dense_arch,
            sparse_model_name=config.sparse_model_name,
            dense_model_name=config.dense_model_name,
        )
        parameters = self._parameters
        load = None if parameters is None else parameters.load
        rest = ModelRest(
            ranks,
            self._objects.model,
            (sparse_arch, dense_arch),
            dense_model_name=config.dense_model_name,
            allowed=config.allow_missing_dense,
            tables=() if finder is None else finder.table_names(),
            left_out=lambda: [] if parameters is None else [plain_name(its.name) for its in parameters.left_out],
        )
        with rest.values(load), runner.dense_values(load):
            own_rows = None if finder is None else finder.unmodified()
            self.reference = runner.run(self.data, own_rows)
            self.drift.run_unmodified(self.reference, runner, own_rows, reads_package=config.need_export_sparse)
        passed = rest.refuse_lacking() if self.reference.kind == MODEL else []
        if finder is not None:
            self.pruned = finder.pruned_ids()
            whole = self.drift.whole_tables()
            self.changes_rows = any(ranks.all_gather("look for changed rows", lambda: finder.changes_rows(whole)))
        if self.reference.kind == MODEL and self.changes_rows:  # the model had the rows as they were
            name = config.sparse_model_name
            run = partial(run_sparse_arch, sparse_arch, self.data, sparse_model_name=name, finder=own_rows)
            blocks, _ = ranks.run("run the sparse arch on unmodified rows", run, may_block=True)
        found = ranks.broadcast("look at the reference", lambda: self._look_at_reference(blocks))
        return [*note_passed(passed, "model's forward"), *found, *self.drift.notes]

    def _look_at_reference(self, blocks: Blocks) -> list[str]:
        """Return notes on the reference. Rank 0. ModelError where the model gives the dense arch what serving cannot give."""
        assert self.sample is not None
        assert self.reference is not None
        with naming_causes(self.sample.dense_arch, self._config.dense_model_name, self._objects.model):
            refuse_other_inputs(self.sample, self.reference, atol=self._config.atol, rtol=self._config.rtol)
        if self.reference.kind == MODEL:
            refuse_other_batch(self.sample, blocks.tensors, self.reference)
        if self.reference.has_more_behind:
            return [SCORES_BEHIND]
        reason = self.reference.reason
        told = "scores are those of dense_arch(sparse_arch(batch)); what forward does before the two and between them is left out"
        return [f"{reason}: {told}"] if reason else []

    def _compare_orders(self, outlines: list[list[Outline]]) -> None:
        assert self.sample is not None
        refuse_other_orders(self.sample, outlines, atol=self._config.atol, rtol=self._config.rtol)

    def _run(self, copied: nn.Module, blocks: Blocks, features: Features) -> list[str]:
        check_input_names(blocks.tensors)
        device = device_of(copied, self._config.device)
        cut = cut_sample(blocks, device=device, max_batch_size=self._config.max_batch_size)
        check_dynamic_dims(cut.tensors, self._config.dynamic_dims)
        move_to(copied, device)
        with self._without_tables(copied):
            self.sample = sample = run_dense_arch(copied, cut, export_outputs=self._config.export_outputs)
            changed = [] if self._parameters is None else note_changed_numbers(sample, self._config.dense_model_name)
        check_dtypes(sample, self._config.archive_format)
        refuse_wrong_sample(sample, self._config)
        self.drift.check_names(sample)
        shapes = {name: tuple(tensor.shape) for name, tensor in sample.inputs.items()}
        return [*blocks.notes, *changed, *note_constants(blocks), *check_inputs(features, shapes)]

    def _without_tables(self, copied: nn.Module) -> contextlib.AbstractContextManager[None]:
        """Return what refuses hash tables in the dense arch, unless their rows in memory are what is exported."""
        if self.is_live:
            return contextlib.nullcontext()
        tables = () if self.finder is None else self.finder.table_names()
        return dense_tables_refused(copied, self._config.dense_model_name, tables)

    def head(self) -> ModelHead | None:
        """Return what runs the model up to its dense arch; None if scores are those of the arches alone. Until it is scored."""
        assert self.reference is not None
        assert self.sparse_arch is not None
        assert self.dense_arch is not None
        if self.reference.kind != MODEL:
            return None
        return ModelHead(self._objects.model, self.sparse_arch, self.dense_arch)

    def comparison(self) -> Comparison:
        """Return what scores of the sample are compared with. Rank 0, once the dense arch is traced."""
        assert self.sample is not None
        assert self.reference is not None
        return Comparison(self._config, self.sample, self.used, self.reference)
