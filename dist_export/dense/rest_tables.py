"""Tables outside of both arches that keep their rows by themselves. No state_dict has these, and an export gives them none."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

from torch import nn

from dist_export.dense.hash_feed import methods_of
from dist_export.dense.reachable_tables import find_tables, say_table
from dist_export.errors import ModelError
from dist_export.humanize import few


def list_rest_tables(root: nn.Module, arches: Sequence[nn.Module]) -> dict[str, nn.Module]:
    """Return such tables by their path within the model."""
    return find_tables(root, "", skip={id(child) for arch in arches for child in arch.modules()})


@contextlib.contextmanager
def answers_of(tables: Mapping[str, nn.Module], take: Callable[[str, Any], None]) -> Iterator[None]:
    """Within this block, ``take`` gets the path of a table, and what a method of it returns. Any rank, for itself."""
    with contextlib.ExitStack() as held:
        for path, module in tables.items():
            own: Any = module
            for name in ("forward", *methods_of(type(module))):
                before = vars(own).get(name, take)  # no table has this one
                object.__setattr__(own, name, functools.partial(_answer, getattr(own, name), take, path))
                held.callback(_put_back, own, name, None if before is take else before)
        yield


def refuse_tables_read(tables: Mapping[str, nn.Module], read: Sequence[str]) -> None:
    """Refuse those of the tables that the scores are made of. ModelError."""
    if not read:
        return
    told = [say_table(path, tables[path]) for path in read]
    raise ModelError(
        f"the model's forward computes with {few(told)} outside of the sparse arch. An export puts the checkpoint's rows into "
        "tables of the sparse arch alone, so the scores would be those of untrained rows. Nothing was written. Make the table a "
        "module of the sparse arch, and let that look its rows up"
    )


def _answer(method: Callable[..., Any], take: Callable[[str, Any], None], path: str, *args: Any, **kwargs: Any) -> Any:
    """Call a method of a table, and pass on what it returns."""
    result = method(*args, **kwargs)
    take(path, result)
    return result


def _put_back(own: Any, name: str, before: Any) -> None:
    if before is None:
        object.__delattr__(own, name)
    else:
        object.__setattr__(own, name, before)
