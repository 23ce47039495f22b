"""Carry out the serving contract with numpy: from the ids of a batch to the inputs of the dense program. Imports no torch."""

from __future__ import annotations

import math
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Protocol

import msgspec
import numpy as np

from dist_export.errors import PackageError, UserError
from dist_export.formats.serving_entries import (
    DenseInputEntry,
    FeatureEntry,
    IdsEntry,
    ServingEntry,
    TransformEntry,
)
from dist_export.manifest import Manifest
from dist_export.package.serving_fit import find_misfits
from dist_export.storage.directory import Directory

FindRows = Callable[[str, str, np.ndarray], np.ndarray]
"""(table, slot, ids as int64 (n,)) -> rows (n, dim), with the default row for out-of-vocabulary ids."""
Arrays = Mapping[str, np.ndarray]


@dataclass(frozen=True, slots=True)
class IdLists:
    """The ids of one feature in a batch, list by list."""

    ids: np.ndarray
    """int64, (n,)."""
    example_of: np.ndarray
    """The example of each id, (n,); ascending."""
    place_of: np.ndarray
    """The place of each id in its list, (n,)."""
    num_examples: int
    length: int | None
    """The length of all lists where they are rows of a padded tensor; None where lists differ, or each is one id."""
    weights: np.ndarray | None = None
    """The factor of each id, (n,)."""
    is_one: bool = False
    """Whether each example has one id, which is no list."""
    num_behind: int = 0
    """Ids behind the end of the last list, which are in none."""

    def select(self, chosen: np.ndarray) -> IdLists:
        """Return the lists with those ids alone for which ``chosen`` is true. Their places stay."""
        weights = None if self.weights is None else self.weights[chosen]
        its = self.ids[chosen], self.example_of[chosen], self.place_of[chosen]
        return IdLists(*its, self.num_examples, self.length, weights, self.is_one)


def build_dense_inputs(
    serving: ServingEntry, inputs: Arrays, find_rows: FindRows, *, where: str
) -> dict[str, np.ndarray]:
    """Return those inputs of the dense program that the contract knows, by name. What is bfloat16 there is float32 here.

    Args:
        serving: the contract.
        inputs: the tensors of the request.
        find_rows: gives the rows of a table.
        where: the package, for messages.

    Raises:
        UserError: a tensor is missing, or its shape is not as the contract has it.
    """
    features = {feature.name: feature for feature in serving.features}
    computed: dict[str, np.ndarray] = {}
    found = {}
    for entry in serving.inputs:
        if entry.unknown is not msgspec.UNSET:
            continue
        found[entry.name] = _build_input(entry, features, computed, inputs, find_rows, where)
    return found


def _build_input(
    entry: DenseInputEntry,
    features: Mapping[str, FeatureEntry],
    computed: dict[str, np.ndarray],
    inputs: Arrays,
    find_rows: FindRows,
    where: str,
) -> np.ndarray:
    pieces = []
    for columns in entry.columns:
        if columns.feature is not msgspec.UNSET:
            name = columns.feature
            if name not in computed:
                computed[name] = compute_feature(features[name], inputs, find_rows, where=where)
            values = computed[name]
        else:
            assert columns.tensor is not msgspec.UNSET
            values = take(inputs, columns.tensor, where)
            values = values[:, None] if values.ndim == 1 else values
            last = columns.first + columns.end - columns.begin
            if values.ndim != max(2, entry.dims) or values.shape[-1] < last:
                raise UserError(
                    f"{where}: {columns.tensor!r} has shape {list(values.shape)}; {last} columns are needed"
                )
            values = values[..., columns.first : last]
        width = math.prod(values.shape[1:])  # -1 is ambiguous for a batch without examples
        pieces.append(values.reshape(len(values), width) if entry.dims <= 2 else values)
    if len({len(piece) for piece in pieces}) > 1:
        raise UserError(
            f"{where}: the tensors of {entry.name!r} have different numbers of examples: {[len(piece) for piece in pieces]}"
        )
    joined = pieces[0] if len(pieces) == 1 else np.concatenate(pieces, axis=-1)
    dtype = _NUMPY_NAMES.get(entry.dtype, entry.dtype)
    return (joined.reshape(-1) if entry.dims == 1 else joined).astype(dtype, copy=False)


_NUMPY_NAMES = {"bfloat16": "float32"}
"""numpy lacks bfloat16; the values are the same in float32 until they are rounded."""


def compute_feature(feature: FeatureEntry, inputs: Arrays, find_rows: FindRows, *, where: str) -> np.ndarray:
    """Return the columns of one feature that is known: (batch, dim), or (batch, longest, dim) where rows stay a list.

    Raises:
        UserError: as :func:`build_dense_inputs`.
    """
    assert feature.ids is not msgspec.UNSET
    assert feature.transforms is not msgspec.UNSET
    lists = read_lists(feature.ids, inputs, where=where)
    if lists.length is not None and lists.length < feature.shortest:
        raise UserError(
            f"{where}: {feature.ids.values!r} has {lists.length} columns; the model has no value for fewer than "
            f"{feature.shortest}"
        )
    has_padding = feature.padding_id is not None and feature.padding_id is not msgspec.UNSET
    if lists.num_behind and (has_padding or feature.pooling in ("mean", "max")):
        raise UserError(
            f"{where}: {feature.ids.values!r} has {lists.num_behind:,} ids behind its last list; models make several things of "
            f"such ids where they pool by {feature.pooling}. Leave them out"
        )
    if has_padding:
        lists = lists.select(lists.ids != feature.padding_id)
    rows = find_rows(feature.table, feature.slot, transform_ids(lists.ids, feature.transforms))
    if rows.dtype == np.float16:  # models pool what they look up in their own dtype, whatever dtype rows were cast to
        rows = rows.astype(np.float32)
    if lists.weights is not None:
        rows = rows * lists.weights[:, None].astype(rows.dtype)
    longest = None if feature.longest is msgspec.UNSET else feature.longest
    return pool_rows(rows, lists, str(feature.pooling), longest=longest)


def transform_ids(ids: np.ndarray, transforms: Sequence[TransformEntry]) -> np.ndarray:
    """Return the ids that are looked up, int64. Sums wrap around, as they do in the model."""
    for step in transforms:
        value = np.int64(step.value)
        if step.op == "modulo":
            ids = np.remainder(ids, value)
        elif step.op == "mask":
            ids = ids & value
        elif step.op == "add":
            ids = ids + value
        else:
            ids = np.where(ids < 0, ids + value, ids)
    return ids


def read_lists(entry: IdsEntry, inputs: Arrays, *, where: str) -> IdLists:
    """Return the ids of a feature, list by list.

    Raises:
        UserError: a tensor is missing, ids are not integers, or lengths or offsets do not fit the ids.
    """
    values = take(inputs, entry.values, where)
    if values.dtype.kind not in "iu":
        raise UserError(f"{where}: ids are integers, {entry.values!r} is {values.dtype}")
    values = values.astype(np.int64)
    if entry.lengths is msgspec.UNSET and entry.offsets is msgspec.UNSET:
        return _read_padded(entry, inputs, values, where)
    bounds, num_behind = _read_bounds(entry, inputs, values, where)
    lengths = np.diff(bounds)
    example_of = np.repeat(np.arange(len(lengths)), lengths)
    place_of = np.arange(bounds[0], bounds[-1]) - np.repeat(bounds[:-1], lengths)
    its = slice(int(bounds[0]), int(bounds[-1]))
    weights = None if entry.weights is msgspec.UNSET else take(inputs, entry.weights, where).reshape(-1)[its]
    if weights is not None and len(weights) != len(example_of):
        raise UserError(f"{where}: {entry.weights!r} has not one value for each id of {entry.values!r}")
    ids = values.reshape(-1)[its]
    return IdLists(ids, example_of, place_of, len(lengths), None, weights, num_behind=num_behind)


def _read_padded(entry: IdsEntry, inputs: Arrays, values: np.ndarray, where: str) -> IdLists:
    if values.ndim not in (1, 2):
        raise UserError(
            f"{where}: {entry.values!r} has shape {list(values.shape)}; ids are (batch,) or (batch, length)"
        )
    weights = None if entry.weights is msgspec.UNSET else take(inputs, entry.weights, where)
    if weights is not None and weights.shape != values.shape:
        raise UserError(f"{where}: {entry.weights!r} has not one value for each id of {entry.values!r}")
    if entry.column is not msgspec.UNSET and values.ndim == 2:
        if entry.column >= values.shape[1]:
            raise UserError(f"{where}: {entry.values!r} has shape {list(values.shape)}, so no column {entry.column}")
        values = values[:, entry.column]
        weights = None if weights is None else weights[:, entry.column]
    length = values.shape[1] if values.ndim == 2 else None
    examples, steps = np.divmod(np.arange(values.size), length or 1)
    flat = None if weights is None else weights.reshape(-1)
    return IdLists(values.reshape(-1), examples, steps, len(values), length, flat, is_one=length is None)


def _read_bounds(entry: IdsEntry, inputs: Arrays, values: np.ndarray, where: str) -> tuple[np.ndarray, int]:
    """Return where each list of the feature begins and the last one ends, and how many ids are in no list."""
    if entry.lengths is not msgspec.UNSET:
        name = entry.lengths
        lengths = _whole(inputs, name, where)
        bounds = np.concatenate([np.zeros(1, np.int64), np.cumsum(lengths)])
    else:
        assert entry.offsets is not msgspec.UNSET
        name = entry.offsets
        bounds = _whole(inputs, name, where)
        bounds = bounds if entry.has_end else np.append(bounds, values.size)
    num_lists, rest = divmod(len(bounds) - 1, entry.num_keys)
    if rest or not len(bounds) or bounds[0] or bounds[-1] > values.size or np.any(np.diff(bounds) < 0):
        raise UserError(f"{where}: {name!r} does not fit the {values.size:,} ids of {entry.values!r}")
    return bounds[entry.key * num_lists : (entry.key + 1) * num_lists + 1], int(values.size - bounds[-1])


def _whole(inputs: Arrays, name: str, where: str) -> np.ndarray:
    """Return lengths or offsets as int64, (n,). UserError if they are no integers."""
    values = take(inputs, name, where)
    if values.dtype.kind not in "iu" and values.size:
        raise UserError(f"{where}: {name!r} is {values.dtype}; lengths and offsets are integers")
    return values.reshape(-1).astype(np.int64)


def pool_rows(rows: np.ndarray, lists: IdLists, pooling: str, *, longest: int | None = None) -> np.ndarray:
    """Return one row for each example, (batch, dim), or the rows as a list, (batch, longest, dim). Empty lists give zeros.

    ``longest``: to how many rows lists of different lengths are filled up or cut, if they stay lists; None takes the longest.
    """
    dim = rows.shape[-1]
    if pooling == "none":
        if lists.is_one:
            found = np.zeros((lists.num_examples, dim), rows.dtype)
            found[lists.example_of] = rows
            return found
        if lists.length is not None:
            longest = lists.length
        elif longest is None:
            longest = int(lists.place_of.max(initial=-1)) + 1
        found = np.zeros((lists.num_examples, longest, dim), rows.dtype)
        fits = lists.place_of < longest
        found[lists.example_of[fits], lists.place_of[fits]] = rows[fits]
        return found
    found = np.zeros((lists.num_examples, dim), rows.dtype)
    if not len(rows):
        return found
    counts = np.bincount(lists.example_of, minlength=lists.num_examples)
    is_there = counts > 0
    begins = (np.cumsum(counts) - counts)[is_there]
    reduce = np.maximum.reduceat if pooling == "max" else np.add.reduceat
    found[is_there] = reduce(rows, begins, axis=0)
    if pooling == "mean":
        found[is_there] /= counts[is_there, None].astype(rows.dtype)
    return found


def take(inputs: Arrays, name: str, where: str) -> np.ndarray:
    """Return a tensor of the request. UserError if it is missing."""
    if name not in inputs:
        raise UserError(f"{where}: {name!r} is missing; the request has {', '.join(sorted(inputs)) or 'no tensor'}")
    return np.asarray(inputs[name])


_FITTING: weakref.WeakSet[Any] = weakref.WeakSet()
"""Open packages whose contract was found to fit."""


class LookedUp(Protocol):
    """What is asked of an open :class:`~dist_export.package.reader.Package`."""

    directory: Directory
    manifest: Manifest

    def lookup(self, table: str, ids: Any, *, slot: str = ..., raw: bool = ...) -> tuple[np.ndarray, np.ndarray]:
        """Return the rows of ids, and whether each has one."""


def dense_inputs_of(package: LookedUp, inputs: Mapping[str, Any]) -> dict[str, np.ndarray]:
    """Return the inputs of the dense program of a package, as :meth:`Package.build_dense_inputs` does."""
    serving, where = package.manifest.serving, package.directory.url
    if serving is msgspec.UNSET:
        raise PackageError(f"{where}: the package has no serving contract; export it with serving: auto")
    if package not in _FITTING:
        if misfits := find_misfits(package.manifest, serving):
            raise PackageError(f"{where}: the serving contract cannot be carried out: {misfits[0]}")
        _FITTING.add(package)
    for entry in serving.inputs:
        if entry.unknown is not msgspec.UNSET:
            raise PackageError(
                f"{where}: the serving contract does not know dense input {entry.name!r}: {entry.unknown}"
            )
    arrays = {name: _as_array(name, value, where) for name, value in inputs.items()}
    found = build_dense_inputs(
        serving, arrays, lambda table, slot, ids: package.lookup(table, ids, slot=slot)[0], where=where
    )
    sizes = {name: len(values) for name, values in found.items()}
    if len(set(sizes.values())) > 1:
        raise UserError(f"{where}: the tensors have different numbers of examples: {sizes}")
    return found


def _as_array(name: str, value: Any, where: str) -> np.ndarray:
    """Return numbers as an array. UserError for anything else."""
    try:
        array = np.asarray(value)
    except ValueError as error:
        raise UserError(f"{where}: {name!r} is no array of numbers: {error}") from None
    if array.dtype.kind not in "biuf":
        raise UserError(f"{where}: {name!r} is {array.dtype}; give whole numbers or floats")
    return array
