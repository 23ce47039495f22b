"""Compare the written program with the eager dense arch, on the sample and at batch sizes that models trip over."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import partial
from typing import Any

import torch
from torch.export import ExportedProgram

from dist_export.archive.output_diff import Difference, describe_allowed
from dist_export.dense.eager import DenseSample, exporting
from dist_export.dense.rounding import Rounding, compare_scores
from dist_export.dense.sample_rows import SampleRows
from dist_export.errors import ParityError
from dist_export.manifest import FilesParityEntry, ParityEntry
from dist_export.model.user_errors import blame, said
from dist_export.storage.directory import Directory

BATCH_SIZES = (1, 2, 301)
"""1, where a model may take another branch; 2, the least that is traced; an odd one larger than the sample."""


def check_parity(
    sample: DenseSample,
    inputs: dict[str, torch.Tensor],
    program: Any,
    *,
    shapes: Sequence[Sequence[int | str]],
    atol: float,
    rtol: float,
    max_batch_size: int,
    what: str = "the written program",
) -> ParityEntry:
    """Run both at the sample's batch size and at BATCH_SIZES and compare every output. Rank 0.

    Args:
        inputs: those of ``sample`` that the program takes.
        program: an ExportedProgram, or what is called in the same way: ``program.module()(**inputs)``.
        shapes: the outputs' shapes as the manifest states them; ``batch`` is the batch size.
        what: the program, for messages.

    Raises:
        ParityError: a run fails, or an output differs in count, shape, dtype or value
            (more than :func:`~dist_export.dense.rounding.compare_scores` allows; NaN equals NaN).
    """
    num_rows = next(iter(inputs.values())).shape[0]
    sizes = [num_rows, *(size for size in BATCH_SIZES if size <= max_batch_size and size != num_rows)]
    runner = program.module()
    max_abs = dict.fromkeys(sample.output_names, 0.0)
    max_rel = dict.fromkeys(sample.output_names, 0.0)
    max_ulp = dict.fromkeys(sample.output_names, 0)
    rounding = Rounding(sample)
    for size in sizes:
        place = f"at batch size {size}"
        all_rows, used_rows = _resized(sample.inputs, size), _resized(inputs, size)
        expected = _run(partial(sample.call, all_rows), f"the dense arch itself fails {place}", sample)
        found = _run(partial(runner, **used_rows), f"{what} fails {place}", sample)
        if len(expected) != len(found):
            raise ParityError(
                f"{place} the dense arch returns {len(expected)} outputs, {what} {len(found)}. No manifest was written"
            )
        for number, (name, eager, written, shape) in enumerate(
            zip(sample.output_names, expected, found, shapes, strict=True)
        ):
            if eager.shape != written.shape or eager.dtype != written.dtype:
                raise ParityError(
                    f"output {name!r} {place}: the dense arch gives {_kind(eager)}, {what} {_kind(written)}; "
                    "no manifest was written. Look for a branch on the batch size or a bare squeeze()"
                )
            if not _has_shape(written, shape, size):
                raise ParityError(
                    f"output {name!r} {place} has the shape {list(written.shape)}, but [{', '.join(map(str, shape))}] was "
                    "traced; no manifest was written. Look for a bare squeeze(), which takes the batch dimension too"
                )
            like = sample.outputs[number]
            worst = compare_scores(eager, written, number, rounding, atol=atol, rtol=rtol, like=like)
            if not worst.is_close:
                raise ParityError(
                    f"output {name!r} {place}: {what} differs from the dense arch by up to {worst.max_abs:.3g} "
                    f"(relative {worst.max_rel:.3g}, {worst.max_ulp:,} ULP, in row {worst.row}), allowed is "
                    f"{describe_allowed(atol, rtol)}. No manifest was written. Look for a branch on the batch size, randomness "
                    "in eval mode, or state that the forward changes"
                )
            max_abs[name] = max(max_abs[name], worst.max_abs)
            max_rel[name] = max(max_rel[name], worst.max_rel)
            max_ulp[name] = max(max_ulp[name], worst.max_ulp)
    return ParityEntry(
        batch_sizes=tuple(sizes), atol=atol, rtol=rtol, max_abs=max_abs, max_rel=max_rel, max_ulp=max_ulp
    )


def refuse_other_rows(before: SampleRows, now: SampleRows, target: Directory) -> None:
    """Compare what the sample found in the checkpoint with what it finds in the written shards. Every rank, its own.

    Raises:
        ParityError: an id is there in one and not in the other, or has another row; a table is gone.
    """
    lost = sorted(set(now.unknown_tables) - set(before.unknown_tables))
    if lost:
        raise ParityError(
            f"{lost[0]} found its rows in the checkpoint, but {target.url} has no table of it. No manifest was written, so "
            "there is no package; run the export again"
        )
    for table, whole in sorted(before.whole.items()):
        if table in now.whole and now.whole[table].digest != whole.digest:
            raise ParityError(
                f"table {table!r}, which the sparse arch reads as a whole ({whole.how}), has other rows in the shards of "
                f"{target.url} than in the checkpoint. No manifest was written, so there is no package; run the export again"
            )
    for table, rows in sorted(before.rows.items()):
        found = now.rows.get(table, {})
        for number, digest in sorted(rows.items()):
            if number not in found or found[number] == digest:
                continue  # an arch may look up other ids the second time; those that it did are compared
            kinds = {
                (True, False): "is not in the checkpoint, but in the shards",
                (False, True): "is in the checkpoint, but not in the shards",
                (False, False): "has another row in the shards than in the checkpoint",
            }
            raise ParityError(
                f"table {table!r}: the id {number} of the sample {kinds[digest is None, found[number] is None]} of "
                f"{target.url}. No manifest was written, so there is no package; run the export again"
            )


def score_from_files(
    sample: DenseSample,
    inputs: dict[str, torch.Tensor],
    program: ExportedProgram,
    *,
    reads_rows: bool,
    atol: float,
    rtol: float,
) -> FilesParityEntry:
    """Compare the written program on inputs from the written shards with the model on the checkpoint's rows. Rank 0.

    Args:
        inputs: what the sparse arch gave with the rows of the written shards, cut like the sample; without tables in the
            package those of the sample itself.
        reads_rows: whether any row came from the shards.

    Raises:
        ParityError: an output differs in count, shape, dtype or value.
    """
    found = _run(partial(program.module(), **inputs), "the written program fails on rows of the written shards", sample)
    from_where = "the written program on rows of the written shards" if reads_rows else "the written program"
    on_rows = " on the checkpoint's rows" if reads_rows else ""
    figures: dict[str, Difference] = {}
    if len(found) != len(sample.outputs):
        raise ParityError(
            f"{from_where} gives {len(found)} outputs, the model {len(sample.outputs)}. No manifest was written"
        )
    rounding = Rounding(sample)
    for number, (name, eager, written) in enumerate(zip(sample.output_names, sample.outputs, found, strict=True)):
        if eager.shape != written.shape or eager.dtype != written.dtype:
            raise ParityError(
                f"output {name!r}: {from_where} gives {_kind(written)}, the model {_kind(eager)}. No manifest was written"
            )
        worst = figures[name] = compare_scores(eager, written, number, rounding, atol=atol, rtol=rtol)
        if not worst.is_close:
            raise ParityError(
                f"output {name!r}: {from_where} differs from the model{on_rows} by up to {worst.max_abs:.3g} "
                f"(relative {worst.max_rel:.3g}, {worst.max_ulp:,} ULP, in row {worst.row} of the sample), allowed is "
                f"{describe_allowed(atol, rtol)}. No manifest was written"
            )
    return FilesParityEntry(
        rows=next(iter(sample.inputs.values())).shape[0],
        reads_rows=reads_rows,
        reference="copy",
        max_abs={name: worst.max_abs for name, worst in figures.items()},
        max_rel={name: worst.max_rel for name, worst in figures.items()},
        max_ulp={name: worst.max_ulp for name, worst in figures.items()},
    )


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


def _kind(tensor: torch.Tensor) -> str:
    return f"{tensor.dtype} {list(tensor.shape)}"
