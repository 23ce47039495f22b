"""Whether a model's forward does something behind its dense arch that its scores are made of: no package has that."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch

from dist_export.dense.origins import tensors_in

_MOST_COLUMNS = 256
"""Of a tensor. One that has more is no score."""


def changes_scores(output: Any, returned: Any, batch: Any) -> bool:
    """Whether ``model(batch)`` gives other values for each example than those that its dense arch has returned.

    A loss of the whole batch is none, and neither are values of the batch, such as labels. Others may be given beside all that
    the dense arch has returned; then nothing is lost.

    Args:
        output: what the model gave.
        returned: what the dense arch has returned, a copy.
        batch: what the model was called with.
    """
    sizes = {len(tensor) for tensor in tensors_in(returned) if _is_plain(tensor)}
    if len(sizes) != 1:
        return False
    (num_rows,) = sizes
    own, given = set(_columns(returned, num_rows)), set(_columns(output, num_rows))
    return not own <= given and not given <= own | set(_columns(batch, num_rows))


def _columns(values: Any, num_rows: int) -> Iterator[bytes]:
    """Yield the values of each column, as bytes, of the tensors that have as many rows as the batch."""
    for tensor in tensors_in(values):
        if not _is_plain(tensor) or len(tensor) != num_rows:
            continue
        wide = tensor.detach().to("cpu", torch.float64).reshape(num_rows, -1) + 0.0  # of both zeros one
        if wide.shape[1] <= _MOST_COLUMNS:
            yield from (column.contiguous().numpy().tobytes() for column in wide.unbind(1))


def _is_plain(tensor: torch.Tensor) -> bool:
    """Whether a tensor has a row for each example, and values that can be read here."""
    is_here = tensor.layout == torch.strided and not hasattr(tensor, "full_tensor")
    return is_here and not tensor.is_quantized and not tensor.is_complex() and tensor.dim() > 0
