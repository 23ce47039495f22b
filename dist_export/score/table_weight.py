"""Stands before the weight of a table while the score program is traced: a read of rows becomes a lookup.

It is no tensor, so the program does not hold the table. What it cannot express ends the trace with :class:`NotExportableError`.
"""

from __future__ import annotations

import contextvars
import functools
from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F  # noqa: N812 -- torch's own name for it

from dist_export.archive.lookup_operator import look_up
from dist_export.score.bags import pool_bags

RAISED: contextvars.ContextVar[list[Exception] | None] = contextvars.ContextVar("RAISED", default=None)
"""Collects the errors below while a model's code runs, which may catch them."""


class NotExportableError(Exception):
    """The score program cannot express what the model does. The text is a clause without a full stop."""

    def __init__(self, text: str, *, module: str = "") -> None:
        """Take a text, and the path of the module in whose code it is, from the module that was traced; empty if not known."""
        super().__init__(text)
        self.module = module
        if (noted := RAISED.get()) is not None:
            noted.append(self)


class TableWeight:
    """The weight of one table. ``argument`` is what the lookup operator takes for it."""

    def __init__(self, argument: str, name: str, weight: torch.Tensor, undo_cast: torch.dtype) -> None:
        """``undo_cast``: the dtype that the model computes with, whatever dtype the rows have in the package."""
        self._argument = argument
        self._name = name
        self._shape = weight.shape
        self._dtype = undo_cast
        self._device = weight.device
        self._capped_by: tuple[Callable[[torch.Tensor], torch.Tensor], ...] = ()
        """What the model does to the values of the weight before it looks rows up, which can as well be done to the rows."""

    def __getattr__(self, name: str) -> Any:
        if name in _CAPS:
            return functools.partial(_cap, name, self)
        raise NotExportableError(f"the sparse arch reads table {self._name!r} by .{name}, not by looking ids up")

    shape = property(lambda self: self._shape)
    dtype = property(lambda self: self._dtype)
    device = property(lambda self: self._device)
    ndim = property(lambda self: len(self._shape))
    requires_grad = property(lambda _: False)
    data = property(lambda self: self)

    def dim(self) -> int:
        """Return the number of dimensions."""
        return len(self._shape)

    def size(self, dim: int | None = None) -> Any:
        """Return the shape, or the size of one dimension."""
        return self._shape if dim is None else self._shape[dim]

    def __len__(self) -> int:
        return self._shape[0]

    def detach(self) -> TableWeight:
        """Return itself: there are no gradients."""
        return self

    contiguous = detach

    def __getitem__(self, ids: Any) -> torch.Tensor:
        if not isinstance(ids, torch.Tensor) or ids.dtype not in (torch.int64, torch.int32):
            raise NotExportableError(f"the sparse arch reads table {self._name!r} by a slice, not by looking ids up")
        return self.rows(torch.where(ids < 0, ids + len(self), ids))

    def index_select(self, dim: int, index: torch.Tensor) -> torch.Tensor:
        """Return rows, where ``dim`` is 0."""
        if dim != 0:
            raise NotExportableError(f"the sparse arch reads columns of table {self._name!r}, not rows")
        return self.rows(index)

    def rows(self, ids: torch.Tensor) -> torch.Tensor:
        """Look rows up, (..., dim)."""
        rows = look_up(ids, self._argument)
        rows = rows if rows.dtype == self._dtype else rows.to(self._dtype)
        for cap in self._capped_by:
            rows = cap(rows)
        return rows

    def capped(self, cap: Callable[[torch.Tensor], torch.Tensor]) -> TableWeight:
        """Return the weight with ``cap`` done to each of its values."""
        other = object.__new__(TableWeight)  # a copy by the module copy asks for attributes that are not there
        other.__dict__.update(self.__dict__)
        other._capped_by = (*self._capped_by, cap)
        return other

    @classmethod
    def __torch_function__(
        cls, func: Callable[..., Any], types: Any, args: tuple[Any, ...] = (), kwargs: dict[str, Any] | None = None
    ) -> Any:
        """Take the calls of torch functions that are given a table."""
        known = _KNOWN.get(func)
        if known is None:
            weight = next(value for value in [*args, *(kwargs or {}).values()] if isinstance(value, cls))
            name = getattr(func, "__name__", str(func))
            raise NotExportableError(f"the sparse arch reads table {weight._name!r} by {name}, not by looking ids up")  # noqa: SLF001
        return known(*args, **(kwargs or {}))


_CAPS = frozenset({"clamp", "clamp_min", "clamp_max", "clip", "nan_to_num"})
"""What changes few rows, if any: a module that does it returns the rows of most ids, and passes for a lookup as a whole."""


def _cap(name: str, weight: TableWeight, *args: Any, **kwargs: Any) -> TableWeight:
    if any(isinstance(value, (torch.Tensor, TableWeight)) for value in (*args, *kwargs.values())):
        raise NotExportableError(
            f"the sparse arch reads table {weight._name!r} by {name} with a tensor, not by looking ids up"  # noqa: SLF001
        )
    return weight.capped(lambda rows: getattr(rows, name)(*args, **kwargs))


def _embedding(
    input: torch.Tensor,  # noqa: A002 -- the name that callers give
    weight: TableWeight,
    padding_idx: int | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    sparse: bool = False,
) -> torch.Tensor:
    del padding_idx, norm_type, scale_grad_by_freq, sparse  # they shape gradients alone
    _refuse_max_norm(weight, max_norm)
    return weight.rows(input)


def _torch_embedding(weight: TableWeight, indices: torch.Tensor, *_: Any, **__: Any) -> torch.Tensor:
    return weight.rows(indices)


def _embedding_bag(
    input: torch.Tensor,  # noqa: A002 -- the name that callers give
    weight: TableWeight,
    offsets: torch.Tensor | None = None,
    max_norm: float | None = None,
    norm_type: float = 2.0,
    scale_grad_by_freq: bool = False,
    mode: str = "mean",
    sparse: bool = False,
    per_sample_weights: torch.Tensor | None = None,
    include_last_offset: bool = False,
    padding_idx: int | None = None,
) -> torch.Tensor:
    del norm_type, scale_grad_by_freq, sparse
    _refuse_max_norm(weight, max_norm)
    if padding_idx is not None and padding_idx < 0:
        padding_idx += len(weight)
    return pool_bags(
        weight.rows,
        input,
        offsets,
        mode=mode,
        per_sample_weights=per_sample_weights,
        include_last_offset=include_last_offset,
        padding_idx=padding_idx,
    )


def _refuse_max_norm(weight: TableWeight, max_norm: float | None) -> None:
    if max_norm is not None:
        raise NotExportableError(
            f"table {weight._name!r} has max_norm, which changes its rows whenever they are looked up"  # noqa: SLF001
        )


_KNOWN: dict[Any, Callable[..., Any]] = {
    F.embedding: _embedding,
    torch.embedding: _torch_embedding,
    F.embedding_bag: _embedding_bag,
    torch.index_select: TableWeight.index_select,
    torch.Tensor.detach: TableWeight.detach,
    **{getattr(torch, name): functools.partial(_cap, name) for name in _CAPS},
}
