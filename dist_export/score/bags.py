"""Pool rows into bags with aten operators alone, as ``torch.nn.functional.embedding_bag`` does it."""

from __future__ import annotations

from collections.abc import Callable

import torch

MISFIT = "the offsets do not cut all ids into bags, one after the other"
"""What the program says of such a request."""


def pool_bags(
    rows_of: Callable[[torch.Tensor], torch.Tensor],
    ids: torch.Tensor,
    offsets: torch.Tensor | None,
    *,
    mode: str,
    per_sample_weights: torch.Tensor | None,
    include_last_offset: bool,
    padding_idx: int | None,
) -> torch.Tensor:
    """Return one row for each bag, (bags, dim). An empty bag gives zeros.

    Args:
        rows_of: gives the rows (n, dim) of ids (n,).
        ids: (bags, length); or (n,), with ``offsets``.
        offsets: (bags,), where each bag begins; (bags + 1,) with ``include_last_offset``.
        mode: ``sum``, ``mean`` or ``max``.
        per_sample_weights: of the shape of ids, with ``sum`` alone.
        include_last_offset: whether the last offset is the number of ids.
        padding_idx: an id that does not count, not negative; None for none.
    """
    if ids.dim() == 2:
        num_bags, length = ids.shape[0], ids.shape[1]
        counts = torch.ones_like(ids) if padding_idx is None else (ids != padding_idx).to(ids.dtype)
        rows = rows_of(ids.reshape(-1))
        rows = rows.reshape(num_bags, length, rows.shape[-1])  # no -1: of no bags it could be anything
        return _reduce(rows, counts, per_sample_weights, mode, num_bags=num_bags, bag_of=None)
    assert offsets is not None
    _refuse_misfits(offsets, ids.shape[0], ends=include_last_offset)
    bounds = offsets if not include_last_offset else offsets[:-1]
    num_bags = bounds.shape[0]
    positions = torch.arange(ids.shape[0], device=ids.device, dtype=bounds.dtype)
    # empty bags begin where the next one does, so the last of those that begin at or before an id is the one that holds it
    bag_of = torch.searchsorted(bounds.contiguous(), positions, right=True) - 1
    counts = torch.ones_like(ids) if padding_idx is None else (ids != padding_idx).to(ids.dtype)
    return _reduce(rows_of(ids), counts, per_sample_weights, mode, num_bags=num_bags, bag_of=bag_of)


def _refuse_misfits(offsets: torch.Tensor, num_ids: int, *, ends: bool) -> None:
    """Let the program refuse offsets that do not cut the ids into bags, one after the other: torch refuses most of them, too.

    Not all: of ids behind the last of offsets that end all bags (``ends``), torch makes a part of the last bag, or leaves them
    out, or only counts them, by its mode, dtype, padding and device. What a trainer made of them, no program can know.
    """
    # no slices: of no bags and of one, a trace would take their sizes for constants
    fits = (offsets >= 0) & (offsets <= num_ids) & (offsets == offsets.cummax(0).values)
    is_sound = fits.all() & (offsets == num_ids).any() if ends else fits.all()
    torch._assert_async(is_sound, MISFIT)  # noqa: SLF001 -- torch has no public one that a trace keeps


def _reduce(
    rows: torch.Tensor,
    counts: torch.Tensor,
    weights: torch.Tensor | None,
    mode: str,
    *,
    num_bags: int,
    bag_of: torch.Tensor | None,
) -> torch.Tensor:
    """Pool rows (bags, length, dim), or (n, dim) with the bag of each; ``counts`` is 1 where an id counts, else 0."""
    is_counted = (counts > 0).unsqueeze(-1)
    if weights is not None:
        rows = rows * weights.unsqueeze(-1).to(rows.dtype)
    blank = rows.new_full((), float("-inf") if mode == "max" else 0.0)
    rows = torch.where(is_counted, rows, blank)
    width = rows.shape[-1]
    if mode == "max":
        if bag_of is None:
            # a bag of no columns has no maximum: a column of blanks is beside each
            pooled = torch.cat([rows, blank.expand(num_bags, 1, width)], dim=1).amax(dim=1)
        else:
            start = blank.expand(num_bags, width).clone()
            pooled = start.scatter_reduce(0, bag_of.unsqueeze(-1).expand(-1, width), rows, "amax")
        num_ids = _count(counts, num_bags, bag_of)
        return torch.where(num_ids.unsqueeze(-1) > 0, pooled, pooled.new_zeros(()))
    summed = rows.sum(dim=1) if bag_of is None else rows.new_zeros(num_bags, width).index_add(0, bag_of, rows)
    if mode == "sum":
        return summed
    num_ids = _count(counts, num_bags, bag_of).clamp(min=1)
    return summed / num_ids.unsqueeze(-1).to(summed.dtype)


def _count(counts: torch.Tensor, num_bags: int, bag_of: torch.Tensor | None) -> torch.Tensor:
    if bag_of is None:
        return counts.sum(dim=1)
    return counts.new_zeros(num_bags).index_add(0, bag_of, counts)
