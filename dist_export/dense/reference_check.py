"""Compare the written program with what the caller's own model gave for a batch."""

from __future__ import annotations

import copy
import warnings
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import msgspec
import torch
from torch.export import ExportedProgram

from dist_export.archive.output_diff import Difference, describe_allowed, has_same_values
from dist_export.dense.blocks import read_blocks
from dist_export.dense.eager import DenseSample, exporting
from dist_export.dense.reference import MODEL, Reference
from dist_export.dense.rounding import Rounding, compare_scores
from dist_export.errors import ModelError, ParityError
from dist_export.humanize import few
from dist_export.manifest import FilesParityEntry, ParityEntry
from dist_export.model.user_errors import blame, said

_NO_PACKAGE = "No manifest was written, so there is no package"

_ROUNDINGS = 8
"""How many roundings of a lower precision two runs may be apart, where autocast or FSDP computes in it."""


@dataclass(frozen=True, slots=True)
class ReferenceFigures:
    """How far the program is from the reference."""

    rows: int
    """Of the batch that was compared."""
    outputs: dict[str, Difference]
    notes: list[str] = field(default_factory=list)

    def of_files(self, *, kind: str, reads_rows: bool) -> FilesParityEntry:
        """Return the figures of the program on rows of the written shards, for the manifest."""
        return FilesParityEntry(
            rows=self.rows,
            reads_rows=reads_rows,
            reference=kind,
            max_abs={name: worst.max_abs for name, worst in self.outputs.items()},
            max_rel={name: worst.max_rel for name, worst in self.outputs.items()},
            max_ulp={name: worst.max_ulp for name, worst in self.outputs.items()},
        )

    def merge_into(self, parity: ParityEntry, kind: str) -> ParityEntry:
        """Return ``parity`` with these figures, where they are larger, and with the size of the batch."""
        sizes = parity.batch_sizes if self.rows in parity.batch_sizes else (*parity.batch_sizes, self.rows)
        mine = self.of_files(kind=kind, reads_rows=False)
        return msgspec.structs.replace(
            parity,
            reference=kind,
            batch_sizes=sizes,
            max_abs={name: max(value, mine.max_abs.get(name, 0.0)) for name, value in parity.max_abs.items()},
            max_rel={name: max(value, mine.max_rel.get(name, 0.0)) for name, value in parity.max_rel.items()},
            max_ulp={name: max(value, mine.max_ulp.get(name, 0)) for name, value in parity.max_ulp.items()},
        )


def check_reference(
    sample: DenseSample,
    names: Sequence[str],
    program: Any,
    reference: Reference,
    *,
    tensors: Mapping[str, torch.Tensor],
    atol: float,
    rtol: float,
    max_batch_size: int,
    what: str = "the written program",
) -> ReferenceFigures:
    """Run the program on a whole batch and compare each output with the reference. Rank 0.

    The batch is neither cut nor repeated, except that the program takes ``max_batch_size`` rows at most.

    Args:
        names: the inputs that the program takes.
        program: an ExportedProgram, or what is called in the same way: ``program.module()(**inputs)``.
        tensors: what the sparse arch gave for the batch, whole, by the names of the program's arguments.
        what: the program and its inputs, for messages.

    Raises:
        ParityError: an input is not there; the program fails; an output differs in count, shape, dtype or value.
    """
    lacking = [name for name in names if name not in tensors]
    if lacking:
        raise ParityError(
            f"the sparse arch gives no {lacking[0]!r} when the whole model runs. No manifest was written, so there is no package"
        )
    rows = tensors[names[0]].shape[0]
    device = sample.inputs[names[0]].device
    inputs = {name: tensors[name].detach()[:max_batch_size] for name in names}
    judge = partial(
        _compare,
        reference=reference,
        rows=rows,
        atol=atol,
        rtol=rtol,
        limit=max_batch_size,
        what=what,
    )
    found = _run(program, inputs, device, sample, what)
    try:
        return judge(sample, found)
    except ParityError:
        own = inputs[names[0]].device
        if own == device or not isinstance(program, ExportedProgram):
            raise
    # two devices round differently: what the model computed elsewhere is compared with the program there
    return judge(sample, _run(_move(program, own), inputs, own, sample, what))


def refuse_other_inputs(sample: DenseSample, reference: Reference, *, atol: float, rtol: float) -> None:
    """Refuse a model whose forward gives the dense arch what serving cannot give. Rank 0, before anything is written.

    Serving feeds what the sparse arch returns. What forward does to it in between matters where it changes an output.

    Raises:
        ModelError: it does; it names the inputs.
    """
    why = describe_other_inputs(reference)
    if not why:
        return
    device = next(iter(sample.inputs.values())).device
    blocks = read_blocks(reference.blocks)
    tensors = {name: value.to(device, copy=True) for name, value in blocks.tensors.items()}
    rows = next(iter(tensors.values())).shape[0]
    try:
        with exporting(sample.dense_arch), torch.no_grad():
            found = sample.flatten(sample.call(tensors))
        _compare(sample, found, reference, rows, atol=atol, rtol=rtol, limit=rows, what="it")
    except ParityError as error:
        raise ModelError(
            f"in model(batch), {why}. Serving feeds what the sparse arch returns, so its scores would be others: "
            f"{str(error).split('. No manifest')[0]}. Nothing was written. Do this within the sparse or the dense arch"
        ) from None
    except Exception:  # noqa: BLE001 -- the comparison of the written program decides
        return


def refuse_other_batch(sample: DenseSample, blocks: Mapping[str, torch.Tensor], reference: Reference) -> None:
    """Refuse a model whose sparse arch gives other blocks in ``model(batch)`` than for the batch. Rank 0; nothing is written yet.

    Args:
        sample: its inputs tell which blocks and rows count.
        blocks: what the sparse arch gave for the batch by itself, with the same rows of the tables.
        reference: of the model.

    Raises:
        ModelError: it does; it names the blocks.
    """
    told = []
    for name, cut in sample.inputs.items():
        own, other = blocks.get(name), read_blocks(reference.blocks).tensors.get(name)
        if own is None or other is None:
            continue
        count = cut.shape[0]
        if not _is_equal(own[:count], other[:count].to(own.device)):
            told.append(name)
    if told:
        raise ModelError(
            f"in model(batch), the sparse arch gives other values of {few([repr(name) for name in told])} than "
            "sparse_arch(batch) does: the model's forward changes the batch before the sparse arch, or two calls of that give "
            "different values. Serving feeds what the sparse arch gives for the batch itself, so its scores would be others. "
            "Nothing was written. Do within the sparse arch what forward does before it, or give the dataset's batches as "
            "forward leaves them"
        )


def refuse_other_sample(sample: DenseSample, tensors: Mapping[str, torch.Tensor]) -> None:
    """Refuse a sample whose rows are not the first of the batch, each once, or twice where there is one. Rank 0.

    Args:
        tensors: what the sparse arch gave for the batch in the caller's model, with the same rows of the tables.

    Raises:
        ParityError: an input of the sample has other values.
    """
    for name, cut in sample.inputs.items():
        whole = tensors.get(name)
        if whole is None:
            continue  # a program that takes it is refused
        first = [number % whole.shape[0] for number in range(cut.shape[0])]
        if not _is_equal(cut, whole[first].to(cut.device)):
            raise ParityError(
                f"the sample's input {name!r} is not what the sparse arch gives for the batch within the model. {_NO_PACKAGE}"
            )


def describe_other_inputs(reference: Reference) -> str:
    """Return how the dense arch's inputs in the model differ from what the sparse arch returned; empty where they do not."""
    values = [*reference.args, *reference.kwargs.values()]
    given = next((value for value in values if isinstance(value, Mapping)), None)
    if given is None:
        return f"the dense arch is called with {few([type(value).__name__ for value in values]) or 'nothing'}"
    told = []
    if more := [name for name in given if name not in reference.blocks]:
        told.append(f"the dense arch gets {few([repr(name) for name in more])}, which the sparse arch does not return")
    if less := [name for name in reference.blocks if name not in given]:
        told.append(f"the dense arch does not get {few([repr(name) for name in less])}")
    same = [name for name in given if name in reference.blocks]
    if changed := [name for name in same if not _is_equal(given[name], reference.blocks[name])]:
        told.append(f"{few([repr(name) for name in changed])} is changed between the sparse arch and the dense arch")
    if same != [name for name in reference.blocks if name in given]:
        told.append("the blocks are put into another order between the sparse arch and the dense arch")
    named = [name for name, value in reference.kwargs.items() if value is not given]
    if len(values) > 1:
        what = few([repr(name) for name in named]) or f"{len(values) - 1} more"
        told.append(f"the dense arch is called with further arguments ({what})")
    return "; ".join(told)


def _run(
    program: Any, inputs: Mapping[str, torch.Tensor], device: torch.device, sample: DenseSample, what: str
) -> list[Any]:
    call: Callable[[], Any] = partial(
        program.module(), **{name: tensor.to(device).contiguous().clone() for name, tensor in inputs.items()}
    )
    try:
        with exporting(sample.dense_arch), torch.no_grad():
            return sample.flatten(call())
    except Exception as error:
        raise ParityError(
            f"{what} fails on the whole batch: {said(error)}{blame(error)}. No manifest was written"
        ) from error


def _move(program: ExportedProgram, device: torch.device) -> ExportedProgram:
    from torch.export.passes import move_to_device_pass

    with warnings.catch_warnings():
        warnings.simplefilter("ignore")  # torch's own, of its deprecated classes
        copied = copy.deepcopy(program)  # whose tensors are moved in their place
    return move_to_device_pass(copied, device)


def _compare(
    sample: DenseSample,
    found: Sequence[Any],
    reference: Reference,
    rows: int,
    *,
    atol: float,
    rtol: float,
    limit: int,
    what: str,
) -> ReferenceFigures:
    model = "the dense arch in model(batch)" if reference.kind == MODEL else "dense_arch(sparse_arch(batch))"
    try:
        expected = sample.flatten(reference.output)
    except (LookupError, TypeError, ValueError):
        expected = []
    if len(expected) != len(found) or not all(isinstance(value, torch.Tensor) for value in expected):
        raise ParityError(
            f"{model} returns {_describe(reference.output)}, {what} {few(list(sample.output_names))}. "
            "No manifest was written"
        )
    figures = ReferenceFigures(min(rows, limit), {})
    rounding = Rounding(sample, _blocks_of(reference, limit))
    for number, (name, eager, written) in enumerate(zip(sample.output_names, expected, found, strict=True)):
        if rows > limit and not (eager.dim() and eager.shape[0] == rows):
            figures.notes.append(
                f"output {name!r} has no row for each of the batch, which has more rows than max_batch_size ({rows:,}): it was "
                "compared with the plain copy of the dense arch alone"
            )
            continue
        cut = eager[:limit] if rows > limit else eager
        close = partial(compare_scores, number=number, rounding=rounding)
        figures.outputs[name] = _compare_output(name, cut, written, reference, (what, model), (atol, rtol), close)
    return figures


def _blocks_of(reference: Reference, limit: int) -> dict[str, torch.Tensor]:
    return {name: tensor[:limit] for name, tensor in read_blocks(reference.blocks).tensors.items()}


def _compare_output(
    name: str,
    eager: torch.Tensor,
    written: torch.Tensor,
    reference: Reference,
    sides: tuple[str, str],
    tolerances: tuple[float, float],
    compare: Callable[..., Difference],
) -> Difference:
    (what, model), (atol, rtol) = sides, tolerances
    precision = reference.precision
    if eager.dtype != written.dtype and eager.is_floating_point() and written.is_floating_point():
        low = [dtype for dtype in (precision, eager.dtype) if dtype is not None]
        precision = max(low, key=lambda dtype: torch.finfo(dtype).eps)
        written = written.to(eager.dtype)
    if eager.shape != written.shape or eager.dtype != written.dtype:
        raise ParityError(
            f"output {name!r}: {model} gives {eager.dtype} {list(eager.shape)}, {what} {written.dtype} "
            f"{list(written.shape)}. No manifest was written"
        )
    if precision is not None and eager.is_floating_point():
        slack = _ROUNDINGS * torch.finfo(precision).eps
        atol, rtol = max(atol, slack * _largest(eager)), max(rtol, slack)
    worst = compare(eager, written, atol=atol, rtol=rtol)
    if not worst.is_close:
        why = describe_other_inputs(reference)
        raise ParityError(
            f"output {name!r}: {what} differs from {model} by up to {worst.max_abs:.3g} (relative "
            f"{worst.max_rel:.3g}, {worst.max_ulp:,} ULP, in row {worst.row}), allowed is {describe_allowed(atol, rtol)}"
            f"{f'; in the model, {why}' if why else ''}. No manifest was written, so there is no package"
        )
    return worst


def _largest(values: torch.Tensor) -> float:
    """Return the largest finite magnitude, 0 where there is none."""
    return float(values.double().nan_to_num(0, 0, 0).abs().max()) if values.numel() else 0.0


def _is_equal(one: Any, other: Any) -> bool:
    if isinstance(one, Mapping) and isinstance(other, Mapping):
        return list(one) == list(other) and all(_is_equal(one[name], other[name]) for name in one)
    if isinstance(one, (tuple, list)) and isinstance(other, (tuple, list)):
        return len(one) == len(other) and all(map(_is_equal, one, other))
    if not (isinstance(one, torch.Tensor) and isinstance(other, torch.Tensor)):
        return type(one) is type(other) and bool(one == other)
    return has_same_values(one, other)


def _describe(output: Any) -> str:
    if isinstance(output, Mapping):
        return few([str(key) for key in output]) or "an empty dict"
    if isinstance(output, (tuple, list)):
        return f"{len(output)} values"
    return f"a {type(output).__name__}"
