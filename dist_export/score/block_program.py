"""Export the sparse arch alone, with lookups as operators: from the tensors of a batch to the inputs of the dense arch."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from dist_export.archive.traced_sizes import input_shapes
from dist_export.score.decompositions import decompose
from dist_export.score.inputs import FlatBatch
from dist_export.score.trace import ScoredModel, export_arches, own_changed_state, sizes_from_zero


@dataclass(frozen=True, slots=True)
class BlockProgram:
    """The program, with its inputs and outputs in order."""

    program: ExportedProgram
    batch: FlatBatch
    tensors: dict[str, torch.Tensor]
    """Its inputs for the sample."""
    blocks: tuple[str, ...]
    """The inputs of the dense arch that it gives."""
    num_examples: int
    """In the sample."""

    @property
    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """The shapes of the inputs, with a symbol or an expression for each free size."""
        return input_shapes(self.program, list(self.tensors))


def trace_blocks(scored: ScoredModel, batch: FlatBatch, num_examples: int) -> BlockProgram:
    """Trace what the dense arch gets for so many examples. The tables were replaced before. Rank 0; no collective takes place.

    Raises:
        NotExportableError: torch cannot trace it.
    """
    names = tuple(scored.sample.inputs)
    program = export_arches(dataclasses.replace(scored, blocks=names), batch, list(batch.tensors), {})
    with sizes_from_zero(scored.from_zero):
        program = decompose(program)
    own_changed_state(program)
    return BlockProgram(program, batch, dict(batch.tensors), names, num_examples)
