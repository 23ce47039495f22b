"""Operators of fbgemm that torchrec's tensors use, written with torch's own operators."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram


def decompose(program: ExportedProgram) -> ExportedProgram:
    """Return the program with the operators below replaced, or the program itself if it has none of them."""
    found: dict[Any, Callable[..., Any]] = {}
    for node in program.graph.nodes:
        known = _KNOWN.get(str(node.target))
        if node.op == "call_function" and known is not None:
            found[node.target] = known
    return program.run_decompositions(found) if found else program


def _complete_cumsum(lengths: torch.Tensor) -> torch.Tensor:
    """Return the sums before each element, and that of all: (n + 1,), or (m, n + 1) of (m, n)."""
    zeros = lengths.new_zeros((*lengths.shape[:-1], 1))
    return torch.cat([zeros, lengths.cumsum(-1, dtype=lengths.dtype)], dim=-1)


def _inclusive_cumsum(lengths: torch.Tensor) -> torch.Tensor:
    return lengths.cumsum(-1, dtype=lengths.dtype)


def _exclusive_cumsum(lengths: torch.Tensor) -> torch.Tensor:
    return _complete_cumsum(lengths)[..., :-1]


def _jagged_to_padded_dense(
    values: torch.Tensor, offsets: Sequence[torch.Tensor], max_lengths: Sequence[Any], padding_value: float = 0.0
) -> torch.Tensor:
    """Return (lists, longest, ...) with ``padding_value`` behind the end of a list. One jagged dimension."""
    bounds, longest = offsets[0], max_lengths[0]
    starts, ends = bounds[:-1].unsqueeze(1), bounds[1:].unsqueeze(1)
    positions = starts + torch.arange(longest, device=values.device, dtype=bounds.dtype).unsqueeze(0)
    is_there = positions < ends
    # one more row, so that there is one to read where all lists are empty
    rows = torch.cat([values, values.new_zeros((1, *values.shape[1:]))])
    picked = rows[torch.where(is_there, positions, values.shape[0])]
    mask = is_there.reshape(*is_there.shape, *[1] * (values.dim() - 1))
    return torch.where(mask, picked, picked.new_full((), padding_value))


_KNOWN: dict[str, Callable[..., Any]] = {
    "fbgemm.asynchronous_complete_cumsum.default": _complete_cumsum,
    "fbgemm.asynchronous_inclusive_cumsum.default": _inclusive_cumsum,
    "fbgemm.asynchronous_exclusive_cumsum.default": _exclusive_cumsum,
    "fbgemm.jagged_to_padded_dense.default": _jagged_to_padded_dense,
}
