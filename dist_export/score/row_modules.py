"""Find the modules that are lookups as a whole: what they return for the sample is exactly the rows of their ids.

Only those in which a trace fails are replaced. A module that returns its rows for the sample may do more with other ids.
"""

from __future__ import annotations

import fnmatch
from collections.abc import Callable, Collection, Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.archive.lookup_operator import RowSource
from dist_export.checkpoint.model_weights import is_below
from dist_export.dense.row_lookup import RowFinder
from dist_export.errors import ConfigError
from dist_export.model.sparse_tables import is_hash_table
from dist_export.score.tables import SPARSE, ModelTables, is_scripted, look_up_coalesced


class Recorder:
    """Records the calls of modules that may be lookups while the sparse arch runs once. Rank 0; a context manager."""

    def __init__(self, tables: ModelTables | None) -> None:
        """``tables``: of the sparse arch; None records nothing, on ranks other than 0."""
        self._handles: list[Any] = []
        self._calls: dict[int, list[tuple[Any, Any]]] = {}
        self.candidates: list[tuple[nn.Module, str, list[str]]] = []
        """Modules with one table in them, parents first, each with its path and the table, or the children of a coalesced one."""
        for module, paths in () if tables is None else tables.modules:
            assert tables is not None
            its = _tables_within(module, tables)
            if its is not None and not is_scripted(module):
                self.candidates.append((module, paths[0], its))

    def __enter__(self) -> Recorder:
        for module, _, _ in self.candidates:
            hook: Callable[..., Any] = self._note
            self._handles.append(module.register_forward_hook(hook, with_kwargs=True))
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _note(self, module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any], output: Any) -> None:
        given = [value for value in (*args, *kwargs.values()) if isinstance(value, torch.Tensor)]
        ids = given[0].detach().clone() if len(given) == 1 and len(args) + len(kwargs) == 1 else None
        found = output.detach().clone() if isinstance(output, torch.Tensor) else None  # what follows may write into it
        self._calls.setdefault(id(module), []).append((ids, found))

    def find(self, finder: RowFinder, rows: RowSource) -> dict[int, tuple[str, list[str]]]:
        """Return the modules that are lookups, parents first: ``id()`` -> path and tables."""
        found: dict[int, tuple[str, list[str]]] = {}
        for module, path, its in self.candidates:
            calls = self._calls.get(id(module), [])
            if not calls:
                continue
            names = [finder.written_name(table) for table in its if finder.has_table(table)]
            if len(names) == len(its) and all(_gives_rows(ids, output, names, rows) for ids, output in calls):
                found[id(module)] = path, its
        return found


class FailingModule:
    """Knows in which module of the sparse arch a trace fails. A context manager around the trace."""

    def __init__(self, sparse_arch: nn.Module, path: str) -> None:
        """``path``: of the sparse arch within the traced module."""
        self._sparse_arch = sparse_arch
        self._paths = path, SPARSE
        self._handles: list[Any] = []
        self._running: list[nn.Module] = []
        """The modules that began and did not return, outermost first."""

    def __enter__(self) -> FailingModule:
        for module in self._sparse_arch.modules():
            if not isinstance(module, torch.jit.ScriptModule):
                begin: Callable[..., Any] = self._begin
                end: Callable[..., Any] = self._end
                self._handles += [module.register_forward_pre_hook(begin), module.register_forward_hook(end)]
        return self

    def __exit__(self, *_: object) -> None:
        for handle in self._handles:
            handle.remove()

    def _begin(self, module: nn.Module, _: Any) -> None:
        self._running.append(module)

    def _end(self, module: nn.Module, *_: Any) -> None:
        while self._running and self._running.pop() is not module:
            pass  # modules whose error the model's code has caught

    def find(self, error: BaseException) -> nn.Module | None:
        """Return the innermost module in which ``error`` came up; None if it is in none of the sparse arch."""
        path = getattr(error, "module", "")
        if path:
            its = dict(self._sparse_arch.named_modules(remove_duplicate=False))
            begin = next((begin for begin in self._paths if is_below(path, begin)), "")
            return its.get(path.removeprefix(begin).removeprefix("."))
        return self._running[-1] if self._running else None


def choose_module(
    failing: nn.Module | None,
    candidates: Mapping[int, tuple[str, list[str]]],
    sparse_arch: nn.Module,
    tried: Collection[int],
) -> nn.Module | None:
    """Return the innermost module around the failing one that is a lookup and was not replaced yet; None if there is none."""
    around = [
        module
        for module in sparse_arch.modules()
        if id(module) in candidates and id(module) not in tried and any(one is failing for one in module.modules())
    ]
    return min(around, key=lambda module: sum(1 for _ in module.modules()), default=None)


def name_modules(tables: ModelTables, patterns: Sequence[str], prefix: str) -> dict[int, tuple[str, list[str]]]:
    """Return the outermost modules that the setting ``lookup_modules`` names: ``id()`` -> path and tables.

    Raises:
        ConfigError: a pattern names no module, or one with another number of tables than one.
    """
    found: dict[int, tuple[str, list[str]]] = {}
    for pattern in patterns:
        below: set[int] = set()
        for module, paths in tables.modules:
            full = [".".join(part for part in (prefix, path) if part) for path in paths]
            if id(module) in below or not any(fnmatch.fnmatchcase(name, pattern) for name in (*paths, *full)):
                continue
            its = _tables_within(module, tables)
            if its is None:
                raise ConfigError(f"lookup_modules: {full[0]!r} ({pattern}) does not hold exactly one table")
            found[id(module)] = paths[0], its
            below.update(id(child) for child in module.modules())
        if not below:
            raise ConfigError(f"lookup_modules: {pattern!r} names no module of the sparse arch")
    return found


def _tables_within(module: nn.Module, tables: ModelTables) -> list[str] | None:
    """Return the one table within a module, or the children of the one coalesced table; None where there are more or none."""
    inside = {id(child) for child in module.modules()}
    found: list[list[str]] = []
    skipped: set[int] = set()
    for child, paths in tables.modules:
        if id(child) not in inside or id(child) in skipped:
            continue
        its = tables.tables_of(child, paths)
        if is_hash_table(child):
            skipped.update(id(one) for one in child.modules())
            found.append(its)
        else:
            found += [[table] for table in its]
    return found[0] if len(found) == 1 else None


def _gives_rows(ids: Any, output: Any, names: list[str], rows: RowSource) -> bool:
    if not isinstance(ids, torch.Tensor) or ids.is_floating_point() or not isinstance(output, torch.Tensor):
        return False

    def look_up(its: torch.Tensor, name: str) -> torch.Tensor:
        numbers: np.ndarray = its.reshape(-1).to("cpu", torch.int64).numpy()
        found = rows.find_rows(name, numbers)
        return found.reshape(*its.shape, *found.shape[1:])

    expected = look_up(ids, names[0]) if len(names) == 1 else look_up_coalesced(ids, names, look_up)
    return output.shape == expected.shape and torch.equal(output.detach().cpu(), expected.to(output.dtype))
