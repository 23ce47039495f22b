"""The score program in order: traced before anything is written, then written, then compared on rows of the written shards."""

from __future__ import annotations

import contextlib
import dataclasses
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import msgspec
import torch
from torch import nn

from dist_export.archive.lookup_operator import bind, register_source
from dist_export.archive.safe_load import load_program
from dist_export.checkpoint.extra_state import is_extra_state
from dist_export.checkpoint.model_weights import is_below, plain_name
from dist_export.config.needs import ScoreSettings
from dist_export.dense.blocks import Blocks
from dist_export.dense.eager import DenseSample
from dist_export.dense.modes import eval_mode
from dist_export.dense.own_parameters import buffers_put_back, reshard
from dist_export.dense.row_lookup import RowFinder
from dist_export.dense.sample import SAMPLE_ROWS, run_sparse_arch
from dist_export.dense.stage import DenseStage
from dist_export.errors import DistExportError, ParityError
from dist_export.formats.row_encodings import RowCast
from dist_export.manifest import ScoreEntry
from dist_export.model.alone import say_sharded, without_replicas
from dist_export.model.unwrap import unwrap
from dist_export.model.user_errors import blame, said
from dist_export.package.reader import Package
from dist_export.package.score import PackageRows, bind_program
from dist_export.runtime.ranks import Ranks
from dist_export.score.block_program import BlockProgram, trace_blocks
from dist_export.score.compare import ScoreFigures
from dist_export.score.folder import describe_scores, pack_scores, write_score_folder
from dist_export.score.needed_inputs import find_free_lists, is_of_tried_sizes
from dist_export.score.other_ids import IdTrial, list_trials
from dist_export.score.parity import ScoreParity
from dist_export.score.required import fail, reason_of, refuse
from dist_export.score.row_modules import FailingModule, Recorder, choose_module, name_modules
from dist_export.score.sources import CheckpointRows
from dist_export.score.table_weight import NotExportableError
from dist_export.score.tables import ModelTables
from dist_export.score.trace import ScoredModel, TracedScores, trace_scores
from dist_export.score.trace_notes import list_trace_notes


class ScoreStage:
    """Holds what is known of the score program from one step to the next. All ranks have one."""

    def __init__(self, ranks: Ranks, config: ScoreSettings, dense: DenseStage, casts: Mapping[str, RowCast]) -> None:
        """``casts``: by table, how rows are written otherwise than the source has them."""
        self._ranks = ranks
        self._config = config
        self._dense = dense
        self._casts = dict(casts)
        self._parity = ScoreParity(ranks, config, dense)
        self._traced: TracedScores | None = None
        self._packed = b""
        self._row_modules: dict[int, tuple[str, list[str]]] = {}
        """``id()`` of modules that are lookups as a whole -> path and tables. Rank 0."""
        self._failing: nn.Module | None = None
        """In which module of the sparse arch the last trace failed, if it is known. Rank 0."""
        self._rows: CheckpointRows | None = None
        """Gives the rows to the lookups of the trace. Rank 0; kept as long as they need it."""
        self.entry: ScoreEntry | None = None
        """On rank 0, if there is a score program."""
        self.held: frozenset[str] = frozenset()
        """Names within the model, without wrappers, of what the program has of the sparse arch. Rank 0."""
        self.is_there = False
        """Whether there is a score program. The same on all ranks."""
        self._blocks: BlockProgram | None = None
        """The sparse arch alone, until :meth:`take_blocks`. Rank 0."""
        self.left_out = ""
        """Why the written program was left out of the package; empty if it was not. The same on all ranks."""

    def trace(self) -> list[str]:
        """Trace the program and compare it on the checkpoint's rows. All ranks; writes nothing. Returns notes.

        Raises:
            ModelError: on all ranks, if there can be none and ``score_program`` is ``require``.
        """
        with self._dense.sparse_values():
            reason = self._try()
        self.is_there = not reason
        if reason:
            self._traced, self._packed, self.entry, self.held = None, b"", None, frozenset()
            self._rows, self._blocks = None, None
            if self._config.score_program == "require":
                self._ranks.broadcast("export the score program", lambda: refuse(reason))
            return [f"the package has no score program: {reason}"]
        return self._ranks.broadcast("look at the score program", self._list_notes)

    def take_blocks(self) -> tuple[BlockProgram, CheckpointRows] | None:
        """Return the sparse arch as a program, and what knows its tables' rows; they are kept no longer. Rank 0.

        None if there is no score program, ``serving`` is off, or the sparse arch cannot be exported alone.
        """
        blocks, rows = self._blocks, self._rows
        self._blocks, self._rows = None, None
        return None if blocks is None or rows is None else (blocks, rows)

    def write(self, scratch: Path) -> None:
        """Write the program and its sample into ``scratch``. Rank 0."""
        if self.is_there:
            assert self.entry is not None
            write_score_folder(scratch, self.entry, self._packed, self._stored_inputs(), self._stored_outputs())
            self._packed = b""

    def compare_written(
        self, open_written: Callable[[], Package], run_sparse: Callable[[Any], Blocks], blocks: Blocks
    ) -> None:
        """Compare the written program with the model, on rows of the written shards. All ranks.

        Args:
            open_written: opens the package, whose manifest is not written yet. Rank 0.
            run_sparse: runs the model's sparse arch on a batch, on rows of the written shards.
            blocks: what it gave for the sample.

        Under ``auto``, a program that differs is left out (``left_out``). If the shards are wrong, the comparison of the dense
        arch fails, too.

        Raises:
            ParityError: on all ranks, if an output differs, and ``score_program`` is ``require``.
        """
        if not self.is_there:
            return
        if reason := self._compare_written(open_written, run_sparse, blocks):
            if self._config.score_program == "require":
                self._ranks.broadcast("compare the score program with the model", lambda: fail(reason))
            self.left_out = f"the package has no score program: on rows of the written shards, {reason}"
            self.is_there, self.entry = False, None
        self._traced = None

    def _compare_written(
        self, open_written: Callable[[], Package], run_sparse: Callable[[Any], Blocks], blocks: Blocks
    ) -> str:
        """Compare, and put the figures into the entry. All ranks. Returns why the program is not the model."""
        with contextlib.ExitStack() as held:
            kept: list[ScoreFigures] = []

            def load() -> str:
                assert self.entry is not None
                package = held.enter_context(open_written())
                tables = {table.name for table in package.manifest.tables}
                program = load_program(package.files.read(self.entry.program), tables=tables)
                figures = ScoreFigures(
                    self._config, self._sample(), bind_program(program, PackageRows(package)).module()
                )
                try:
                    self._parity.compare_sample(figures, blocks, self._inputs)
                except ParityError as error:
                    return reason_of(error)
                kept.append(figures)
                return ""

            if reason := self._ranks.broadcast("compare the score program with the model", load):
                return reason
            figures = kept[0] if kept else None
            if reason := self._parity.compare_others(
                figures, run_sparse, self._inputs, self._free_lists, self._other_ids
            ):
                return reason
        if self.entry is not None and figures is not None:
            self.entry = msgspec.structs.replace(self.entry, parity=self._parity.entry(figures))
        return ""

    # ---- the trace ----

    def _try(self) -> str:
        """Trace and compare. All ranks. Returns why there can be no program; empty if there is one."""
        ranks, finder = self._ranks, self._dense.finder
        assert finder is not None
        if reason := ranks.broadcast("look for what is sharded", self._say_sharded) or self._parity.look():
            return reason
        reason, is_traced = self._try_once(finder)
        if is_traced and reason and ranks.broadcast("look at the sizes", self._may_try_again):
            self._parity.from_zero = False
            reason = "" if not self._try_once(finder)[0] else reason
        return reason

    def _may_try_again(self) -> bool:
        """Whether a trace that takes sizes for 2 or more can be tried out where the model's code looks at them. Rank 0."""
        conditions = () if self.entry is None else self.entry.conditions
        return self._parity.can_resize and all(map(is_of_tried_sizes, conditions))

    def _try_once(self, finder: RowFinder) -> tuple[str, bool]:
        """Trace and compare. All ranks. Returns why this is no program, empty if it is one; and whether it could be traced."""
        ranks = self._ranks
        reason = ranks.broadcast("trace the score program", self._trace_tables)
        if reason and (candidates := self._record_row_modules(finder)) is not None:
            first = reason
            reason = ranks.broadcast("trace the score program", lambda: self._trace_without(candidates, first))
        if reason or (finder.is_live and ranks.world_size > 1):  # then the rows of other ranks are only in the shards
            return reason, not reason
        kept: list[ScoreFigures] = []

        def compare() -> str:
            figures = ScoreFigures(self._config, self._sample(), self._bound())
            kept.append(figures)
            try:
                found = figures.run(self._stored_inputs(), "on the sample")
                figures.compare(self._stored_outputs(), found, None, "on the sample")
            except ParityError as error:
                return reason_of(error) + self._tables("").describe_computing()
            return ""

        reason = ranks.broadcast("score the sample", compare)
        figures = kept[0] if kept else None
        reason = reason or self._parity.compare_others(
            figures, self._run_sparse, self._inputs, self._free_lists, self._other_ids
        )
        return reason, True

    def _run_sparse(self, data: Any) -> Blocks:
        dense = self._dense
        assert dense.finder is not None
        name = self._config.sparse_model_name
        blocks, _ = run_sparse_arch(
            self._sparse_arch,
            data,
            sparse_model_name=name,
            finder=dense.finder.probe(),
            what="a cut batch",
            head=dense.head,
        )
        return blocks

    @property
    def _sparse_arch(self) -> nn.Module:
        assert self._dense.sparse_arch is not None
        return self._dense.sparse_arch

    def _sample(self) -> DenseSample:
        assert self._dense.sample is not None
        return self._dense.sample

    def _tables(self, token: str) -> ModelTables:
        assert self._dense.finder is not None
        name = self._config.sparse_model_name
        return ModelTables(unwrap(self._sparse_arch), self._dense.finder, sparse_model_name=name, token=token)

    def _say_sharded(self) -> str:
        """Return why rank 0 cannot run the model by itself, which it does for the trace. Rank 0."""
        if self._ranks.world_size == 1:
            return ""
        head = self._dense.head
        root, apart = (self._sparse_arch, None) if head is None else (head.model, head.own_dense_arch)
        return say_sharded(root, apart, self._tables("").weights())

    def _trace_tables(self) -> str:
        """Trace with lookups in the place of the tables themselves, and of the modules that the settings name. Rank 0."""
        patterns, prefix = self._config.lookup_modules, self._config.sparse_model_name
        self._row_modules = name_modules(self._tables(""), patterns, prefix) if patterns else {}
        return self._trace_once()

    def _trace_once(self) -> str:
        """Trace and pack. Rank 0. Returns why that cannot be, and keeps the module in which it fails."""
        finder, batch = self._dense.finder, self._parity.batch
        assert finder is not None
        assert batch is not None
        rows = CheckpointRows(finder, self._casts)
        self._rows = rows
        token = register_source(rows)
        sparse_arch = unwrap(self._sparse_arch)
        modules = {number: tables for number, (_, tables) in self._row_modules.items()}
        size = max(2, self._num_stored)
        cut = dataclasses.replace(batch, tensors=self._parity.cut(size))
        head = self._dense.head
        scored = ScoredModel(
            sparse_arch, self._sample(), head, is_live=finder.is_live, from_zero=self._parity.from_zero
        )
        root = sparse_arch if head is None else head.model
        place = contextlib.nullcontext() if head is None else head.traced(scored.sample.dense_arch)
        failing = FailingModule(sparse_arch, scored.sparse_path)
        try:
            tables = self._tables(token)
            with (
                buffers_put_back(root),
                eval_mode(root),
                tables.replaced(modules),
                place,
                without_replicas(root),
                failing,
            ):
                traced = trace_scores(scored, cut)
                has_contract, num_cut = (
                    self._config.serving != "off",
                    self._parity.count_cut(size, self._dense.num_rows),
                )
                self._blocks = trace_blocks(scored, cut, num_cut) if has_contract else None
            self._packed = pack_scores(traced, archive_format=self._config.archive_format)
            named = {path: ", ".join(its) for path, its in self._row_modules.values()}
            self.entry = describe_scores(traced, self._sample(), named, self._parity.first_sizes())
        except NotExportableError as error:
            self._failing = failing.find(error)
            return str(error)
        except DistExportError:
            raise
        except Exception as error:  # noqa: BLE001 -- it runs the model's code in ways that no test of its owner has seen
            self._failing = failing.find(error)
            return f"{said(error)}{blame(error)}"
        finally:
            reshard(root)  # a trace that fails leaves the whole parameters of FSDP behind
        self._traced = traced
        self.held = self._list_held(traced, scored.sparse_path)
        return ""

    def _list_held(self, traced: TracedScores, path: str) -> frozenset[str]:
        """Return names of parameters, buffers and extra state of the sparse arch that are in the program. Rank 0."""
        program, prefix = traced.program, self._config.sparse_model_name
        keys = [key for key in (*program.state_dict, *program.constants) if is_below(key, path)]
        within = [key.removeprefix(path).removeprefix(".") for key in keys]
        names = {plain_name(".".join(part for part in (prefix, key) if part)) for key in within}
        return frozenset(names | {name for name in self._dense.sparse_state if is_extra_state(name)})

    def _record_row_modules(self, finder: RowFinder) -> dict[int, tuple[str, list[str]]] | None:
        """Run the sample once more, and find modules that are lookups as a whole. All ranks.

        Returns them on rank 0, and nothing on other ranks; None on all ranks if there are none.
        """
        tables = self._tables("")
        recorder = Recorder(tables if self._ranks.rank == 0 else None)

        def run() -> None:
            with recorder:
                self._run_sparse(self._dense.data)

        self._ranks.run("run the sparse arch for its lookups", run, may_block=True)
        candidates: dict[int, tuple[str, list[str]]] = {}

        def find() -> bool:
            candidates.update(recorder.find(finder, CheckpointRows(finder, self._casts)))
            return bool(candidates)

        return candidates if self._ranks.broadcast("look for modules that are lookups", find) else None

    def _trace_without(self, candidates: Mapping[int, tuple[str, list[str]]], reason: str) -> str:
        """Replace modules in which the trace fails, one at a time, until it succeeds. Rank 0. Returns why it cannot."""
        sparse_arch, tried = unwrap(self._sparse_arch), set(self._row_modules)
        while reason:
            module = choose_module(self._failing, candidates, sparse_arch, tried)
            if module is None:
                break
            tried.add(id(module))
            for child in module.modules():  # a lookup as a whole has none within
                self._row_modules.pop(id(child), None)
            self._row_modules[id(module)] = candidates[id(module)]
            reason = self._trace_once()
        return reason

    def _list_notes(self) -> list[str]:
        assert self.entry is not None
        constants = {} if self._parity.batch is None else self._parity.batch.constants
        found = () if self._config.lookup_modules else sorted(path for path, _ in self._row_modules.values())
        return list_trace_notes(self.entry, constants, found)

    # ---- the sample ----

    @property
    def _num_stored(self) -> int:
        return min(self._dense.num_rows, SAMPLE_ROWS, self._config.max_batch_size)

    def _inputs(self, tensors: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
        """Return those of the tensors of a batch that the program takes."""
        assert self._traced is not None
        return {name: tensors[name] for name in self._traced.inputs}

    def _free_lists(self) -> list[list[tuple[str, int]]]:
        assert self._traced is not None
        traced = self._traced
        return find_free_lists(traced.program, list(traced.inputs), traced.sizes, traced.conditions)

    def _other_ids(self) -> list[IdTrial]:
        """Return ids that the sample lacks, if a module was replaced as a whole: with them it may not be a lookup."""
        finder, traced = self._dense.finder, self._traced
        if traced is None or finder is None or finder.is_live or not self._row_modules:
            return []
        return list_trials(finder, traced.program, list(traced.inputs), is_alone=self._ranks.world_size == 1)

    def _stored_inputs(self) -> dict[str, torch.Tensor]:
        return self._inputs(self._parity.cut(self._num_stored))

    def _stored_outputs(self) -> list[torch.Tensor]:
        """Return the model's outputs for the stored inputs: one row for each example, if the output has rows."""
        sample = self._sample()
        rows = next(iter(sample.inputs.values())).shape[0]
        return [
            output[: self._num_stored] if output.dim() and output.shape[0] == rows else output
            for output in sample.outputs
        ]

    def _bound(self) -> nn.Module:
        assert self._traced is not None
        assert self._rows is not None
        bind(self._traced.program.graph_module, register_source(self._rows))
        return self._traced.program.module()
