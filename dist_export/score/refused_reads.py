"""Notice that a model's code asks for the values of tensors during a trace, even if it catches the error that this raises."""

from __future__ import annotations

import functools
import sys
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch.overrides import TorchFunctionMode

from dist_export.model.user_errors import blame
from dist_export.score.table_weight import RAISED, NotExportableError

_READS: tuple[Callable[..., Any], ...] = (
    torch.Tensor.__bool__,
    torch.Tensor.__int__,
    torch.Tensor.__float__,
    torch.Tensor.__complex__,
    torch.Tensor.__index__,
    torch.Tensor.item,
    torch.Tensor.tolist,
    torch.Tensor.numpy,
    torch.Tensor.__array__,
    torch.Tensor.__contains__,
    torch.Tensor.__dlpack__,
    torch.Tensor.__reduce_ex__,
    torch.Tensor.__repr__,
    torch.Tensor.__format__,
    torch.is_nonzero,
    torch.Tensor.is_nonzero,
    torch._assert,  # noqa: SLF001 -- what asserts on values call
    torch.equal,
    torch.allclose,
    torch.Tensor.equal,
    torch.Tensor.allclose,
)
"""What gives a Python number of a tensor. A trace has no values, so a branch on one cannot be in the program."""


_SYMBOLS = torch.SymInt, torch.SymFloat, torch.SymBool


_LIBRARIES = frozenset({"torchrec", "fbgemm_gpu"})
"""They take sizes from lengths, as symbols of the program, and catch no errors."""


def _asker() -> str:
    """Return the package whose code called torch."""
    frame = sys._getframe(2)  # noqa: SLF001 -- cheaper than a whole stack
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "torch":
        frame = frame.f_back
    return str(frame.f_globals.get("__name__", "")).partition(".")[0]


_SYMBOLIC = "torch", "torch._tensor", "torch.overrides"
"""Modules that turn a size into a Python number for whoever asks; besides them, all of torch.fx."""


def _is_asked_by_torch() -> bool:
    """Whether it is torch's own code that wants to know a size: it goes on without it in a way that is right for all sizes."""
    frame = sys._getframe(2)  # noqa: SLF001 -- as above
    name = str(frame.f_globals.get("__name__", ""))
    while frame.f_back is not None and (name in _SYMBOLIC or name.startswith("torch.fx.") or name == __name__):
        frame = frame.f_back
        name = str(frame.f_globals.get("__name__", ""))
    return name.partition(".")[0] in {"torch", "sympy"}


class RefusedReads(TorchFunctionMode):
    """A context manager around the model's code. On leaving it, a read that failed is an error, whoever caught it.

    Raises:
        NotExportableError: a read failed within the block, and the model's code went on without it.
    """

    def __init__(self, inputs: Iterable[torch.Tensor] = ()) -> None:
        """Take the inputs of the trace: their sizes know those that follow from values."""
        super().__init__()
        self._failed: list[Exception] = []
        sizes: list[Any] = [size for tensor in inputs for size in tensor.shape]
        self._shapes = next((size.node.shape_env for size in sizes if isinstance(size, torch.SymInt)), None)

    def __enter__(self) -> RefusedReads:
        """Begin to note errors."""
        self._token = RAISED.set(self._failed)
        if self._shapes is not None:
            self._shapes.evaluate_sym_node = functools.partial(self._evaluate, self._shapes.evaluate_sym_node)
        super().__enter__()  # type: ignore[no-untyped-call]
        return self

    def _evaluate(self, evaluate: Callable[..., Any], *args: Any, **kwargs: Any) -> Any:
        """Turn a size into a number, and note the error if the model's code asks for one that follows from values."""
        try:
            return evaluate(*args, **kwargs)
        except Exception as error:
            if not _is_asked_by_torch():
                self._failed.append(error)
            raise

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        """Call the function, and note the error of a read."""
        try:
            found = func(*args, **(kwargs or {}))
            symbols = [one for one in (found if isinstance(found, list) else [found]) if isinstance(one, _SYMBOLS)]
            if func in _READS and symbols and _asker() not in _LIBRARIES:
                # what branches on it raises, and that may be caught where nothing sees it
                raise NotExportableError("the model's code takes a Python number from a tensor")  # noqa: TRY301
            return found  # noqa: TRY300
        except Exception as error:
            if func in _READS and not isinstance(error, NotExportableError):  # which notes itself
                self._failed.append(error)
            raise

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, trace: object) -> None:
        """Refuse a read that failed and was caught."""
        super().__exit__(kind, error, trace)  # type: ignore[no-untyped-call]
        RAISED.reset(self._token)
        if self._shapes is not None:
            del self._shapes.evaluate_sym_node  # the method of its class is there again
        failed = self._failed[0] if self._failed else None
        if failed is not None and kind is None:
            first = str(failed).partition("\n")[0]
            raise NotExportableError(
                f"the model's code catches an error of the trace ({type(failed).__name__}: {first}), so what it does with real "
                f"values would not be in the program{blame(failed)}"
            )
