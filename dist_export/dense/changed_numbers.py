"""Tell of numbers that the dense arch changes in its forward and that its scores are made of: no checkpoint has them.

A step that decides on a warm-up is such a number; a counter for a log is none. Code says which attributes may change, and a run
with another number in each says whether the scores do.
"""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dist_export.archive.output_diff import has_same_values
from dist_export.dense.clock_reads import walk_functions
from dist_export.dense.eager import DenseSample, run_eagerly
from dist_export.errors import ModelError
from dist_export.humanize import few

_FAR = 1_000_000
"""Added to a number, so that it passes what a forward may compare it with."""

_WHOLE = (torch.int32, torch.int64)


def note_changed_numbers(sample: DenseSample, path: str) -> list[str]:
    """Return a note on plain numbers and integer tensors that forward may change and that change the outputs. Rank 0.

    Args:
        sample: of the copy of the dense arch; it runs once for each such number, which is put back.
        path: of the dense arch within the model.
    """
    dense_arch = sample.dense_arch
    assert isinstance(dense_arch, nn.Module)
    changed = _list_changed(dense_arch)
    before = [(module, name, vars(module)[name]) for _, module, name in changed]
    copies = [value.clone() if isinstance(value, torch.Tensor) else value for *_, value in before]

    def run() -> list[torch.Tensor]:
        try:
            outputs = sample.flatten(run_eagerly(dense_arch, sample.blocks))
            return [tensor.detach().clone() for tensor in outputs]
        finally:
            _put(before, copies)

    as_given = run() if changed else []
    if not _is_same(as_given, run() if changed else []):
        return []  # it draws random numbers, which is refused elsewhere
    found = []
    for place, module, name in changed:
        vars(module)[name] = vars(module)[name] + _FAR
        with contextlib.suppress(ModelError):  # such a number may have no meaning to it
            if not _is_same(as_given, run()):
                found.append(".".join(part for part in (path, place, name) if part))
    if not found:
        return []
    told = (
        f"the dense arch changes {few(found)} in its forward and makes scores of it, and no checkpoint has it: the package has "
        "the value of the model given, whatever training made of it. Register it as a buffer, and change it only if self.training"
    )
    return [told]


def _is_same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return all(map(has_same_values, some, others))


def _put(before: list[tuple[nn.Module, str, Any]], copies: list[Any]) -> None:
    """Put numbers back, also those that a run has changed in place."""
    for (module, name, value), copied in zip(before, copies, strict=True):
        if isinstance(value, torch.Tensor):
            value.copy_(copied)
        vars(module)[name] = value


def _list_changed(dense_arch: nn.Module) -> list[tuple[str, nn.Module, str]]:
    """Return path, module and name of the numbers that functions of the modules' own classes store."""
    stored: dict[type, set[str]] = {}
    for function, owner, *_ in walk_functions(dense_arch.modules()):
        if isinstance(owner, nn.Module):
            stored.setdefault(type(owner), set()).update(_list_stored(function))
    return [
        (path, module, name)
        for path, module in dense_arch.named_modules()
        for name in sorted(stored.get(type(module), ()))
        if _is_number(vars(module).get(name))
    ]


def _list_stored(function: Any) -> Iterator[str]:
    """Yield names of attributes that are assigned, or of which a method such as ``add_`` is called."""
    last = ""
    for step in dis.get_instructions(function):
        name = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        if step.opname == "STORE_ATTR":
            yield str(name)
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if str(name).endswith("_") and not str(name).endswith("__") and last:
                yield last
            last = str(name)
        elif step.opname not in ("CACHE", "EXTENDED_ARG", "PUSH_NULL"):
            last = ""


def _is_number(value: Any) -> bool:
    if isinstance(value, torch.Tensor):
        return value.dtype in _WHOLE
    return isinstance(value, (int, float)) and not isinstance(value, bool)
