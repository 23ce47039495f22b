"""The batch as flat tensors with names, and back: the score program takes keyword tensors, the model takes its batch.

A tensor is named by the keys that lead to it, joined by ``_``. A ``KeyedJaggedTensor`` gives ``<name>_values``,
``<name>_lengths`` and, if it has any, ``<name>_weights``. Everything else in a batch is a constant of the program.
"""

from __future__ import annotations

import copy
import dataclasses
import datetime as dt
import decimal
import reprlib
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import nn

from dist_export.dense.blocks import NUMBERS_AND_TEXTS, WITHOUT_VALUES
from dist_export.dense.sample import is_argument_name
from dist_export.score.table_weight import NotExportableError

_ROOT = "input"
"""Begins the names of a batch that is no mapping."""
_NAMED = (*NUMBERS_AND_TEXTS, dt.date, dt.time, dt.timedelta, decimal.Decimal)
"""Constants that a note names."""
_Build = Callable[[Mapping[str, torch.Tensor]], Any]


@dataclass(frozen=True, slots=True)
class Jagged:
    """Lists of different lengths: tensors with one element for each id, and how many of these each list has."""

    values: tuple[str, ...]
    lengths: str
    num_keys: int
    """``lengths`` has so many lists for each example, key by key."""
    keys: tuple[str, ...] = ()
    """The names of the keys, if there are any."""


@dataclass(frozen=True, slots=True)
class FlatBatch:
    """One batch as flat tensors. :func:`flatten_batch` makes it."""

    tensors: dict[str, torch.Tensor]
    """In the order of the batch."""
    jagged: tuple[Jagged, ...]
    """Lists whose pairing the batch itself tells."""
    constants: dict[str, str]
    """Numbers and strings in the batch: place -> how Python writes the value, shortened."""
    _build: _Build

    def rebuild(self, tensors: Mapping[str, torch.Tensor]) -> Any:
        """Return a new batch of the same form with these tensors in it."""
        return self._build(tensors)


def flatten_batch(data: Any) -> FlatBatch:
    """Return the batch as flat tensors.

    Raises:
        NotExportableError: it holds something whose values would become constants, or a name that no argument can have.
    """
    reader = _Reader()
    build = reader.read(data, () if isinstance(data, Mapping) else (_ROOT,))
    if not reader.tensors:
        raise NotExportableError(f"the batch is a {type(data).__name__} without a tensor")
    return FlatBatch(reader.tensors, tuple(reader.jagged), reader.constants, build)


class _Reader:
    """Goes through a batch, and names the tensors in it."""

    def __init__(self) -> None:
        self.tensors: dict[str, torch.Tensor] = {}
        self.jagged: list[Jagged] = []
        self.constants: dict[str, str] = {}

    def read(self, value: Any, path: tuple[Any, ...]) -> _Build:
        if isinstance(value, torch.Tensor):
            return self._leaf(value, path)
        if isinstance(value, np.ndarray):
            raise NotExportableError(f"{_say(path)} of the batch is a numpy array; give a tensor")
        if _is_jagged(value):
            return self._read_jagged(value, path)
        if isinstance(value, Mapping):
            items = [(key, self.read(item, (*path, key))) for key, item in value.items()]
            return lambda tensors: _fill_mapping(value, [(key, build(tensors)) for key, build in items])
        if type(value) in (list, tuple) or (isinstance(value, tuple) and hasattr(value, "_fields")):
            builds = [self.read(item, (*path, place)) for place, item in enumerate(value)]
            kind: Callable[[Any], Any] = type(value)._make if hasattr(value, "_fields") else type(value)
            return lambda tensors: kind([build(tensors) for build in builds])
        if _is_object(value):
            return self._read_object(value, path)
        if isinstance(value, _NAMED):
            self.constants[_say(path)] = reprlib.repr(value)
        elif not isinstance(value, WITHOUT_VALUES) and not callable(value):
            raise NotExportableError(
                f"{_say(path)} of the batch is a {type(value).__name__}, whose values would be constants of the program; give "
                "tensors, in dicts, lists, tuples or dataclasses"
            )
        return lambda _: value

    def _leaf(self, value: torch.Tensor, path: tuple[Any, ...]) -> _Build:
        name = "_".join(map(str, path))
        if value.layout != torch.strided or value.is_nested:
            raise NotExportableError(f"{_say(path)} of the batch is a sparse or nested tensor")
        if not is_argument_name(name):
            raise NotExportableError(
                f"{_say(path)} of the batch cannot be an argument named {name!r}: a name is a Python identifier, no keyword, and "
                "none that torch's generated code uses"
            )
        if name in self.tensors:
            raise NotExportableError(f"two tensors of the batch would be named {name!r}")
        self.tensors[name] = value.detach()
        return lambda tensors: tensors[name]

    def _read_jagged(self, value: Any, path: tuple[Any, ...]) -> _Build:
        kind, keys = type(value), list(value.keys()) if callable(getattr(value, "keys", None)) else None
        if keys is not None and getattr(value, "variable_stride_per_key", bool)():
            raise NotExportableError(f"{_say(path)} of the batch has another batch size for each key")
        parts = {"values": value.values(), "lengths": value.lengths()}
        weights = value.weights_or_none()
        parts |= {} if weights is None else {"weights": weights}
        builds = {part: self._leaf(tensor, (*path, part)) for part, tensor in parts.items()}
        name = "_".join(map(str, path))
        values = tuple(f"{name}_{part}" for part in parts if part != "lengths")
        named = () if keys is None else tuple(map(str, keys))
        self.jagged.append(Jagged(values, f"{name}_lengths", max(1, len(named)), named))
        own = {} if keys is None else {"keys": keys}
        return lambda tensors: kind(**own, **{part: build(tensors) for part, build in builds.items()})

    def _read_object(self, value: Any, path: tuple[Any, ...]) -> _Build:
        names = (
            [field.name for field in dataclasses.fields(value)]
            if dataclasses.is_dataclass(value)
            else list(vars(value))
        )
        builds = [
            (name, self.read(getattr(value, name), (*path, name.lstrip("_")))) for name in names if hasattr(value, name)
        ]

        def build(tensors: Mapping[str, torch.Tensor]) -> Any:
            copied = copy.copy(value)
            for name, its in builds:
                object.__setattr__(copied, name, its(tensors))  # past the __setattr__ of a frozen dataclass
            return copied

        return build


def _is_jagged(value: Any) -> bool:
    """Whether ``value`` is torchrec's JaggedTensor or KeyedJaggedTensor, or looks like one."""
    return not isinstance(value, (Mapping, type, nn.Module)) and all(
        callable(getattr(value, name, None)) for name in ("values", "lengths", "offsets", "weights_or_none")
    )


def _is_object(value: Any) -> bool:
    if isinstance(value, (type, nn.Module)):
        return False
    return dataclasses.is_dataclass(value) or (
        callable(getattr(type(value), "to", None)) and hasattr(value, "__dict__")
    )


def _fill_mapping(template: Any, items: list[tuple[Any, Any]]) -> Any:
    if type(template) is dict:
        return dict(items)
    copied = copy.copy(template)
    for key, value in items:
        copied[key] = value
    return copied


def _say(path: tuple[Any, ...]) -> str:
    return repr(path[0]) + "".join(f"[{key!r}]" for key in path[1:]) if path else "the root"
