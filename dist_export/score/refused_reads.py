"""Notice that a model's code asks for the values of tensors during a trace, even if it catches the error that this raises."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dist_export.model.user_errors import blame
from dist_export.score.table_weight import NotExportableError

_READS: tuple[Callable[..., Any], ...] = (
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__complex__,
    torch.Tensor.__index__,
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.equal,
    torch.allclose,
    torch.Tensor.equal,
    torch.Tensor.allclose,
)
"""What gives a Python number of a tensor. A trace has no values, so a branch on one cannot be in the program."""


class RefusedReads(TorchFunctionMode):
    """A context manager around the model's code. On leaving it, a read that failed is an error, whoever caught it.

    Raises:
        NotExportableError: a read failed within the block, and the model's code went on without it.
    """

    def __init__(self) -> None:
        super().__init__()
        self._failed: BaseException | None = None

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and note the error of a read."""
        try:
            return func(*args, **(kwargs or {}))
        except Exception as error:
            if self._failed is None and (func in _READS or isinstance(error, NotExportableError)):
                self._failed = error
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Refuse a read that failed and was caught."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        failed, self._failed = self._failed, None
        if failed is not None and kind is None:
            first = str(failed).partition("\n")[0]
            raise NotExportableError(
                f"the model's code catches an error of the trace ({type(failed).__name__}: {first}), so what it does with real "
                f"values would not be in the program{blame(failed)}"
            )
