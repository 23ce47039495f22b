"""Tell of numbers that an arch changes in its forward and that its scores are made of: no checkpoint has them.

A step that decides on a warm-up is such a number; a counter for a log is none. Code says which attributes may change, and a run
with another number in each says whether the scores do.
"""

from __future__ import annotations

import contextlib
import dis
from collections.abc import Callable, Iterable, Iterator, Sequence
from typing import Any

import torch
from torch import nn

from dist_export.archive.output_diff import has_same_values
from dist_export.dense.blocks import Blocks
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

    def run() -> list[torch.Tensor]:
        outputs = sample.flatten(run_eagerly(dense_arch, sample.blocks))
        return [tensor.detach().clone() for tensor in outputs]

    return _note("dense arch", path, ChangedNumbers(dense_arch.named_modules()).find(run))


def note_changed_in_sparse(
    modules: Iterable[tuple[str, nn.Module]], run_sparse: Callable[[], Blocks], path: str
) -> list[str]:
    """Return the same note on the sparse arch, of which ``modules`` are those that keep no tables. In a single process.

    A number of ours may make a collective of the model fail on some ranks, so there is no such run with several.
    """
    return _note("sparse arch", path, ChangedNumbers(modules).find(lambda: list(run_sparse().tensors.values())))


def _note(what: str, path: str, names: Sequence[str]) -> list[str]:
    if not names:
        return []
    named = few([f"{path}.{name}" if path else name for name in names])
    told = (
        f"the {what} changes {named} in its forward and makes scores of it, and no checkpoint has it: the package has the value "
        "of the model given, whatever training made of it. Register it as a buffer, and change it only if self.training"
    )
    return [told]


class ChangedNumbers:
    """The numbers that functions of the modules' own classes store in attributes."""

    def __init__(self, modules: Iterable[tuple[str, nn.Module]]) -> None:
        """``modules`` come with their paths."""
        every = list(modules)
        stored: dict[type, set[str]] = {}
        for function, owner, *_ in walk_functions(module for _, module in every):
            if isinstance(owner, nn.Module):
                stored.setdefault(type(owner), set()).update(_list_stored(function))
        self._found = [
            (f"{path}.{name}".lstrip("."), module, name)
            for path, module in every
            for name in sorted(stored.get(type(module), ()))
            if _is_number(vars(module).get(name))
        ]
        self._before = [vars(module)[name] for _, module, name in self._found]
        self._copies = [its.clone() if isinstance(its, torch.Tensor) else its for its in self._before]

    def find(self, run: Callable[[], Sequence[torch.Tensor]]) -> list[str]:
        """Return those that change what ``run`` returns. It may raise ModelError."""
        found: list[str] = []
        if not self._found:
            return found
        try:
            as_given = self._run(run)
            is_same = _is_same(as_given, self._run(run))
        except ModelError:
            return found
        if not is_same:
            return found  # it draws random numbers, which is refused elsewhere
        for path, module, name in self._found:
            vars(module)[name] = vars(module)[name] + _FAR
            with contextlib.suppress(ModelError):  # such a number may have no meaning to it
                if not _is_same(as_given, self._run(run)):
                    found.append(path)
        return found

    def _run(self, run: Callable[[], Sequence[torch.Tensor]]) -> Sequence[torch.Tensor]:
        """Run, and put all numbers back, also those that are changed in place."""
        try:
            return run()
        finally:
            for (_, module, name), value, copied in zip(self._found, self._before, self._copies, strict=True):
                if isinstance(value, torch.Tensor):
                    value.copy_(copied)
                vars(module)[name] = value


def _is_same(some: Sequence[torch.Tensor], others: Sequence[torch.Tensor]) -> bool:
    return len(some) == len(others) and all(map(has_same_values, some, others))


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
