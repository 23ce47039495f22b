"""The serving contract in order: stated before anything is written, then carried out on the written shards and compared."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import msgspec
import numpy as np
import torch

from dist_export.archive.traced_sizes import holds_always
from dist_export.config.needs import ScoreSettings
from dist_export.config.serving import read_serving
from dist_export.contract.draft import Draft
from dist_export.contract.read import Reading, read_blocks_of
from dist_export.contract.replay import compare_blocks, compare_outputs, to_arrays
from dist_export.contract.statements import read_collections, read_fg
from dist_export.dense.blocks import Blocks
from dist_export.dense.fg import Features
from dist_export.dense.stage import DenseStage
from dist_export.errors import ParityError, UserError
from dist_export.formats.serving_entries import DenseInputEntry, ReplayEntry, ServingEntry
from dist_export.manifest import TableEntry
from dist_export.package.dense_inputs import build_dense_inputs
from dist_export.package.reader import Package
from dist_export.runtime.ranks import Ranks
from dist_export.score.inputs import flatten_batch
from dist_export.score.stage import ScoreStage
from dist_export.score.table_weight import NotExportableError

_NOT_READ = "the package has no score program, so the sparse arch could not be read"


class ContractStage:
    """Holds the contract from one step to the next. All ranks have one."""

    def __init__(self, ranks: Ranks, config: ScoreSettings, dense: DenseStage, scores: ScoreStage | None) -> None:
        self._ranks = ranks
        self._config = config
        self._dense = dense
        self._scores = scores
        self._draft: Draft | None = None
        self._arrays: dict[str, np.ndarray] = {}
        self.entry: ServingEntry | None = None
        """On rank 0, after :meth:`compare_written`."""

    def state(self, fg_conf: Mapping[str, Any] | None, features: Features) -> list[str]:
        """Put together what is known of the way from ids to the dense inputs. All ranks; writes nothing. Returns notes.

        Raises:
            ConfigError: on all ranks, if fg, mc or the setting contradict the model or each other.
        """
        return self._ranks.broadcast("state the serving contract", lambda: self._state(fg_conf, features))

    def _state(self, fg_conf: Mapping[str, Any] | None, features: Features) -> list[str]:
        dense, config = self._dense, self._config
        finder, sparse_arch, sample = dense.finder, dense.sparse_arch, dense.sample
        assert finder is not None
        assert sparse_arch is not None
        assert sample is not None
        try:
            batch = flatten_batch(dense.data)
        except NotExportableError as error:
            return [f"the package has no serving contract: {error}"]
        reading = self._read(sample.inputs)
        draft = Draft(reading, batch.tensors, batch.jagged)
        draft.add_fg(read_fg(fg_conf, features, finder))
        draft.add_collections(read_collections(sparse_arch, finder, config.sparse_model_name))
        shapes = {finder.written_name(name): finder.embedding_of(name).inner_shape for name in finder.exported_names()}
        dims = {name: int(np.prod(shape, dtype=np.int64)) for name, shape in shapes.items()}
        draft.add_settings(read_serving(config.serving), dims)
        self._draft, self._arrays = draft, to_arrays(batch.tensors)
        return []

    def _read(self, inputs: Mapping[str, torch.Tensor]) -> Reading:
        """Return what the sparse arch's own program tells; where there is none, that nothing is known of any input."""
        traced = None if self._scores is None else self._scores.take_blocks()
        if traced is not None:
            assert self._scores is not None
            assert self._scores.entry is not None
            demanded = [text for text in self._scores.entry.conditions if not holds_always(text, smallest=1)]
            return read_blocks_of(*traced, demanded)
        reading = Reading()
        for name, tensor in inputs.items():
            dtype = str(tensor.dtype).removeprefix("torch.")
            reading.inputs[name] = DenseInputEntry(name=name, dtype=dtype, dims=tensor.dim(), unknown=_NOT_READ)
        return reading

    def preview(self, tables: Mapping[str, TableEntry], names: Sequence[str]) -> ServingEntry | None:
        """Return the contract as it will be, for these tables and dense inputs; None if there is none. Rank 0."""
        return None if self._draft is None else self._draft.finish(tables, names)

    def compare_written(self, open_written: Callable[[], Package], blocks: Blocks) -> list[str]:
        """Carry the contract out with rows of the written shards, and compare with the model. All ranks. Returns notes.

        Args:
            open_written: opens the package, whose manifest is not written yet. Rank 0.
            blocks: what the model's own sparse arch gave for the sample, on rows of the written shards.

        Raises:
            ParityError: on all ranks, if a dense input or a score differs.
        """
        return self._ranks.broadcast(
            "compare the serving contract with the model", lambda: self._compare(open_written, blocks)
        )

    def _compare(self, open_written: Callable[[], Package], blocks: Blocks) -> list[str]:
        if self._draft is None:
            return []
        with open_written() as package:
            dense, draft = package.manifest.dense, self._draft
            if dense is None:
                return []
            names = [entry.name for entry in dense.inputs]
            serving = draft.finish({table.name: table for table in package.manifest.tables}, names)
            self.entry = self._replay(package, draft, serving, blocks)
        self._draft, self._arrays = None, {}
        unknown = [entry.name for entry in self.entry.inputs if entry.unknown is not msgspec.UNSET]
        if not unknown:
            return []
        names_of = ", ".join(unknown)
        return [
            f"the serving contract does not say how these dense inputs come about: {names_of}; manifest.serving says why"
        ]

    def _replay(self, package: Package, draft: Draft, serving: ServingEntry, blocks: Blocks) -> ServingEntry:
        """Compare each known input, and the scores. What only the program told, and differs, is unknown. ParityError."""
        sample = self._dense.sample
        assert sample is not None
        limit = next(iter(sample.inputs.values())).shape[0]
        own = {name: tensor.detach().cpu()[:limit] for name, tensor in blocks.tensors.items()}
        given, inputs = dict(own), []
        for entry in serving.inputs:
            reason = ""
            if entry.unknown is msgspec.UNSET:
                try:
                    given[entry.name] = self._compute(package, serving, entry, own[entry.name])
                except (ParityError, UserError) as error:
                    if draft.is_stated_by_user(entry):
                        raise
                    reason = f"what was read of the sparse arch does not hold for the sample: {error}".split(
                        ". No man"
                    )[0]
            inputs.append(msgspec.structs.replace(entry, columns=(), unknown=reason) if reason else entry)
        known = [entry for entry in inputs if entry.unknown is msgspec.UNSET]
        serving = msgspec.structs.replace(serving, inputs=tuple(inputs))
        if not known:
            return serving
        program = package.load_program().module()
        with torch.no_grad():
            expected, found = (
                program(**{entry.name: tensors[entry.name].clone() for entry in inputs}) for tensors in (own, given)
            )
        try:
            max_abs = compare_outputs(sample, expected, found, given, config=self._config)
        except ParityError as error:
            if any(map(draft.is_stated_by_user, known)):
                raise
            unknown = tuple(msgspec.structs.replace(entry, columns=(), unknown=str(error)) for entry in inputs)
            return msgspec.structs.replace(serving, inputs=unknown)
        replay = ReplayEntry(rows=limit, inputs=tuple(entry.name for entry in known), max_abs=max_abs)
        return msgspec.structs.replace(serving, replay=replay)

    def _compute(
        self, package: Package, serving: ServingEntry, entry: DenseInputEntry, own: torch.Tensor
    ) -> torch.Tensor:
        """Return what the contract gives for one input of the sample. ParityError if that is not what the model gives."""
        alone = msgspec.structs.replace(serving, inputs=(entry,))
        computed = build_dense_inputs(
            alone,
            self._arrays,
            lambda table, slot, ids: package.lookup(table, ids, slot=slot)[0],
            where=package.directory.url,
        )[entry.name][: len(own)]
        compare_blocks(entry, serving, computed, own)
        return torch.from_numpy(np.ascontiguousarray(computed)).to(own.dtype)
