"""Tell of values that no state_dict has: a model that was built anew has them as built, whatever training made of them."""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn
from torch.nn.parameter import is_lazy

from dist_export.checkpoint.model_weights import plain_name
from dist_export.config.needs import ModelValues
from dist_export.dense.copied_arch import find_arches
from dist_export.dense.origins import address_of, hidden_values
from dist_export.dense.own_values import list_sparse_modules
from dist_export.dense.reachable_tables import find_tables
from dist_export.humanize import few


def note_unsaved(model: Any, config: ModelValues) -> list[str]:
    """Return notes on buffers of both arches with ``persistent=False``, and on tensors that the sparse arch keeps as they are.

    What modules that keep tables hold does not count. The model must not have run since it was built.
    """
    sparse_arch, dense_arch = find_arches(model, config)
    sparse_modules = list_sparse_modules(model, sparse_arch, config.dense_model_name)
    saved = {address_of(tensor) for tensor in _list_saved(model)} - {0}
    buffers = [
        *_list_passing(dense_arch.named_modules(), config.dense_model_name, saved),
        *_list_passing(sparse_modules, config.sparse_model_name, saved),
    ]
    notes = []
    if buffers:
        notes.append(
            f"buffers with persistent=False are in no checkpoint ({few(list(dict.fromkeys(buffers)))}): the package has the "
            "values of the model given. That is right for constants, such as positions and masks; if training changes them, "
            "register them with persistent=True"
        )
    if values := _list_kept(model, sparse_arch, sparse_modules, config.sparse_model_name):
        notes.append(
            f"the sparse arch keeps {few(values)}, neither parameter nor buffer, so no checkpoint holds them: where scores are "
            "made of them, the package has the values of the model given. If training changes them, register them as parameters "
            "or buffers"
        )
    return notes


def _list_passing(modules: Iterable[tuple[str, nn.Module]], path: str, saved: set[int]) -> Iterator[str]:
    """Yield the names of buffers that no state_dict has, by themselves or as a saved tensor."""
    for place, module in modules:
        for name in sorted(module._non_persistent_buffers_set):  # noqa: SLF001 -- no method tells
            tensor = module._buffers.get(name)  # noqa: SLF001
            if tensor is not None and not is_lazy(tensor) and address_of(tensor) not in saved:
                yield plain_name(".".join(part for part in (path, place, name) if part))


def _list_saved(model: nn.Module) -> Iterator[torch.Tensor]:
    """Yield what is registered and in each state_dict: that of a sharded model is collective, and of hash tables a copy."""
    for module in model.modules():
        passing = module._non_persistent_buffers_set  # noqa: SLF001
        buffers = [its for name, its in module._buffers.items() if name not in passing]  # noqa: SLF001
        yield from (its for its in (*module._parameters.values(), *buffers) if its is not None and not is_lazy(its))  # noqa: SLF001


def _list_kept(
    model: nn.Module, sparse_arch: nn.Module, modules: Iterable[tuple[str, nn.Module]], path: str
) -> list[str]:
    looked_at = {id(module) for _, module in modules}
    skip = {id(module) for module in model.modules()} - looked_at
    tables = tuple(f"{place}{step}" for place in find_tables(sparse_arch, path) for step in ".[")
    known = [*model.parameters(), *model.buffers()]
    found = [name for name, _ in hidden_values(sparse_arch, path, known, skip=skip)]
    return [plain_name(name) for name in found if not name.startswith(tables)]
