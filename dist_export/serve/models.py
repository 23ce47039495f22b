"""The models that a package serves: ``score``, ``dense`` and ``lookup``. Arrays in, arrays out."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Protocol

import msgspec
import numpy as np

from dist_export.errors import UserError
from dist_export.formats.dtypes import CODE_BY_TORCH, DTYPES
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.manifest import TableEntry, TensorEntry
from dist_export.package.reader import Package
from dist_export.serve.tensors import DATATYPES, datatype_of

FOUND = ".found"
"""Behind the name of a table: the output of ``lookup`` that says which ids have a row."""
_MAX_ROW_BYTES = 1 << 30
"""The most bytes of rows that one request may look up."""


class Model(Protocol):
    """One model of a package. Any thread."""

    name: str
    inputs: tuple[TensorEntry, ...]
    outputs: tuple[TensorEntry, ...]

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of a batch by name. UserError if the inputs are not those of the model."""


def list_models(package: Package) -> dict[str, Model]:
    """Return the models of a package by name. Programs are loaded now."""
    manifest = package.manifest
    models: list[Model] = []
    if manifest.score is not msgspec.UNSET:
        models.append(ScoreModel(package))
    if manifest.dense is not None:
        models.append(DenseModel(package))
    if manifest.tables:
        models.append(LookupModel(package))
    return {model.name: model for model in models}


class ScoreModel:
    """From ids to scores."""

    name = "score"

    def __init__(self, package: Package) -> None:
        entry, dense = package.manifest.score, package.manifest.dense
        assert entry is not msgspec.UNSET
        self.inputs, self.outputs = entry.inputs, entry.outputs
        self._max_batch_size = None if dense is None else dense.max_batch_size
        from dist_export.package.score import Scorer  # it imports torch

        self._package = package  # the scorer does not keep it open
        self._scorer = Scorer(package)

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the scores."""
        check_inputs(self.name, self.inputs, inputs, max_batch_size=self._max_batch_size)
        return self._scorer.score(inputs)


class DenseModel:
    """The dense arch: from its blocks to scores."""

    name = "dense"

    def __init__(self, package: Package) -> None:
        entry = package.manifest.dense
        assert entry is not None
        self.inputs, self.outputs = entry.inputs, entry.outputs
        self._max_batch_size = entry.max_batch_size
        self._module = package.load_program().module()

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return the outputs of the dense arch."""
        import torch

        check_inputs(self.name, self.inputs, inputs, max_batch_size=self._max_batch_size)
        given = {
            entry.name: torch.from_numpy(np.array(inputs[entry.name])).to(getattr(torch, entry.dtype))
            for entry in self.inputs
        }
        try:
            with torch.no_grad():
                found = self._module(**given)
        except (RuntimeError, AssertionError) as error:
            shapes = ", ".join(f"{name} {list(tensor.shape)}" for name, tensor in given.items())
            raise UserError(f"the dense program refuses inputs of these shapes: {shapes}") from error
        values = [found] if isinstance(found, torch.Tensor) else list(found)
        return {entry.name: _to_numpy(value) for entry, value in zip(self.outputs, values, strict=True)}


class LookupModel:
    """Rows of tables. Each table is an optional input of ids, and an output of rows beside one of what was found."""

    name = "lookup"

    def __init__(self, package: Package) -> None:
        self._package = package
        self._tables = {table.name: _embedding_of(table) for table in package.manifest.tables}
        self.inputs = tuple(TensorEntry(name=name, dtype="int64", shape=("ids",)) for name in self._tables)
        self.outputs = tuple(
            entry
            for name, (dtype, dim) in self._tables.items()
            for entry in (
                TensorEntry(name=name, dtype=dtype, shape=("ids", dim)),
                TensorEntry(name=f"{name}{FOUND}", dtype="bool", shape=("ids",)),
            )
        )

    def infer(self, inputs: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
        """Return rows, and which ids have one, for each table that is asked for."""
        outputs = {}
        known = {entry.name: entry for entry in self.inputs}
        if not inputs:
            raise UserError(f"the request has no input; model lookup takes ids by table: {', '.join(known)}")
        for name, ids in inputs.items():
            if name not in known:
                raise UserError(f"model lookup has no input {name!r}; it takes ids by table: {', '.join(known)}")
            _check_tensor(self.name, known[name], ids)
            if name.endswith(FOUND) and name.removesuffix(FOUND) in inputs:
                raise UserError(
                    f"output {name!r} would be the rows of a table, and also which ids of {name.removesuffix(FOUND)!r} have "
                    "one; ask for the two tables in two requests"
                )
            if ids.size * self._tables[name][1] * 4 > _MAX_ROW_BYTES:
                raise UserError(
                    f"input {name!r} has {ids.size:,} ids, whose rows have more than {_MAX_ROW_BYTES:,} bytes"
                )
            outputs[name], outputs[f"{name}{FOUND}"] = self._package.lookup(name, ids)
        return outputs


def _embedding_of(table: TableEntry) -> tuple[str, int]:
    """Return the dtype and the dimension of the rows that a lookup gives."""
    slot = next(slot for slot in table.kept if slot.name == EMBEDDING_SLOT)
    if slot.encoding is not msgspec.UNSET or slot.dtype == "bfloat16":
        return "float32", math.prod(slot.shape) if slot.dim is msgspec.UNSET else int(slot.dim)
    return DTYPES[CODE_BY_TORCH[slot.dtype]].torch, math.prod(slot.shape)


def check_inputs(
    model: str, entries: Sequence[TensorEntry], given: Mapping[str, np.ndarray], *, max_batch_size: int | None
) -> None:
    """Refuse inputs that are not those of a model. UserError says what was expected and what was found."""
    known = {entry.name for entry in entries}
    names = ", ".join(entry.name for entry in entries)
    unknown = [name for name in given if name not in known]
    if unknown:
        raise UserError(f"model {model} has no input {unknown[0]!r}; it takes {names}")
    sizes: dict[str, tuple[str, int]] = {}
    for entry in entries:
        if entry.name not in given:
            raise UserError(f"input {entry.name!r} is missing; model {model} takes {names}")
        value = given[entry.name]
        _check_tensor(model, entry, value)
        for stated, size in zip(entry.shape, value.shape, strict=True):
            if not isinstance(stated, str) or not stated.isidentifier():
                continue
            other, known_size = sizes.setdefault(stated, (entry.name, size))
            if size != known_size:
                raise UserError(
                    f"input {entry.name!r} has {size:,} of {stated!r}, and input {other!r} has {known_size:,}; they must be equal"
                )
    batch = sizes.get("batch", ("", 0))[1]
    if max_batch_size is not None and batch > max_batch_size:
        raise UserError(
            f"the batch has {batch:,} examples, and the largest that model {model} takes is {max_batch_size:,}"
        )


def _check_tensor(model: str, entry: TensorEntry, value: np.ndarray) -> None:
    expected = datatype_of(entry.dtype)
    found = next((name for name, dtype in DATATYPES.items() if dtype == value.dtype), str(value.dtype))
    if found != expected:
        raise UserError(f"input {entry.name!r} of model {model} is {found}, expected {expected}")
    fits = value.ndim == len(entry.shape) and all(
        size == stated for size, stated in zip(value.shape, entry.shape, strict=False) if isinstance(stated, int)
    )
    if not fits:
        stated = ", ".join(map(str, entry.shape))
        raise UserError(f"input {entry.name!r} of model {model} has the shape {list(value.shape)}, expected [{stated}]")


def _to_numpy(value: Any) -> np.ndarray:
    import torch

    value = value.detach().cpu()
    array: np.ndarray = (value.float() if value.dtype == torch.bfloat16 else value).numpy()
    return array
