"""The dense part of an export in order: sample batch on all ranks, then trace, write and compare on rank 0."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

import msgspec
import numpy as np
from torch import nn
from torch.export import ExportedProgram

from dist_export.archive.safe_load import load_program
from dist_export.checkpoint.dense import DenseParameters
from dist_export.checkpoint.metadata import Checkpoint
from dist_export.config.schema import ExportConfig
from dist_export.dense.blocks import Blocks, Outline, read_blocks
from dist_export.dense.comparison import Comparison
from dist_export.dense.copied_arch import clear_gradients, device_of, find_arches, load_copy, note_unregistered
from dist_export.dense.drift_run import DriftRun
from dist_export.dense.eager import DenseSample, run_dense_arch
from dist_export.dense.fg import Features, check_inputs
from dist_export.dense.folder import PROGRAM, describe_dense, write_dense_folder
from dist_export.dense.id_counts import count_ids
from dist_export.dense.missing_tables import find_missing, is_let_pass, refuse_missing
from dist_export.dense.modes import refuse_merging
from dist_export.dense.named_causes import naming_causes
from dist_export.dense.other_formats import FormatWriter, refuse_wrong_sample
from dist_export.dense.own_extra_state import extra_state_within
from dist_export.dense.own_parameters import values_within
from dist_export.dense.pack import check_dtypes
from dist_export.dense.parity import check_parity, refuse_other_rows
from dist_export.dense.probe import Probe, refuse_unregistered
from dist_export.dense.reference import Reference, ReferenceRunner
from dist_export.dense.reference_check import (
    refuse_other_inputs,
    refuse_other_sample,
)
from dist_export.dense.replicas import compare_replicas
from dist_export.dense.row_check import check_rows, check_whole_rows
from dist_export.dense.row_lookup import LiveRows, RowFinder
from dist_export.dense.rule_check import check_settings
from dist_export.dense.same_blocks import gather_outlines, refuse_other_orders
from dist_export.dense.sample import SAMPLE, Batches, check_input_names, cut_sample, run_sparse_arch
from dist_export.dense.sample_notes import (
    note_constants,
    note_lacking,
    note_not_finite,
    note_pruned,
    note_rows,
    refuse_lacking,
)
from dist_export.dense.sample_rows import SampleRows, hash_row
from dist_export.dense.source_rows import SourceRows
from dist_export.dense.tied_tables import refuse_torn_tables
from dist_export.dense.trace import check_dynamic_dims, trace_dense
from dist_export.errors import ModelError, ParityError
from dist_export.formats.row_encodings import RowCast
from dist_export.manifest import DenseEntry, DriftEntry, ParityEntry, TableEntry
from dist_export.model.unwrap import copy_dense_arch, move_to
from dist_export.model.user_objects import Objects
from dist_export.runtime.ranks import Ranks
from dist_export.storage.directory import Directory


class DenseStage:
    """Holds what the dense part knows from one step to the next. ``prepare`` on all ranks, ``trace`` on rank 0."""

    def __init__(
        self, ranks: Ranks, config: ExportConfig, objects: Objects, parameters: DenseParameters | None
    ) -> None:
        """``parameters`` are those of the checkpoint; None takes the values that are in the dense arch."""
        self._ranks = ranks
        self._config = config
        self._objects = objects
        self._parameters = parameters
        self._batches: Batches | None = None
        self._drift = DriftRun(ranks, config)
        self._pruned: dict[str, np.ndarray] = {}
        """Ids of the batches, by table, that rules leave behind."""
        self._data: Any = None
        self._sparse_arch: nn.Module | None = None
        self._lacking: list[str] = []
        """Extra state of the sparse arch that the checkpoint does not have."""
        self._put: list[str] = []
        """What of the sparse arch has the checkpoint's values besides tables, by its name within the model."""
        self._sample: DenseSample | None = None
        self._used: tuple[str, ...] = ()
        """Names of the inputs that the program takes."""
        self._looked_up = SampleRows()
        self._model_names: dict[str, str] = {}
        """Name of a table in the package -> in the model, where the two differ."""
        self._casts: Mapping[str, RowCast] = {}
        self._reference: Reference | None = None
        """What the caller's own model gave for the batch, on this rank."""
        self._finder: RowFinder | None = None
        """Of the checkpoint; it knows all that the sample has looked up."""
        self._changes_rows = False
        """Whether settings change a row that the sample of any rank looked up."""
        self.num_rows = 0
        """Examples of this rank's sample, whole; 0 if that is not known."""
        self.notes: list[str] = []
        """What turned up after :meth:`prepare`. Rank 0."""
        self.entry: DenseEntry | None = None
        self.parity: ParityEntry | None = None
        self.drift: DriftEntry | None = None
        """On rank 0."""
        self.drift_counts: dict[str, int] = {}
        """Ids that all batches of the drift looked up, over all ranks."""
        self.counts: dict[str, dict[str, int]] = {}
        """Ids that the sample batch looked up, over all ranks: ``asked`` and ``missing`` by table."""
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
        ranks = self._ranks
        checkpoint = None if source is None else source.checkpoint
        sparse_arch, dense_arch = ranks.run(
            "look into the model", lambda: find_arches(self._objects.model, self._config)
        )
        self._sparse_arch = sparse_arch
        ranks.all_gather("clear the gradients", lambda: clear_gradients(self._objects.dense_optimizer))
        copied = ranks.run("copy the dense arch", lambda: copy_dense_arch(dense_arch), may_block=True)
        notes = list(ranks.broadcast("load the dense parameters", lambda: self._load(copied, checkpoint)))
        if self._parameters is not None:
            notes += note_unregistered(self._objects.model, dense_arch, self._config.dense_model_name)
        if checkpoint is not None:  # its modes may compute values, which are compared as they were
            path, is_live = self._config.sparse_model_name, checkpoint.memory is not None
            ranks.run("look at train() and eval()", lambda: refuse_merging(sparse_arch, path, is_live=is_live))
        notes += compare_replicas(ranks, copied) if self._parameters is None else []
        batches = ranks.all_gather("take a sample batch", self._take)
        ranks.run("look for ranks without a batch", lambda: refuse_lacking(batches))
        assert self._batches is not None
        self._drift.take(self._data, self._batches)
        self._casts = casts or {}
        finder = None
        if source is not None:
            names, budget = self._names_of(source.checkpoint), self._config.max_memory_bytes
            finder = RowFinder(source, names=names, casts=self._casts, max_memory_bytes=budget)
        self._finder = finder
        with self._sparse_values() as put:
            self._put = put
            return [
                *notes,
                *note_lacking(self._lacking),
                *self._run_sample(sparse_arch, dense_arch, copied, features),
            ]

    @property
    def data(self) -> Any:
        """The sample of this rank, as the dataset gave it. Until :meth:`score`."""
        return self._data

    @property
    def sparse_state(self) -> tuple[str, ...]:
        """Names within the model of what has the checkpoint's values in the sparse arch, besides tables."""
        return tuple(self._put)

    @property
    def further_batches(self) -> list[Any]:
        """The batches of this rank after the sample. As many on every rank; until :meth:`score`."""
        return self._drift.batches[1:]

    @property
    def finder(self) -> RowFinder | None:
        """Finds rows of the checkpoint. None without tables."""
        return self._finder

    @property
    def sparse_arch(self) -> nn.Module | None:
        """The caller's own. Until :meth:`score`."""
        return self._sparse_arch

    @property
    def sample(self) -> DenseSample | None:
        """The copied dense arch and what it gives. Rank 0."""
        return self._sample

    @property
    def reference(self) -> Reference | None:
        """What the caller's own model gave for the sample, on this rank."""
        return self._reference

    @property
    def changes_rows(self) -> bool:
        """Whether settings change a row that the sample of any rank looked up."""
        return self._changes_rows

    def sparse_values(self) -> contextlib.AbstractContextManager[list[str]]:
        """Within this block, what is no table in the caller's sparse arch has the checkpoint's values. All ranks."""
        return self._sparse_values()

    @contextlib.contextmanager
    def _sparse_values(self) -> Iterator[list[str]]:
        """Within this block, what is no table in the caller's sparse arch has the checkpoint's values. All ranks."""
        if self._parameters is None:  # a model in memory has them
            yield []
            return
        state = self._ranks.run("read the parameters of the sparse arch", self._parameters.load)
        assert self._sparse_arch is not None
        config, arch = self._config, self._sparse_arch
        path, below = config.sparse_model_name, config.dense_model_name
        with contextlib.ExitStack() as held:

            def put() -> list[str]:
                values = held.enter_context(values_within(arch, state, path=path, except_below=below))
                keep = config.allow_load_hooks
                extra = extra_state_within(arch, state, path=path, except_below=below, keep=keep)
                found = held.enter_context(extra)
                self._lacking = found.lacking
                return [*values, *found.put]

            yield self._ranks.run("put values into the sparse arch", put)

    def _run_sample(
        self, sparse_arch: nn.Module, dense_arch: nn.Module, copied: nn.Module, features: Features
    ) -> list[str]:
        """Run the sample batch and the reference. All ranks. Returns notes."""
        ranks, config, finder = self._ranks, self._config, self._finder
        notes: list[str] = []
        assert self._batches is not None
        further = self._drift.record(sparse_arch, finder)
        blocks, rows = ranks.run(
            "run the sparse arch on the sample",
            lambda: run_sparse_arch(sparse_arch, self._data, sparse_model_name=config.sparse_model_name, finder=finder),
            may_block=True,
        )
        self.num_rows = blocks.outline().num_rows or 0
        self._looked_up = rows
        self._look_at_dependence(sparse_arch, blocks, rows)
        counts = count_ids(ranks, rows)
        self.counts = counts.by_table()
        lacking = find_missing(config, rows, self._put)
        if finder is not None:
            names = finder.table_names()
            refuse_missing(ranks, config, rows, lacking, names, is_any_known=counts.is_any_known)
        notes += refuse_unregistered(
            ranks, rows, lambda path: is_let_pass(path, config), is_exported=config.need_export_sparse
        )
        self._drift.look_for_gaps(rows)
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
            self._data,
            self._batches,
            sparse_model_name=config.sparse_model_name,
            further=further,
        )
        notes += ranks.broadcast("run the dense arch on the sample", lambda: self._run(copied, blocks, features))
        ranks.broadcast("compare the order of the blocks", lambda: self._compare_orders(outlines))
        notes += self._run_reference(sparse_arch, dense_arch, finder)
        return notes

    def _look_at_dependence(self, sparse_arch: nn.Module, blocks: Blocks, rows: SampleRows) -> None:
        """Note in ``rows`` the tables of which the blocks are not made, or not alone, of what was put in. All ranks."""
        self._drift.compare_reads(0, rows)
        finder = self._finder
        if finder is not None:
            refuse_torn_tables(self._ranks, finder, rows)
            probe = Probe(
                self._ranks, sparse_arch, self._data, finder, sparse_model_name=self._config.sparse_model_name
            )
            rows.unseen |= probe.look(blocks, rows, changes_rows=bool(self._casts) or bool(self._config.prune))

    def _run_reference(self, sparse_arch: nn.Module, dense_arch: nn.Module, finder: RowFinder | None) -> list[str]:
        """Run the caller's own model on the batch, with the checkpoint's own rows and dense parameters. All ranks."""
        ranks, config = self._ranks, self._config
        runner = ReferenceRunner(
            ranks,
            self._objects.model,
            sparse_arch,
            dense_arch,
            sparse_model_name=config.sparse_model_name,
            dense_model_name=config.dense_model_name,
        )
        with runner.dense_values(None if self._parameters is None else self._parameters.load):
            own_rows = None if finder is None else finder.unmodified()
            self._reference = runner.run(self._data, own_rows)
            self._drift.run_unmodified(self._reference, runner, own_rows, reads_package=config.need_export_sparse)
        if finder is not None:
            self._pruned = finder.pruned_ids()
            whole = self._drift.whole_tables()
            self._changes_rows = any(ranks.all_gather("look for changed rows", lambda: finder.changes_rows(whole)))
        return [*ranks.broadcast("look at the reference", self._look_at_reference), *self._drift.notes]

    def trace(self, folder: Path, mc_conf: Mapping[str, Any] | None) -> None:
        """Trace, write into ``folder``, load what was written and compare. Rank 0; issues no collective."""
        config, sample = self._config, self._sample
        assert sample is not None
        traced = trace_dense(sample, max_batch_size=config.max_batch_size, dynamic_dims=config.dynamic_dims)
        write_dense_folder(
            folder,
            sample,
            traced,
            export_model_name=config.export_model_name,
            archive_format=config.archive_format,
            mc_conf=mc_conf,
            looked_up=self._looked_up.rows,
            default_rows=self._hash_default_rows(),
        )
        self._used = tuple(traced.inputs)
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
            load_program(folder / PROGRAM),
            shapes=[output.shape for output in self.entry.outputs],
            atol=config.atol,
            rtol=config.rtol,
            max_batch_size=config.max_batch_size,
        )
        self._check_reference(load_program(folder / PROGRAM))
        self.entry = FormatWriter(config, sample, traced, self.entry, self._compare_format).write(folder)

    def _compare_format(self, program: Any, what: str, config: ExportConfig, parity: ParityEntry) -> ParityEntry:
        """Compare a program of ``dense_formats`` with the caller's own model, and add the figures to ``parity``. Rank 0."""
        reference = self._reference
        assert self._sample is not None
        assert reference is not None
        comparison = Comparison(config, self._sample, self._used, reference)
        figures = comparison.with_reference(program, read_blocks(reference.blocks).tensors, what)
        return figures.merge_into(parity, reference.kind)

    def _hash_default_rows(self) -> dict[str, str]:
        finder = self._finder if self._config.need_export_sparse else None
        names = [] if finder is None else finder.exported_names()
        return {finder.written_name(name): hash_row(finder.default_row(name)) for name in names if finder is not None}

    def _check_reference(self, program: ExportedProgram) -> None:
        """Compare the program with the caller's own model, and add the figures to ``parity``. Rank 0."""
        reference, parity = self._reference, self.parity
        assert self._sample is not None
        assert reference is not None
        assert parity is not None
        tensors = read_blocks(reference.blocks).tensors
        if not self._changes_rows:
            refuse_other_sample(self._sample, tensors)
        with naming_causes(self._sample.dense_arch, self._config.dense_model_name, self._objects.model):
            figures = self._comparison().with_reference(program, tensors)
        self.notes += [*figures.notes, *note_not_finite(self._sample)]
        self.parity = figures.merge_into(parity, reference.kind)

    def score(
        self,
        written: Checkpoint | None,
        target: Directory,
        *,
        entries: Sequence[TableEntry] = (),
        lists: Mapping[str, np.ndarray] | None = None,
        beside: Callable[[Callable[[Any], Blocks], Blocks], None] | None = None,
    ) -> None:
        """Score the sample anew from what was written, and compare with the model on the checkpoint's rows. All ranks.

        Args:
            written: the target, opened as any checkpoint is; None where the package has no tables.
            target: where the dense folder is.
            entries: what the manifest will say of the tables.
            lists: path -> ids (int64, sorted) of the files that rules of ``prune`` name.
            beside: called on all ranks if there are tables, while the sample is still there, with what runs the sparse arch on
                a batch with the written rows, and with what it gave for the sample.

        Raises:
            ParityError: on all ranks, for a row or an output that is not what it was.
        """
        with self._sparse_values():
            self._score(written, target, functools.partial(self._check_rows, target, entries, lists or {}), beside)

    def _check_rows(
        self,
        target: Directory,
        entries: Sequence[TableEntry],
        lists: Mapping[str, np.ndarray],
        rows: SampleRows,
        written: RowFinder,
    ) -> None:
        """Compare what the sample found in the shards with the source and with the settings. Any rank, its own lookups."""
        refuse_other_rows(self._looked_up, rows, target)
        if self._finder is not None:
            check_settings(self._config, self._finder, written, entries, lists)
            check_rows(self._finder, written)
            check_whole_rows(self._finder, written, self._looked_up)

    def _score(
        self,
        written: Checkpoint | None,
        target: Directory,
        check_rows: Callable[[SampleRows, RowFinder], None],
        beside: Callable[[Callable[[Any], Blocks], Blocks], None] | None,
    ) -> None:
        ranks = self._ranks
        first: tuple[Blocks, SampleRows] | None = None
        blocks: Blocks | None = None
        run_again: Callable[[Any], tuple[Blocks, SampleRows]] = _refuse_to_run
        reads_rows = False
        if written is not None:
            assert self._sparse_arch is not None
            sparse_arch = self._sparse_arch
            # the check has proven that each id lies in the slice of its part
            finder = RowFinder(
                SourceRows(checkpoint=written, misplaced=np.zeros(len(written.parts), np.int64), is_written=True),
                names=self._model_names,
                casts=self._casts,
                live=LiveRows(
                    is_own=self._is_own_row if self._parameters is None else None,
                    sharded=self._looked_up.sharded_tables,
                    pruned=self._pruned,
                ),
                max_memory_bytes=self._config.max_memory_bytes,
            )
            finder.learned = {} if self._finder is None else self._finder.learned
            wanted = self._drift.wanted
            if self._parameters is None:  # of a model in memory, what another rank holds is not looked for
                wanted = {table: ids[self._is_own_row(table, ids)] for table, ids in wanted.items()}
            finder.want(wanted)
            run_again = functools.partial(self._run_again, sparse_arch, finder)
            blocks, rows = ranks.run(
                "score the sample from the shards",
                lambda: self._run_again(sparse_arch, finder, self._data, what=SAMPLE),
                may_block=True,
            )
            ranks.run("compare the rows of the sample", lambda: check_rows(rows, finder))
            reads_rows = any(ranks.all_gather("count the rows of the sample", lambda: rows.num_found > 0))
            first = (blocks, rows)
            if beside is not None:
                beside(lambda data: run_again(data)[0], blocks)
        self._data = self._sparse_arch = None
        ranks.broadcast("compare the scores", lambda: self._compare(blocks, target, reads_rows=reads_rows))
        load = functools.partial(self._load_program, target)
        self.drift = self._drift.score(
            first, run_again, self._sample, self._used, load, changes_rows=self._changes_rows
        )
        if self.drift is not None and first is not None:
            self.drift_counts = self._drift.gather_counts()

    def _load_program(self, target: Directory) -> ExportedProgram:
        assert self.entry is not None
        return load_program(target.read(self.entry.program))

    def _run_again(
        self, sparse_arch: nn.Module, finder: RowFinder, data: Any, what: str = "a further batch"
    ) -> tuple[Blocks, SampleRows]:
        name = self._config.sparse_model_name
        try:
            return run_sparse_arch(sparse_arch, data, sparse_model_name=name, finder=finder, what=what)
        except ModelError as error:
            raise ParityError(
                f"{error}. It ran with the checkpoint's rows before, and fails with those of the written shards. No manifest "
                "was written"
            ) from error

    def _comparison(self) -> Comparison:
        assert self._sample is not None
        assert self._reference is not None
        return Comparison(self._config, self._sample, self._used, self._reference)

    def _compare(self, blocks: Blocks | None, target: Directory, *, reads_rows: bool) -> None:
        """Compare scores of ``blocks``, which the sparse arch gave when it ran again; None where it did not. Rank 0."""
        assert self.parity is not None
        comparison, program = self._comparison(), self._load_program(target)
        found = comparison.of_files(program, blocks, changes_rows=self._changes_rows, reads_rows=reads_rows)
        self.parity = msgspec.structs.replace(self.parity, from_files=found)

    def _look_at_reference(self) -> list[str]:
        """Return notes on the reference. Rank 0. ModelError where the model gives the dense arch what serving cannot give."""
        assert self._sample is not None
        assert self._reference is not None
        with naming_causes(self._sample.dense_arch, self._config.dense_model_name, self._objects.model):
            refuse_other_inputs(self._sample, self._reference, atol=self._config.atol, rtol=self._config.rtol)
        reason = self._reference.reason
        told = "the scores are compared with dense_arch(sparse_arch(batch)), so what forward does between the two is not checked"
        return [f"{reason}: {told}"] if reason else []

    def _load(self, copied: nn.Module, checkpoint: Checkpoint | None) -> tuple[str, ...]:
        tables = [] if checkpoint is None else [table.name_in_source for table in checkpoint.tables]
        loaded = load_copy(copied, self._parameters, self._objects.model, self._config, tables=tables)
        self.parameters, self.taken, self.own_values = loaded.parameters, loaded.taken, loaded.own_values
        return loaded.notes

    def _names_of(self, checkpoint: Checkpoint) -> dict[str, str]:
        self._model_names = {t.name: t.source_name for t in checkpoint.tables if t.source_name is not None}
        return self._model_names

    def _is_own_row(self, table: str, ids: np.ndarray) -> np.ndarray:
        """Whether this rank's own table holds these ids (bool) for export, as far as a batch has asked for them."""
        known = None if self._finder is None else self._finder.known(table)
        is_own = np.zeros(len(ids), bool)
        if known is not None:
            is_known = np.isin(ids, known.ids)
            is_own[is_known] = known.of(ids[is_known]).is_kept
        return is_own

    def _take(self) -> bool:
        self._batches = self._batches or Batches(self._objects.dataset)
        batch = self._batches.take()
        self._data = batch.data
        return batch.is_there

    def _compare_orders(self, outlines: list[list[Outline]]) -> None:
        assert self._sample is not None
        refuse_other_orders(self._sample, outlines, atol=self._config.atol, rtol=self._config.rtol)

    def _run(self, copied: nn.Module, blocks: Blocks, features: Features) -> list[str]:
        check_input_names(blocks.tensors)
        device = device_of(copied, self._config.device)
        cut = cut_sample(blocks, device=device, max_batch_size=self._config.max_batch_size)
        check_dynamic_dims(cut.tensors, self._config.dynamic_dims)
        move_to(copied, device)
        self._sample = sample = run_dense_arch(copied, cut, export_outputs=self._config.export_outputs)
        check_dtypes(sample, self._config.archive_format)
        refuse_wrong_sample(sample, self._config)
        self._drift.check_names(sample)
        shapes = {name: tuple(tensor.shape) for name, tensor in sample.inputs.items()}
        return [*blocks.notes, *note_constants(blocks), *check_inputs(features, shapes)]


def _refuse_to_run(_: Any) -> tuple[Blocks, SampleRows]:
    raise AssertionError("there are no shards to run on")
