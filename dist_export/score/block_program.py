"""Export the sparse arch alone, with lookups as operators: from the tensors of a batch to the inputs of the dense arch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import nn
from torch.export import ExportedProgram

from dist_export.dense.blocks import read_blocks
from dist_export.score.decompositions import decompose
from dist_export.score.inputs import FlatBatch
from dist_export.score.needed_inputs import input_shapes
from dist_export.score.trace import ScoredModel, export_arches, sizes_from_zero


@dataclass(frozen=True, slots=True)
class BlockProgram:
    """The program, with its inputs and outputs in order."""

    program: ExportedProgram
    batch: FlatBatch
    tensors: dict[str, torch.Tensor]
    """Its inputs for the sample."""
    blocks: tuple[str, ...]
    """The inputs of the dense arch that it gives."""

    @property
    def shapes(self) -> dict[str, tuple[Any, ...]]:
        """The shapes of the inputs, with a symbol or an expression for each free size."""
        return input_shapes(self.program, list(self.tensors))


class _Blocks(nn.Module):
    """In the place of the dense arch: returns what it is given."""

    def __init__(self, names: Sequence[str]) -> None:
        super().__init__()
        self._names = tuple(names)

    def forward(self, blocks: Mapping[Any, Any]) -> list[torch.Tensor]:
        tensors = read_blocks(blocks).tensors
        return [tensors[name] for name in self._names]


def trace_blocks(scored: ScoredModel, batch: FlatBatch) -> BlockProgram:
    """Trace what the dense arch gets for a batch. The tables were replaced before. Rank 0; no collective takes place.

    Raises:
        NotExportableError: torch cannot trace it.
    """
    names = tuple(scored.sample.inputs)
    gathered = dataclasses.replace(scored.sample, dense_arch=_Blocks(names), is_single=False, output_keys=None)
    program = export_arches(dataclasses.replace(scored, sample=gathered), batch, list(batch.tensors), {})
    with sizes_from_zero():
        program = decompose(program)
    return BlockProgram(program, batch, dict(batch.tensors), names)
