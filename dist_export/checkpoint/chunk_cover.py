"""Whether chunks make up a whole tensor: each element in one of them, and in one only. Pure."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np

from dist_export.errors import CheckpointError

_MAX_CELLS = 1 << 24
"""Of the grid that a tensor's chunks are laid out on, in bytes."""


def check_cover(name: str, shape: tuple[int, ...], chunks: Sequence[Any], where: str) -> int:
    """Refuse chunks (with ``offsets`` and ``sizes`` first) that leave a gap, overlap, or reach out of the tensor.

    Returns the cells of the grid that was needed to see it, 0 where none was: what this costs.
    """
    solid = []
    for chunk in chunks:
        offsets, sizes = chunk[0], chunk[1]
        if len(offsets) != len(shape) or len(sizes) != len(shape):
            raise CheckpointError(
                f"{where}: {name!r} has shape {list(shape)}, but a chunk of shape {list(sizes)}"
                ". Copy the checkpoint again, or take an earlier one"
            )
        for offset, size, whole in zip(offsets, sizes, shape, strict=True):
            if offset + size > whole:
                raise CheckpointError(
                    f"{where}: {name!r} has shape {list(shape)}, but a chunk of {list(sizes)} at {list(offsets)}"
                    ". Copy the checkpoint again, or take an earlier one"
                )
        if 0 not in sizes:
            solid.append((offsets, sizes))
    if 0 in shape:
        return 0
    cut = [d for d, whole in enumerate(shape) if any(sizes[d] != whole for _, sizes in solid)]
    if len(cut) > 1:
        return _check_grid(name, shape, solid, cut, where)
    dim = cut[0] if cut else -1
    end = 0
    for offsets, sizes in sorted(solid, key=lambda chunk: chunk[0][dim]) if cut else solid:
        begin = offsets[dim] if cut else 0
        if begin < end:
            raise _overlap(name, offsets, where)
        if begin > end:
            break
        end += sizes[dim] if cut else 1
    if end < (shape[dim] if cut else 1):
        raise _gap(name, [end if d == dim else 0 for d in range(len(shape))], where)
    return 0


def _check_grid(name: str, shape: tuple[int, ...], solid: list[Any], cut: list[int], where: str) -> int:
    """Lay chunks that are cut along several dimensions out on the grid of all their edges."""
    edges = [sorted({0, shape[d], *(o[d] for o, _ in solid), *(o[d] + s[d] for o, s in solid)}) for d in cut]
    cells = [len(edge) - 1 for edge in edges]
    total = 1
    for count in cells:
        total *= count
    if total > _MAX_CELLS:
        raise CheckpointError(
            f"{where}: {name!r} is cut into {total:,} pieces, more than any trainer writes"
            ". Copy the checkpoint again, or take an earlier one"
        )
    positions = [{edge: place for place, edge in enumerate(its)} for its in edges]
    taken = np.zeros(cells, np.uint8)
    for offsets, sizes in solid:
        at = tuple(slice(positions[n][offsets[d]], positions[n][offsets[d] + sizes[d]]) for n, d in enumerate(cut))
        if taken[at].any():
            raise _overlap(name, offsets, where)
        taken[at] = 1
    if not taken.all():
        first = np.argwhere(taken == 0)[0].tolist()
        corner = dict(zip(cut, (edges[n][cell] for n, cell in enumerate(first)), strict=True))
        raise _gap(name, [corner.get(d, 0) for d in range(len(shape))], where)
    return total


def _overlap(name: str, offsets: tuple[int, ...], where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: chunks of {name!r} overlap at {list(offsets)}; nothing says which one is valid"
        ". Copy the checkpoint again, or take an earlier one"
    )


def _gap(name: str, gap: list[int], where: str) -> CheckpointError:
    return CheckpointError(
        f"{where}: the chunks of {name!r} leave a gap at {gap}; the save did not finish. Take an earlier checkpoint"
    )
