"""Compare the score program with the model on the sample, and on the sample cut or repeated to other sizes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from dist_export.archive.output_diff import Difference, describe_allowed
from dist_export.config.needs import Tolerance
from dist_export.dense.blocks import Blocks
from dist_export.dense.eager import DenseSample, exporting
from dist_export.dense.rounding import Rounding, compare_scores
from dist_export.errors import ParityError
from dist_export.model.user_errors import said


class ModelFailsError(ParityError):
    """The model itself fails on a batch, so there is nothing to compare the program with."""


class ScoreFigures:
    """The largest differences so far, by output. Rank 0."""

    def __init__(self, config: Tolerance, sample: DenseSample, program: Any) -> None:
        """``program``: the module of the score program, bound to rows."""
        self._config = config
        self._sample = sample
        self._program = program
        self.sizes: list[int] = []
        self.num_further = 0
        self.max_abs = dict.fromkeys(sample.output_names, 0.0)
        self.max_rel = dict.fromkeys(sample.output_names, 0.0)
        self.max_ulp = dict.fromkeys(sample.output_names, 0)

    def run(self, inputs: Mapping[str, torch.Tensor], where: str) -> list[torch.Tensor]:
        """Return the program's outputs. ParityError if it fails."""
        try:
            with torch.no_grad():
                found = self._program(**{name: tensor.clone() for name, tensor in inputs.items()})
        except Exception as error:
            raise ParityError(f"the score program fails {where}: {said(error)}. No manifest was written") from error
        return [found] if isinstance(found, torch.Tensor) else list(found)

    def with_blocks(self, inputs: Mapping[str, torch.Tensor], blocks: Blocks, where: str) -> None:
        """Compare with the plain copy of the dense arch on the blocks that the model's sparse arch gave for these inputs."""
        device = next(iter(self._sample.inputs.values())).device
        tensors = {name: tensor.detach().to(device, copy=True) for name, tensor in blocks.tensors.items()}
        try:
            with exporting(self._sample.dense_arch), torch.no_grad():
                expected = self._sample.flatten(self._sample.call(dict(tensors)))
        except Exception as error:
            raise ModelFailsError(
                f"the dense arch itself fails {where}: {said(error)}. No manifest was written"
            ) from error
        self.compare(expected, self.run(inputs, where), tensors, where)

    def compare(
        self,
        expected: Sequence[Any],
        found: Sequence[torch.Tensor],
        tensors: Mapping[str, torch.Tensor] | None,
        where: str,
    ) -> None:
        """Compare outputs, and take in the figures.

        Args:
            expected: what the model gives. Where it has fewer rows, the first rows of ``found`` are compared.
            found: what the program gives.
            tensors: the blocks, to measure the rounding of the dense arch; None takes the sample's.
            where: the batch, for messages.

        Raises:
            ParityError: an output differs in count, shape, dtype or value.
        """
        config, rounding = self._config, Rounding(self._sample, tensors)
        if len(expected) != len(found):
            raise ParityError(
                f"{where} the score program gives {len(found)} outputs, the model {len(expected)}. No manifest was written"
            )
        for number, (name, eager, written) in enumerate(zip(self._sample.output_names, expected, found, strict=True)):
            is_part = eager.dim() and eager.shape[1:] == written.shape[1:] and eager.shape[0] < written.shape[0]
            its = written[: eager.shape[0]] if is_part else written
            if eager.shape != its.shape or eager.dtype != its.dtype:
                raise ParityError(
                    f"output {name!r} {where}: the score program gives {its.dtype} {list(its.shape)}, the model {eager.dtype} "
                    f"{list(eager.shape)}. No manifest was written"
                )
            worst = compare_scores(eager, its, number, rounding, atol=config.atol, rtol=config.rtol)
            self._add(name, worst)
            if not worst.is_close:
                raise ParityError(
                    f"output {name!r} {where}: the score program differs from the model by up to {worst.max_abs:.3g} (relative "
                    f"{worst.max_rel:.3g}, {worst.max_ulp:,} ULP, in row {worst.row}), allowed is "
                    f"{describe_allowed(config.atol, config.rtol)}. No manifest was written"
                )

    def _add(self, name: str, worst: Difference) -> None:
        self.max_abs[name] = max(self.max_abs[name], worst.max_abs)
        self.max_rel[name] = max(self.max_rel[name], worst.max_rel)
        self.max_ulp[name] = max(self.max_ulp[name], worst.max_ulp)
