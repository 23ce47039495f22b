"""Compare the written program with the eager dense arch, on the sample and at batch sizes that models trip over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from dist_export.dense.blame import blame, said
from dist_export.dense.eager import DenseSample, exporting
from dist_export.errors import ParityError
from dist_export.manifest import ParityEntry

BATCH_SIZES = (1, 2, 301)
"""1, where a model may take another branch; 2, the least that is traced; an odd one larger than the sample."""


def check_parity(
    sample: DenseSample,
    inputs: dict[str, torch.Tensor],
    program: ExportedProgram,
    *,
    shapes: Sequence[Sequence[int | str]],
    atol: float,
    rtol: float,
    max_batch_size: int,
) -> ParityEntry:
    """Run both at the sample's batch size and at BATCH_SIZES and compare every output. Rank 0.

    Args:
        inputs: those of ``sample`` that the program takes.
        shapes: the outputs' shapes as the manifest states them; ``batch`` is the batch size.

    Raises:
        ParityError: a run fails, or an output differs in count, shape, dtype or value
            (``|program - eager| > atol + rtol * |eager|``; NaN equals NaN).
    """
    num_rows = next(iter(inputs.values())).shape[0]
    sizes = [num_rows, *(size for size in BATCH_SIZES if size <= max_batch_size and size != num_rows)]
    runner = program.module()
    max_abs = dict.fromkeys(sample.output_names, 0.0)
    max_rel = dict.fromkeys(sample.output_names, 0.0)
    for size in sizes:
        place = f"at batch size {size}"
        all_rows, used_rows = _resized(sample.inputs, size), _resized(inputs, size)
        expected = _run(partial(sample.dense_arch, all_rows), f"the dense arch itself fails {place}", sample)
        found = _run(partial(runner, **used_rows), f"the written program fails {place}", sample)
        if len(expected) != len(found):
            raise ParityError(
                f"{place} the dense arch returns {len(expected)} outputs, the written program {len(found)}. No manifest "
                "was written"
            )
        for name, eager, written, shape in zip(sample.output_names, expected, found, shapes, strict=True):
            if eager.shape != written.shape or eager.dtype != written.dtype:
                raise ParityError(
                    f"output {name!r} {place}: the dense arch gives {_kind(eager)}, the written program {_kind(written)}; "
                    "no manifest was written. Look for a branch on the batch size or a bare squeeze()"
                )
            if not _has_shape(written, shape, size):
                raise ParityError(
                    f"output {name!r} {place} has the shape {list(written.shape)}, but [{', '.join(map(str, shape))}] was "
                    "traced; no manifest was written. Look for a bare squeeze(), which takes the batch dimension too"
                )
            worst_abs, worst_rel, is_close = _compare(eager, written, atol=atol, rtol=rtol)
            if not is_close:
                raise ParityError(
                    f"output {name!r} {place}: the written program differs from the dense arch by up to {worst_abs:.3g} "
                    f"(relative {worst_rel:.3g}), allowed is atol {atol:g} + rtol {rtol:g} * |value|. No manifest was "
                    "written. Look for a branch on the batch size, randomness in eval mode, or state that the forward changes"
                )
            max_abs[name] = max(max_abs[name], worst_abs)
            max_rel[name] = max(max_rel[name], worst_rel)
    return ParityEntry(batch_sizes=tuple(sizes), atol=atol, rtol=rtol, max_abs=max_abs, max_rel=max_rel)


def _run(call: Callable[[], Any], failure: str, sample: DenseSample) -> list[torch.Tensor]:
    try:
        with exporting(sample.dense_arch), torch.no_grad():
            return sample.flatten(call())
    except Exception as error:
        raise ParityError(f"{failure}: {said(error)}{blame(error)}. No manifest was written") from error


def _resized(inputs: dict[str, torch.Tensor], size: int) -> dict[str, torch.Tensor]:
    """Return fresh tensors of ``size`` rows, the sample repeated as often as needed: a run may change its inputs."""
    resized = {}
    for name, tensor in inputs.items():
        times = -(-size // tensor.shape[0])
        resized[name] = tensor.repeat(times, *[1] * (tensor.dim() - 1))[:size]  # repeat always copies
    return resized


def _has_shape(tensor: torch.Tensor, shape: Sequence[int | str], num_rows: int) -> bool:
    """Whether the sizes are those stated; sizes that depend on more than the batch are not looked at."""
    if tensor.dim() != len(shape):
        return False
    stated = [num_rows if size == "batch" else size for size in shape]
    return all(isinstance(size, str) or size == found for size, found in zip(stated, tensor.shape, strict=True))


def _compare(eager: torch.Tensor, written: torch.Tensor, *, atol: float, rtol: float) -> tuple[float, float, bool]:
    eager, written = eager.cpu(), written.cpu()
    if not eager.numel():
        return 0.0, 0.0, True
    if not eager.is_floating_point():
        if eager.is_complex():
            eager, written = torch.view_as_real(eager), torch.view_as_real(written)
        is_equal = bool(torch.equal(eager, written))
        largest = float((eager.to(torch.float64) - written.to(torch.float64)).abs().max())
        return largest, largest, is_equal
    wide, other = eager.to(torch.float64), written.to(torch.float64)
    is_close = bool(torch.allclose(other, wide, atol=atol, rtol=rtol, equal_nan=True))
    is_same = (wide == other) | (wide.isnan() & other.isnan())  # infinities of one sign are the same
    difference = torch.where(is_same, torch.zeros_like(wide), (other - wide).abs())
    # below atol a value is as good as zero, and a difference relative to it would say nothing
    relative = difference / wide.abs().clamp_min(atol or torch.finfo(torch.float64).tiny)
    relative = torch.where(is_same, torch.zeros_like(wide), relative)
    return float(difference.max()), float(relative.max()), is_close


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
