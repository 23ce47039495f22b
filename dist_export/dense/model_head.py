"""The caller's own model, run for what its dense arch gets: what ``forward`` does before and between the arches."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any, NamedTuple

from torch import nn

from dist_export.errors import DistExportError, ModelError
from dist_export.model.unwrap import is_sharded_flat, unwrap

OTHER_CALLS = "model(batch) calls the dense arch"
"""Begins the message of a model that calls its dense arch otherwise than for the sample."""


class DenseCall(NamedTuple):
    """The one call of the dense arch."""

    blocks: Any
    """What it was given, before any hook of the caller's."""
    output: Any
    """What it returned, after any hook of the caller's."""


class ModelHead:
    """Runs a model that calls each arch once. Each method for one rank by itself."""

    def __init__(self, model: nn.Module, sparse_arch: nn.Module, dense_arch: nn.Module) -> None:
        """All three are the caller's own, wrappers included."""
        self.model = model
        self._sparse_arch = sparse_arch
        self._dense_arch = dense_arch
        self.own_dense_arch = dense_arch
        """The caller's, while another one is in its place too."""

    def run(self, data: Any, *, is_whole: bool = False) -> DenseCall:
        """Run the model on a batch, and return the call of its dense arch.

        Args:
            data: the batch.
            is_whole: whether the model must return. Otherwise an error behind the dense arch, as in a loss, is passed over.

        Raises:
            ModelError: the model calls the dense arch not once, or with anything but one argument.
        """
        given: list[tuple[tuple[Any, ...], dict[str, Any]]] = []
        outputs: list[Any] = []
        # a scripted module refuses bound methods
        begin, end = nn.Module.register_forward_pre_hook, nn.Module.register_forward_hook
        handles = [
            begin(
                self._dense_arch, lambda _, args, kwargs: given.append((args, kwargs)), prepend=True, with_kwargs=True
            ),
            end(self._dense_arch, lambda _, __, output: outputs.append(output)),
        ]
        try:
            self.model(data)
        except DistExportError:
            raise
        except Exception:
            if is_whole or not outputs:
                raise
        finally:
            for handle in handles:
                handle.remove()
        if len(given) != 1 or len(outputs) != 1:
            raise ModelError(f"{OTHER_CALLS} {len(given)} times for a batch, and once for the sample")
        values = [*given[0][0], *given[0][1].values()]
        if len(values) != 1:
            raise ModelError(f"{OTHER_CALLS} with {len(values)} arguments for a batch, and with one for the sample")
        return DenseCall(values[0], outputs[0])

    @contextlib.contextmanager
    def traced(self, copied: nn.Module) -> Iterator[None]:
        """Within this block, ``copied`` is in the place of the dense arch, and DDP and the like around the rest are not run.

        Hooks on these wrappers run all the same.

        Args:
            copied: the plain copy of the dense arch, with the checkpoint's values.
        """
        undo: list[tuple[dict[str, Any], str, Any]] = []
        own = self.own_dense_arch

        def put(place: dict[str, Any], name: str, value: Any) -> None:
            undo.append((place, name, place.get(name, _MISSING)))
            place[name] = value

        try:
            for parent in list(self.model.modules()):
                for name, child in list(parent._modules.items()):  # noqa: SLF001 -- setattr may be the caller's own
                    if child is own:
                        put(parent._modules, name, copied)  # noqa: SLF001
            for wrapper in (self.model, self._sparse_arch):
                if unwrap(wrapper) is not wrapper:
                    put(vars(wrapper), "forward", unwrap(wrapper).__call__)
            self._dense_arch = copied
            yield
        finally:
            self._dense_arch = own
            for place, name, value in reversed(undo):
                if value is _MISSING:
                    del place[name]
                else:
                    place[name] = value

    @property
    def cannot_be_traced(self) -> str:
        """Why the model cannot be traced as it is; empty if it may be."""
        if not self.sparse_path:
            return "the sparse arch is no registered module of the model, so torch.export does not see it"
        apart = {id(module) for module in (*self._dense_arch.modules(), self.model, self._sparse_arch)}
        if any(is_sharded_flat(module) for module in self.model.modules() if id(module) not in apart):
            return "FSDP of version 1 is around a module of the model outside of its arches, which torch.export cannot trace"
        return ""

    @property
    def sparse_path(self) -> str:
        """The path of the sparse arch within the model, both without wrappers; empty if it is no registered module."""
        wanted, modules = unwrap(self._sparse_arch), unwrap(self.model).named_modules()
        return next((str(path) for path, module in modules if module is wanted), "")


_MISSING = object()
