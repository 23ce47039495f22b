"""Tell of forwards that ask for the clock, or whether they are traced: a program has the answer of the export for good.

Code is read, nothing is run.
"""

from __future__ import annotations

import datetime as dt
import dis
import functools
import inspect
import sys
import time
import types
from collections.abc import Iterable, Iterator
from typing import Any

import torch
from torch import nn

from dist_export.humanize import few

_OF_TIME = ("time", "time_ns", "monotonic", "monotonic_ns", "clock_gettime", "clock_gettime_ns", "localtime", "gmtime")
_FUNCTIONS = {id(getattr(time, name)): f"time.{name}()" for name in _OF_TIME if hasattr(time, name)}
_OF_TRACE = ("is_compiling", "is_dynamo_compiling", "is_exporting")
_QUESTIONS = {
    id(getattr(torch.compiler, name)): f"torch.compiler.{name}()" for name in _OF_TRACE if hasattr(torch.compiler, name)
}
"""They are true while a program is traced, and false where the model itself scores."""
_OF_DATES = ("now", "utcnow", "today")
_LIBRARIES = frozenset({"torch", "torchrec", "fbgemm_gpu", "numpy", "builtins", *sys.stdlib_module_names})
_INSTALLED = ("site-packages", "dist-packages")
_UNCHANGED = ("PUSH_NULL", "EXTENDED_ARG", "CACHE")
"""Instructions between two others that leave what was loaded on top, or below an empty place."""
_MOST_FUNCTIONS = 2_000
_NOTHING = object()


def note_reads(model: nn.Module) -> list[str]:
    """Return notes on forwards of the caller's own classes, and on functions of theirs that they name.

    They read the clock, or ask whether they are traced. Of very many functions the first ones count.
    """
    clocks: dict[str, None] = {}
    questions: dict[str, None] = {}
    for function, owner, module, reads in walk_functions(model.modules()):
        for what in reads:
            kind = questions if what in _QUESTIONS.values() else clocks
            kind[f"{_name_of(function, owner, module)} reads {what}"] = None
    notes = []
    if clocks:
        notes.append(
            f"{few(list(clocks))}: the clock is read at the export, and where scores are made of it, the package has that time "
            "for good. Give the time as an input of the batch"
        )
    if questions:
        notes.append(
            f"{few(list(questions))}: that is true while a program is traced, so a package has what the code does then. Where "
            "that is something else than the model computes, scores differ that the sample does not show: let both be the same"
        )
    return notes


def walk_functions(
    modules: Iterable[nn.Module],
) -> Iterator[tuple[types.FunctionType, Any, nn.Module, list[str]]]:
    """Yield the forwards of the caller's own classes, and the functions of the caller's that they name, each once an owner.

    Each comes with its ``self`` or None, the module that uses it, and what it reads. Of very many functions the
    first ones count.
    """
    seen: set[tuple[int, int]] = set()
    kept: list[Any] = []  # what is made for the asking must not go while its id counts
    for module in modules:
        kinds = [kind for kind in type(module).__mro__ if _top_of(kind) not in _LIBRARIES]
        stack = [(vars(module).get("forward"), module), *((vars(kind).get("forward"), module) for kind in kinds)]
        while stack:
            value, owner = stack.pop()
            function = _function_of(value)
            key = (id(function), id(type(owner)))
            if function is None or key in seen or len(seen) >= _MOST_FUNCTIONS or not _is_own(function, kinds):
                continue
            seen.add(key)
            kept.append(function)
            reads: list[str] = []
            for what in _read(function, owner):
                if isinstance(what, str):
                    reads.append(what)
                else:
                    stack.append(what)
            yield function, owner, module, reads


def _name_of(function: types.FunctionType, owner: Any, module: nn.Module) -> str:
    if owner is not None and "." in function.__qualname__:
        return f"{type(owner).__name__}.{function.__name__}"
    return f"{function.__name__}, which {type(module).__name__} uses,"


def _top_of(value: Any) -> str:
    return str(getattr(value, "__module__", "")).split(".", maxsplit=1)[0]


def _is_own(function: types.FunctionType, kinds: list[type]) -> bool:
    """Whether a function is of the caller's: not of a library, but for the one that the module itself is of."""
    top = _top_of(function)
    if top in _LIBRARIES:
        return False
    return top in map(_top_of, kinds) or not any(place in function.__code__.co_filename for place in _INSTALLED)


def _function_of(value: Any) -> types.FunctionType | None:
    """Return the function of the caller's that a value calls. Of a decorated one that is what was decorated."""
    if isinstance(value, (staticmethod, classmethod, types.MethodType)):
        value = value.__func__
    elif isinstance(value, property):
        value = value.fget
    elif isinstance(value, functools.partial):
        value = value.func
    if not isinstance(value, types.FunctionType):
        return None
    plain = inspect.unwrap(value)
    return plain if isinstance(plain, types.FunctionType) else value


def _read(function: types.FunctionType, owner: Any) -> Iterator[str | tuple[Any, Any]]:
    """Yield what a function reads, and (function, its owner) of what else it names. ``owner`` is its ``self``."""
    code = function.__code__
    known = dict(zip(code.co_freevars, map(_content_of, function.__closure__ or ()), strict=False))
    if owner is not None and code.co_argcount:
        known[code.co_varnames[0]] = owner
    codes = [code]
    while codes:
        inner = codes.pop()
        codes += [its for its in inner.co_consts if isinstance(its, types.CodeType)]
        yield from _follow(inner, function.__globals__, known)


def _content_of(cell: types.CellType) -> Any:
    try:
        return cell.cell_contents
    except ValueError:  # it is empty
        return _NOTHING


def _follow(code: types.CodeType, variables: dict[str, Any], known: dict[str, Any]) -> Iterator[str | tuple[Any, Any]]:
    """Follow names and the attributes of what they mean. ``known`` gets what the code imports."""
    loaded: Any = _NOTHING
    imported: Any = None
    for step in dis.get_instructions(code):
        name = step.argval[-1] if isinstance(step.argval, tuple) and step.argval else step.argval
        owner = None
        if step.opname in _UNCHANGED:
            continue
        if step.opname in ("LOAD_GLOBAL", "LOAD_NAME"):
            loaded = variables.get(name, _NOTHING)
        elif step.opname.startswith(("LOAD_FAST", "LOAD_DEREF", "LOAD_CLASSDEREF")):
            loaded = known.get(name, _NOTHING)
        elif step.opname == "IMPORT_NAME":
            loaded = imported = sys.modules.get(name)
        elif step.opname == "IMPORT_FROM":
            loaded = _attribute_of(imported, name)
        elif step.opname.startswith(("STORE_FAST", "STORE_DEREF", "STORE_NAME")):
            names = step.argval if isinstance(step.argval, tuple) else (step.argval,)
            known |= {} if loaded is _NOTHING else {names[0]: loaded}
            loaded = known.get(name, _NOTHING) if "LOAD" in step.opname else _NOTHING  # two in one, from Python 3.13 on
        elif step.opname in ("LOAD_ATTR", "LOAD_METHOD"):
            if isinstance(loaded, type) and issubclass(loaded, dt.date) and name in _OF_DATES:
                yield f"{loaded.__name__}.{name}()"
            owner = None if isinstance(loaded, (type, types.ModuleType)) else loaded
            loaded = _attribute_of(loaded, name)
        else:
            loaded = _NOTHING
        if (name_of := _FUNCTIONS.get(id(loaded)) or _QUESTIONS.get(id(loaded))) is not None:
            yield name_of
        elif _function_of(loaded) is not None:
            yield loaded, owner


def _attribute_of(value: Any, name: str) -> Any:
    """Return an attribute, without running code of the caller's; ``_NOTHING`` where none is found so."""
    if value is _NOTHING or value is None:
        return _NOTHING
    held = getattr(value, "__dict__", {}) if isinstance(value, (types.ModuleType, nn.Module)) else {}
    if isinstance(value, nn.Module) and name in value._modules:  # noqa: SLF001 -- its own __getattr__ may do anything
        return value._modules[name]  # noqa: SLF001
    if name in held or isinstance(value, types.ModuleType):
        return held.get(name, _NOTHING)
    return inspect.getattr_static(value, name, _NOTHING)
