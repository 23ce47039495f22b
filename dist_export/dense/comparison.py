"""The written program against the caller's own model on the sample, with the tolerances of the settings. Rank 0."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch.export import ExportedProgram

from dist_export.config.needs import Comparisons
from dist_export.dense.blocks import Blocks, read_blocks
from dist_export.dense.eager import DenseSample
from dist_export.dense.parity import score_from_files
from dist_export.dense.reference import Reference
from dist_export.dense.reference_check import ReferenceFigures, check_reference
from dist_export.dense.sample import check_input_names, cut_sample
from dist_export.errors import ParityError
from dist_export.manifest import FilesParityEntry


@dataclass(frozen=True, slots=True)
class Bounds:
    """Tolerances of its own, for what computes otherwise than torch."""

    atol: float
    rtol: float
    max_batch_size: int


@dataclass(frozen=True, slots=True)
class Comparison:
    """What scores of the sample are compared with, and how."""

    config: Comparisons
    sample: DenseSample
    used: tuple[str, ...]
    """Names of the inputs that the program takes."""
    reference: Reference
    """What the caller's own model gave for the batch."""

    def with_reference(
        self, program: Any, tensors: Mapping[str, torch.Tensor], what: str = "the written program"
    ) -> ReferenceFigures:
        """Compare the program's scores of ``tensors`` with the model's. ParityError where they differ."""
        return check_reference(
            self.sample,
            self.used,
            program,
            self.reference,
            tensors=tensors,
            what=what,
            atol=self.config.atol,
            rtol=self.config.rtol,
            max_batch_size=self.config.max_batch_size,
        )

    def of_files(
        self, program: ExportedProgram, blocks: Blocks | None, *, changes_rows: bool, reads_rows: bool
    ) -> FilesParityEntry:
        """Compare the scores of ``blocks``, which the sparse arch gave on rows of the written shards.

        Where settings have changed a row of the batch, the model's own scores are others: what was written is compared with
        the plain copy on the rows as serving gets them then.

        Args:
            program: as it was written.
            blocks: None where the sparse arch did not run again.
            changes_rows: whether settings have changed a row of the batch.
            reads_rows: whether any row came from the shards.

        Raises:
            ParityError: the scores differ, or an input is no longer there.
        """
        config = self.config
        tensors = read_blocks(self.reference.blocks).tensors if blocks is None else blocks.tensors
        lacking = [name for name in self.used if name not in tensors]
        if lacking:
            raise ParityError(
                f"the sparse arch no longer gives {lacking[0]!r} when it runs on the sample again. No manifest was written"
            )
        if not changes_rows:
            what = "the written program" + (" on rows of the written shards" if reads_rows else "")
            figures = self.with_reference(program, tensors, what)
            return figures.of_files(kind=self.reference.kind, reads_rows=reads_rows)
        inputs = self.sample.inputs
        if blocks is not None:
            check_input_names(tensors)
            device = next(iter(inputs.values())).device
            inputs = cut_sample(blocks, device=device, max_batch_size=config.max_batch_size).tensors
        return score_from_files(
            self.sample,
            {name: inputs[name].clone() for name in self.used},
            program,
            reads_rows=reads_rows,
            atol=config.atol,
            rtol=config.rtol,
        )
