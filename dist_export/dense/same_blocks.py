"""Whether the sparse arch gives the same blocks, constants and order for every batch on every rank."""

from __future__ import annotations

import copy
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from dist_export.archive.output_diff import compare
from dist_export.dense.blocks import Blocks, Outline
from dist_export.dense.eager import DenseSample, run_eagerly
from dist_export.dense.sample import Batch, Batches, run_sparse_arch
from dist_export.errors import ModelError
from dist_export.runtime.ranks import Ranks

_MAX_BATCHES = 8
"""How many batches more are taken to find one of another size."""


def gather_outlines(
    ranks: Ranks,
    sparse_arch: nn.Module,
    blocks: Blocks,
    data: Any,
    batches: Batches,
    *,
    sparse_model_name: str,
    further: Sequence[Sequence[Outline]] = (),
) -> list[list[Outline]]:
    """Return the outlines of the blocks by rank and batch, and refuse blocks that vary. All ranks.

    The sample alone is looked at where all of its blocks are tensors. Else the sparse arch runs, with the model's own
    rows, on further batches until one has another size, and at last on a part of the sample ``data``: what is no tensor
    may follow from the size of the batch. ``further``: outlines by rank that are known of other batches.

    Raises:
        ModelError: on all ranks, for a block or constant that is not the same everywhere, or cannot be shown to be.
    """
    seen = [[outline] for outline in ranks.all_gather("compare the blocks of all ranks", blocks.outline)]
    for its, others in zip(seen, further, strict=False):
        its.extend(others)

    def add(what: str, batch: Any) -> None:
        def run() -> Outline:
            name = sparse_model_name
            return run_sparse_arch(sparse_arch, batch, sparse_model_name=name, finder=None, what=what)[0].outline()

        for its, outline in zip(
            seen, ranks.all_gather(f"run the sparse arch on {what}", run, may_block=True), strict=True
        ):
            its.append(outline)

    def is_shown() -> bool:
        return is_shown_constant([outline for its in seen for outline in its])

    taken: list[Batch] = []

    def take() -> bool:
        taken.append(batches.take())
        return taken[-1].is_there

    while len(taken) < _MAX_BATCHES and not is_shown() and all(ranks.all_gather("take another batch", take)):
        add("another batch", taken[-1].data)
    if not is_shown():
        cut = cut_batch(data, blocks.outline().num_rows or 0)
        if all(ranks.all_gather("cut the sample batch", lambda: cut is not None)):
            add("a part of the sample batch", cut)
    ranks.check("compare the blocks", lambda: refuse_varying([outline for its in seen for outline in its]))
    return seen


def refuse_other_orders(
    sample: DenseSample, outlines: Sequence[Sequence[Outline]], *, atol: float, rtol: float
) -> None:
    """Refuse where another rank or batch has another order of the blocks, and the outputs depend on it. Rank 0.

    Args:
        outlines: by rank and batch; the first is the sample's own.

    Raises:
        ModelError: an output differs by more than ``atol`` and ``rtol`` allow, or the dense arch fails on that order.
    """
    usual = tuple(sample.blocks.tensors)
    positions: dict[tuple[str, ...], str] = {}
    for rank, its in enumerate(outlines):
        for number, outline in enumerate(its):
            positions.setdefault(outline.order, f"for batch {number} of rank {rank}")
    positions.pop(usual, None)
    for order, place in positions.items():
        found = sample.flatten(run_eagerly(sample.dense_arch, sample.blocks.in_order(order)))
        for name, expected, other in zip(sample.output_names, sample.outputs, found, strict=True):
            if expected.shape != other.shape or not compare(expected, other, atol=atol, rtol=rtol).is_close:
                raise ModelError(
                    f"the sparse arch gives the blocks in the order {', '.join(usual)} for the sample, and {place} in the "
                    f"order {', '.join(order)}; the dense arch's output {name!r} depends on the order. Let the sparse arch "
                    "give one order for every batch on every rank, or let the dense arch take its blocks by name"
                )


def refuse_varying(outlines: Sequence[Outline]) -> None:
    """Refuse entries that are not the same in all outlines, or not shown to be. ModelError names the first."""
    first = outlines[0]
    for other in outlines[1:]:
        if lacking := sorted(set(first.order) ^ set(other.order)):
            raise ModelError(
                f"the sparse arch gives {lacking[0]!r} for one batch and not for another; the program takes the same inputs "
                "for every batch. Give each block for every batch, or leave it out"
            )
        for place in sorted(set(first.constants) | set(other.constants)):
            found = [outline.constants.get(place, "nothing") for outline in (first, other)]
            if found[0] != found[1]:
                raise ModelError(
                    f"the sparse arch gives {place!r} as {found[0][:80]} for one batch and as {found[1][:80]} for another; "
                    "what is no tensor becomes a constant of the program, so every batch must have the same. Give it as a "
                    "tensor whose first dimension is the batch, or leave it out"
                )
    if not is_shown_constant(outlines):
        place, value = next(iter(first.constants.items()))
        raise ModelError(
            f"the sparse arch gives {place!r} as {value[:80]}, which becomes a constant of the program; all batches that were "
            f"seen have {first.num_rows} rows, so it may follow from the size. Let the dataset give a second batch of another "
            "size, or give it as a tensor whose first dimension is the batch"
        )


def is_shown_constant(outlines: Sequence[Outline]) -> bool:
    """Whether batches of different sizes were seen, or there is no constant that could follow from the size."""
    return not outlines[0].constants or len({outline.num_rows for outline in outlines}) > 1


def cut_batch(data: Any, num_rows: int) -> Any:
    """Return a batch with the rows of its first half, or with its only row twice; None where no tensor has ``num_rows``.

    Dicts, lists and tuples are gone through; a tensor whose first dimension is ``num_rows`` is taken for a column.
    """
    found: list[torch.Tensor] = []

    def cut(value: Any) -> Any:
        if isinstance(value, dict):
            copied = copy.copy(value)
            for key, item in value.items():
                copied[key] = cut(item)
            return copied
        if type(value) in (list, tuple):
            return type(value)(cut(item) for item in value)
        if type(value) is torch.Tensor and value.dim() and value.shape[0] == num_rows:
            found.append(value)
            return torch.cat([value, value]) if num_rows == 1 else value[: num_rows // 2]
        return value

    shorter = cut(data)
    return shorter if found and num_rows else None
