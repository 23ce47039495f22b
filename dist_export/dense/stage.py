"""The dense part of an export in order: sample batch on all ranks, then trace, write and compare on rank 0."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from torch import nn
from torch.export import ExportedProgram

from dist_export.archive.safe_load import load_program
from dist_export.checkpoint.dense import DenseParameters
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.checkpoint.model_weights import plain_name
from dist_export.config.needs import Comparisons, DenseSettings
from dist_export.dense.blocks import Blocks, read_blocks
from dist_export.dense.clock_reads import note_reads
from dist_export.dense.comparison import Comparison
from dist_export.dense.copied_arch import clear_gradients, find_arches, load_copy, note_unregistered
from dist_export.dense.eager import DenseSample, note_fast_path
from dist_export.dense.fg import Features
from dist_export.dense.folder import PROGRAM, describe_dense, write_dense_folder
from dist_export.dense.made_at_call import BeforeCall
from dist_export.dense.model_head import ModelHead
from dist_export.dense.modes import refuse_merging
from dist_export.dense.named_causes import naming_causes
from dist_export.dense.other_formats import FormatWriter
from dist_export.dense.own_parameters import reshard
from dist_export.dense.parity import check_parity, refuse_other_rows
from dist_export.dense.reference import Reference
from dist_export.dense.reference_check import (
    refuse_other_sample,
)
from dist_export.dense.replicas import compare_replicas
from dist_export.dense.row_check import check_rows, check_whole_rows
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.rule_check import check_settings
from dist_export.dense.same_model import copy_same_arch
from dist_export.dense.sample_notes import (
    note_lacking,
    note_not_finite,
    note_passed,
)
from dist_export.dense.sample_rows import SampleRows, hash_row
from dist_export.dense.sample_run import SampleRun
from dist_export.dense.source_rows import SourceRows
from dist_export.dense.sparse_values import SparseValues
from dist_export.dense.trace import trace_dense
from dist_export.dense.unsaved_values import note_unsaved
from dist_export.dense.used_inputs import as_loaded
from dist_export.dense.written_scores import WrittenScores
from dist_export.formats.row_encodings import RowCast
from dist_export.manifest import DenseEntry, DriftEntry, ParityEntry, TableEntry
from dist_export.model.user_objects import Objects
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory


class DenseStage:
    """Holds what the dense part knows from one step to the next. ``prepare`` on all ranks, ``trace`` on rank 0."""

    def __init__(
        self, ranks: Ranks, config: DenseSettings, objects: Objects, parameters: DenseParameters | None
    ) -> None:
        """``parameters`` are those of the checkpoint; None takes the values that are in the dense arch."""
        self._ranks = ranks
        self._config = config
        self._objects = objects
        self._parameters = parameters
        self._sampled = SampleRun(ranks, config, objects, parameters)
        self._values = SparseValues(ranks, config, objects.model, parameters)
        self.notes: list[str] = []
        """What turned up after :meth:`prepare`. Rank 0."""
        self.entry: DenseEntry | None = None
        self.parity: ParityEntry | None = None
        self.drift: DriftEntry | None = None
        """On rank 0."""
        self.drift_counts: dict[str, int] = {}
        """Ids that all batches of the drift looked up, over all ranks."""
        self.parameters: list[tuple[str, str, tuple[int, ...]]] = []
        """Of a model in memory: name within the model, torch dtype name and shape of its dense parameters. Rank 0."""
        self.taken: frozenset[str] = frozenset()
        """Names of the checkpoint's tensors, or of the model's parameters, that the program holds. Rank 0."""
        self.own_values: dict[str, Any] = {}
        """For the manifest's ``run``: names of what the program holds and the checkpoint did not give, and a digest. Rank 0."""

    def prepare(
        self,
        source: SourceRows | None,
        features: Features,
        *,
        casts: Mapping[str, RowCast] | None = None,
    ) -> list[str]:
        """Copy and load the dense arch, run the sample batch, name the outputs. All ranks; nothing is written.

        ``source`` and ``casts`` are as :class:`~dist_export.dense.row_lookup.RowFinder` takes them.

        Returns notes for the summary. Raises ModelError, on all ranks, for what the user can mend.
        """
        ranks, sampled = self._ranks, self._sampled
        checkpoint = None if source is None else source.checkpoint
        sparse_arch, dense_arch = ranks.check(
            "look into the model", lambda: find_arches(self._objects.model, self._config)
        )
        sampled.sparse_arch, sampled.dense_arch = sparse_arch, dense_arch
        ranks.check("drop whole parameters of FSDP", lambda: reshard(self._objects.model))
        ranks.all_gather("clear the gradients", lambda: clear_gradients(self._objects.dense_optimizer))
        copied = copy_same_arch(ranks, self._objects.model, (sparse_arch, dense_arch))
        notes = list(ranks.broadcast("load the dense parameters", lambda: self._load(copied, checkpoint)))
        if self._parameters is not None:
            notes += note_unregistered(self._objects.model, dense_arch, self._config.dense_model_name)
            notes += note_unsaved(self._objects.model, self._config)
        notes += ranks.check("look for clocks", lambda: note_reads(self._objects.model))
        notes += note_fast_path(self._objects.model)
        if checkpoint is not None:  # its modes may compute values, which are compared as they were
            path, is_live = self._config.sparse_model_name, checkpoint.memory is not None
            ranks.check("look at train() and eval()", lambda: refuse_merging(sparse_arch, path, is_live=is_live))
        notes += compare_replicas(ranks, copied) if self._parameters is None else []
        sampled.take()
        sampled.open_rows(source, casts)
        self._values.tables = sampled.finder if self._config.need_export_sparse else None
        before = BeforeCall(("", self._objects.model), (self._config.dense_model_name, copied))
        with self.sparse_values():
            restored, lacking = self._values.put, self._values.lacking
            found = sampled.run(sparse_arch, dense_arch, copied, features, restored=restored)
            found += ranks.check_on_first("look at what forward made", before.notes, [])
            return [*notes, *note_lacking(lacking), *note_passed(self._values.passed, "sparse arch"), *found]

    @property
    def data(self) -> Any:
        """The sample of this rank, as the dataset gave it. Until :meth:`score`."""
        return self._sampled.data

    @property
    def num_rows(self) -> int:
        """Examples of this rank's sample, whole; 0 if that is not known."""
        return self._sampled.num_rows

    @property
    def counts(self) -> dict[str, dict[str, int]]:
        """Ids that the sample batch looked up, over all ranks: ``asked`` and ``missing`` by table."""
        return self._sampled.counts

    @property
    def sparse_state(self) -> tuple[str, ...]:
        """Names within the model of what has the checkpoint's values in the sparse arch, besides tables of the package."""
        finder = self._sampled.finder
        tables = set() if finder is None else {plain_name(name) for name in finder.exported_names()}
        return tuple(name for name in self._values.put if plain_name(name) not in tables)

    @property
    def further_batches(self) -> list[Any]:
        """The batches of this rank after the sample. As many on every rank; until :meth:`score`."""
        return self._sampled.drift.batches[1:]

    @property
    def finder(self) -> RowFinder | None:
        """Finds rows of the checkpoint. None without tables."""
        return self._sampled.finder

    @property
    def sparse_arch(self) -> nn.Module | None:
        """The caller's own. Until :meth:`score`."""
        return self._sampled.sparse_arch

    @property
    def sample(self) -> DenseSample | None:
        """The copied dense arch and what it gives. Rank 0."""
        return self._sampled.sample

    @property
    def reference(self) -> Reference | None:
        """What the caller's own model gave for the sample, on this rank."""
        return self._sampled.reference

    @property
    def changes_rows(self) -> bool:
        """Whether settings change a row that the sample of any rank looked up."""
        return self._sampled.changes_rows

    @property
    def head(self) -> ModelHead | None:
        """Runs the model up to its dense arch; None if scores are those of the arches alone. Until :meth:`score`."""
        return self._sampled.head()

    def sparse_values(self) -> contextlib.AbstractContextManager[None]:
        """Within this block, what is no table in the caller's sparse arch has the checkpoint's values. All ranks."""
        assert self.sparse_arch is not None
        return self._values.within(self.sparse_arch)

    def trace(self, folder: Path, mc_conf: Mapping[str, Any] | None) -> None:
        """Trace, write into ``folder``, load what was written and compare. Rank 0; issues no collective."""
        config, sample = self._config, self._sampled.sample
        assert sample is not None
        traced = trace_dense(sample, max_batch_size=config.max_batch_size, dynamic_dims=config.dynamic_dims)
        program = write_dense_folder(
            folder,
            sample,
            traced,
            export_model_name=config.export_model_name,
            archive_format=config.archive_format,
            mc_conf=mc_conf,
            looked_up=self._sampled.looked_up.rows,
            default_rows=self._hash_default_rows(),
        )
        self._sampled.used = tuple(traced.inputs)
        self.entry = describe_dense(
            sample,
            traced,
            folder_name=config.export_folder_name,
            archive_format=config.archive_format,
            max_batch_size=config.max_batch_size,
            dynamic_dims=config.dynamic_dims,
        )
        self.parity = check_parity(
            sample,
            traced.inputs,
            program,
            shapes=[output.shape for output in self.entry.outputs],
            atol=config.atol,
            rtol=config.rtol,
            max_batch_size=config.max_batch_size,
        )
        self._check_reference(as_loaded(program, lambda: load_program(folder / PROGRAM)))
        self.entry = FormatWriter(config, sample, traced, self.entry, self._compare_format).write(folder)

    def _compare_format(self, program: Any, what: str, bounds: Comparisons, parity: ParityEntry) -> ParityEntry:
        """Compare a program of ``dense_formats`` with the caller's own model, and add the figures to ``parity``. Rank 0."""
        reference = self._sampled.reference
        assert self._sampled.sample is not None
        assert reference is not None
        comparison = Comparison(bounds, self._sampled.sample, self._sampled.used, reference)
        figures = comparison.with_reference(program, read_blocks(reference.blocks).tensors, what)
        return figures.merge_into(parity, reference.kind)

    def _hash_default_rows(self) -> dict[str, str]:
        finder = self._sampled.finder if self._config.need_export_sparse else None
        names = [] if finder is None else finder.exported_names()
        return {finder.written_name(name): hash_row(finder.default_row(name)) for name in names if finder is not None}

    def _check_reference(self, program: ExportedProgram) -> None:
        """Compare the program with the caller's own model, and add the figures to ``parity``. Rank 0."""
        reference, parity = self._sampled.reference, self.parity
        assert self._sampled.sample is not None
        assert reference is not None
        assert parity is not None
        tensors = read_blocks(reference.blocks).tensors
        if not self._sampled.changes_rows:
            refuse_other_sample(self._sampled.sample, tensors)
        with naming_causes(self._sampled.sample.dense_arch, self._config.dense_model_name, self._objects.model):
            figures = self._sampled.comparison().with_reference(program, tensors)
        self.notes += [*figures.notes, *note_not_finite(self._sampled.sample)]
        self.parity = figures.merge_into(parity, reference.kind)

    def score(
        self,
        written: SourceRows | None,
        target: Directory,
        *,
        entries: Sequence[TableEntry] = (),
        lists: Mapping[str, np.ndarray] | None = None,
        beside: Callable[[Callable[[Any], Blocks], Blocks], None] | None = None,
    ) -> None:
        """Score the sample anew from what was written, and compare with the model on the checkpoint's rows. All ranks.

        Args:
            written: the rows of the shards, with those that a delta leaves to its base; None where the package has no tables.
            target: where the dense folder is.
            entries: what the manifest will say of the tables.
            lists: path -> ids (int64, sorted) of the files that rules of ``prune`` name.
            beside: called on all ranks if there are tables, while the sample is still there, with what runs the sparse arch on
                a batch with the written rows, and with what it gave for the sample.

        Raises:
            ParityError: on all ranks, for a row or an output that is not what it was.
        """
        scores = WrittenScores(self._ranks, self._config, self._sampled, functools.partial(self._load_program, target))
        with self.sparse_values():
            scores.score(written, functools.partial(self._check_rows, target, entries, lists or {}), beside)
        if self.parity is not None:
            self.parity = msgspec.structs.replace(self.parity, from_files=scores.from_files)
        self.drift, self.drift_counts = scores.drift, scores.drift_counts

    def _check_rows(
        self,
        target: Directory,
        entries: Sequence[TableEntry],
        lists: Mapping[str, np.ndarray],
        rows: SampleRows,
        written: RowFinder,
    ) -> None:
        """Compare what the sample found in the shards with the source and with the settings. Any rank, its own lookups."""
        finder, looked_up = self._sampled.finder, self._sampled.looked_up
        refuse_other_rows(looked_up, rows, target)
        if finder is not None:
            check_settings(self._config, finder, written, entries, lists)
            check_rows(finder, written)
            check_whole_rows(finder, written, looked_up)

    def _load_program(self, target: Directory) -> ExportedProgram:
        assert self.entry is not None
        return load_program(target.read(self.entry.program))

    def _load(self, copied: nn.Module, checkpoint: Checkpoint | None) -> tuple[str, ...]:
        tables = [] if checkpoint is None else [table.name_in_source for table in checkpoint.tables]
        loaded = load_copy(copied, self._parameters, self._objects.model, self._config, tables=tables)
        self.parameters, self.taken, self.own_values = loaded.parameters, loaded.taken, loaded.own_values
        return loaded.notes
