"""Compare the written program with the unmodified model on batches, and add up how far apart their outputs are. Rank 0."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping

import torch
from torch.export import ExportedProgram

from dist_export.archive.output_diff import has_same_values
from dist_export.config.needs import DriftSettings
from dist_export.dense.drift import OutputDrift, refuse_drift
from dist_export.dense.eager import DenseSample, exporting
from dist_export.dense.reference import Reference
from dist_export.dense.reference_check import check_reference
from dist_export.errors import ParityError
from dist_export.manifest import DriftEntry
from dist_export.model.user_errors import blame, said


class DriftScores:
    """The program, and the drift of its outputs over all batches so far."""

    def __init__(
        self, config: DriftSettings, sample: DenseSample, names: tuple[str, ...], program: ExportedProgram
    ) -> None:
        """Compare nothing yet.

        Args:
            config: the settings.
            sample: what the program is of.
            names: the inputs that the program takes.
            program: as it was written.
        """
        self._config, self._sample, self._names, self._program = config, sample, names, program
        self._outputs: dict[str, OutputDrift] = {}
        self._num_batches = self._num_rows = self._num_skipped = 0
        self._is_cut = False
        """Whether the sample has more rows than the program takes."""

    def add(
        self, place: int, tensors: Mapping[str, torch.Tensor], reference: Reference, why: str, *, is_strict: bool
    ) -> None:
        """Run the program on a batch and add how far its outputs are from the unmodified model's.

        Args:
            place: of the batch; 0 is the sample.
            tensors: the inputs for the program.
            reference: what the unmodified model gave.
            why: how the inputs of the unmodified dense arch differ from what its sparse arch gave; empty where they do not.
            is_strict: whether outputs that differ by more than rounding are a ParityError.

        Raises:
            ParityError: the program fails on the batch, or gives outputs of other shapes.
        """
        sample, limit = self._sample, self._config.max_batch_size
        free = self._config.dynamic_dims
        if not all(_fits(tensors.get(name), sample.inputs[name], free.get(name, {})) for name in self._names):
            self._num_skipped += 1
            return
        rows = tensors[self._names[0]].shape[0]
        found = self._run(tensors)
        self._num_batches += 1
        self._num_rows += min(rows, limit)
        is_apart = False
        for name, one, other in zip(sample.output_names, sample.flatten(reference.output), found, strict=True):
            whole = one[:limit] if rows > limit and one.dim() and one.shape[0] == rows else one
            if whole.shape != other.shape:
                if rows > limit:
                    continue  # what has no row for each of the batch cannot be had of a part of it
                raise ParityError(
                    f"output {name!r} of a further batch: the written program gives {list(other.shape)}, the model "
                    f"{list(whole.shape)}. No manifest was written"
                )
            self._outputs.setdefault(name, OutputDrift()).add(whole, other)
            is_apart = is_apart or not has_same_values(whole, other)
        self._is_cut = rows > limit if not place else self._is_cut
        # a score may depend on all rows of its batch: where the sample was whole, a part of a batch proves nothing
        if is_strict and is_apart and (rows <= limit or self._is_cut):
            self._refuse_other_scores(place, tensors, reference, why)

    def refuse_drift(self) -> None:
        """Raise DriftError if a drift is above ``max_drift``, or was not measured although it has a bound."""
        blank = [name for name, drift in self._outputs.items() if drift.is_blank]
        refuse_drift(self.entry().outputs, self._config.max_drift, blank)

    def entry(self) -> DriftEntry:
        """Return the figures for the manifest."""
        outputs = {name: drift.entry() for name, drift in self._outputs.items()}
        return DriftEntry(batches=self._num_batches, rows=self._num_rows, outputs=outputs, skipped=self._num_skipped)

    def _run(self, tensors: Mapping[str, torch.Tensor]) -> list[torch.Tensor]:
        sample, limit = self._sample, self._config.max_batch_size
        inputs = {name: tensors[name].detach()[:limit].to(sample.inputs[name].device).clone() for name in self._names}
        try:
            with exporting(sample.dense_arch), torch.no_grad():
                return sample.flatten(self._program.module()(**inputs))
        except Exception as error:
            raise ParityError(
                f"the written program fails on a further batch: {said(error)}{blame(error)}. No manifest was written"
            ) from error

    def _refuse_other_scores(
        self, place: int, tensors: Mapping[str, torch.Tensor], reference: Reference, why: str
    ) -> None:
        """Raise ParityError where an output differs from the unmodified model's by more than rounding."""
        config = self._config
        try:
            check_reference(
                self._sample,
                self._names,
                self._program,
                dataclasses.replace(reference, blocks=tensors, args=(tensors,)),
                tensors=tensors,
                atol=config.atol,
                rtol=config.rtol,
                max_batch_size=config.max_batch_size,
                what=f"the written program on batch {place + 1}",
            )
        except ParityError as error:
            raise ParityError(f"{error}{f'. In the model, {why}' if why else ''}") from None


def _fits(tensor: torch.Tensor | None, traced: torch.Tensor, free: Mapping[int, str]) -> bool:
    """Whether the program takes such a tensor: it was traced with ``traced``, with the dimensions ``free`` besides the batch."""
    if tensor is None or tensor.dtype != traced.dtype or tensor.dim() != traced.dim() or not tensor.shape[0]:
        return False
    return all(tensor.shape[d] == traced.shape[d] or d in free for d in range(1, tensor.dim()))
