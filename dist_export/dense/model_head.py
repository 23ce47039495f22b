"""The caller's model up to its dense arch: what ``forward`` does before and between the arches, and nothing behind them."""

from __future__ import annotations

import contextlib
from collections.abc import Callable, Iterator
from typing import Any

from torch import nn

from dist_export.errors import ModelError
from dist_export.model.unwrap import unwrap


class _ReachedError(BaseException):
    """Ends a forward where it calls the dense arch. No Exception, so that the model's code does not catch it."""

    def __init__(self, blocks: Any) -> None:
        super().__init__()
        self.blocks = blocks


class ModelHead:
    """Runs a model until it calls its dense arch. Each method for one rank by itself."""

    def __init__(self, model: nn.Module, sparse_arch: nn.Module, dense_arch: nn.Module) -> None:
        """All three are the caller's own, wrappers included, and ``model`` calls both arches once."""
        self.model = model
        self._sparse_arch = sparse_arch
        self._dense_arch = dense_arch

    def run(self, data: Any) -> Any:
        """Return what the dense arch is called with for this batch, before any hook of the caller's. It does not run.

        Raises:
            ModelError: the model returns without calling it, or calls it with anything but one argument.
        """
        begin: Callable[..., Any] = _end_forward
        # a scripted module refuses the bound method
        handle = nn.Module.register_forward_pre_hook(self._dense_arch, begin, prepend=True, with_kwargs=True)
        depth = len(_traced_modules())
        try:
            self.model(data)
        except _ReachedError as reached:
            _leave_modules(depth)
            return reached.blocks
        finally:
            handle.remove()
        raise ModelError("model(batch) does not call the dense arch for this batch, and it does otherwise")

    @contextlib.contextmanager
    def plain(self) -> Iterator[None]:
        """Within this block, the model runs without DDP and the like around itself and the sparse arch, and can be traced.

        Hooks on the wrappers run all the same. The dense arch has no parameters: it is not to be run.
        """
        undo: list[tuple[dict[str, Any], str, Any]] = []

        def put(module: nn.Module, name: str, value: Any) -> None:
            undo.append((vars(module), name, vars(module).get(name, _MISSING)))
            vars(module)[name] = value

        try:
            for wrapper in (self.model, self._sparse_arch):
                if unwrap(wrapper) is not wrapper:
                    put(wrapper, "forward", unwrap(wrapper).__call__)
            for held in ("_parameters", "_buffers", "_modules"):
                put(unwrap(self._dense_arch), held, {})
            yield
        finally:
            for place, name, value in reversed(undo):
                if value is _MISSING:
                    del place[name]
                else:
                    place[name] = value

    @property
    def sparse_path(self) -> str:
        """The path of the sparse arch within the model, both without wrappers."""
        wanted, modules = unwrap(self._sparse_arch), unwrap(self.model).named_modules()
        return next(str(path) for path, module in modules if module is wanted)


_MISSING = object()


def _end_forward(_: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
    given = [*args, *kwargs.values()]
    if len(given) != 1:
        raise ModelError(
            f"model(batch) calls the dense arch with {len(given)} arguments for this batch, and with one otherwise"
        )
    raise _ReachedError(given[0])


def _traced_modules() -> dict[str, Any]:
    """Return the modules in which a trace is, outermost first; nothing while none takes place."""
    from torch.fx.experimental.proxy_tensor import get_proxy_mode

    mode = get_proxy_mode()
    return {} if mode is None else mode.tracer.module_stack


def _leave_modules(depth: int) -> None:
    """Tell a trace that it left the modules within this depth: torch's tracer does not see that where an error ends a forward."""
    modules = _traced_modules()
    while len(modules) > depth:
        modules.popitem()
