"""How far rounding alone moves the scores of a dense arch: what two right programs may differ by.

Two ways to compute one network (fused kernels or not, another size of the batch) round differently. How far that moves a score
depends on the network: a deep transformer moves by a hundred times more than a linear layer. It is measured where it matters: the
dense arch runs once more in float64, and what that changes is what rounding has done.
"""

from __future__ import annotations

import contextlib
from collections.abc import Mapping

import torch
from torch import nn

from dist_export.archive.output_diff import Difference, compare, measure_rounding
from dist_export.dense.eager import DenseSample, exporting
from dist_export.model.unwrap import copy_dense_arch


class Rounding:
    """Measures the rounding of a dense arch on a batch when it is first asked for. Rank 0."""

    def __init__(self, sample: DenseSample, tensors: Mapping[str, torch.Tensor] | None = None) -> None:
        """``tensors``: the batch, by the names of the sample's; None takes the sample's own."""
        self._sample = sample
        self._tensors = sample.inputs if tensors is None else tensors
        self._measured: list[torch.Tensor | None] | None = None

    def of(self, number: int) -> torch.Tensor | None:
        """Return (columns of the output, float64) what the tolerance of each column grows by; None where that is not known.

        ``number``: the output's place. It is not known where the dense arch does not run in float64.
        """
        if self._measured is None:
            self._measured = [None] * len(self._sample.output_names)
            # whatever fails there says nothing about the program, and the tolerance stays what the settings say
            with contextlib.suppress(Exception):
                self._measured = self._measure()
        return self._measured[number]

    def _measure(self) -> list[torch.Tensor | None]:
        sample = self._sample
        wide_arch = _in_float64(sample.dense_arch)
        device = next(iter(sample.inputs.values())).device
        inputs = {name: tensor.detach().to(device, copy=True) for name, tensor in self._tensors.items()}
        with exporting(sample.dense_arch), torch.no_grad():
            rounded = sample.flatten(sample.call({name: tensor.clone() for name, tensor in inputs.items()}))
        wide = {name: t.double() if t.is_floating_point() else t.clone() for name, t in inputs.items()}
        with exporting(wide_arch), torch.no_grad():
            expected = sample.flatten(wide_arch(sample.blocks.fill(wide)))
        return [measure_rounding(exact, value) for exact, value in zip(expected, rounded, strict=True)]


def compare_scores(
    expected: torch.Tensor,
    found: torch.Tensor,
    number: int,
    rounding: Rounding,
    *,
    atol: float,
    rtol: float,
    like: torch.Tensor | None = None,
) -> Difference:
    """Compare an output with what is expected, with the tolerance of docs/explanation/scores.md.

    It is ``atol + rtol * max(|expected|, usual size)``. Where that does not do, the measured rounding is added to it. Without
    any tolerance, both must be equal.

    Args:
        number: the output's place.
        like: as :func:`~dist_export.archive.output_diff.compare` takes it.
    """
    worst = compare(expected, found, atol=atol, rtol=rtol, like=like)
    if worst.is_close or not expected.is_floating_point() or not (atol or rtol):
        return worst
    return compare(expected, found, atol=atol, rtol=rtol, like=like, rounding=rounding.of(number))


def _in_float64(dense_arch: nn.Module) -> nn.Module:
    """Return a copy that computes in float64."""
    exact = copy_dense_arch(dense_arch).double()
    for module in exact.modules():
        for name, value in vars(module).items():
            if isinstance(value, torch.Tensor) and value.is_floating_point():
                vars(module)[name] = value.double()
    return exact
