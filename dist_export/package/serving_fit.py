"""Whether a serving contract fits the package that it is in, so that it can be carried out."""

from __future__ import annotations

import msgspec
import numpy as np

from dist_export.formats.serving_entries import DenseInputEntry, FeatureEntry, ServingEntry
from dist_export.manifest import Manifest

_INT64 = np.iinfo(np.int64)


def find_misfits(manifest: Manifest, serving: ServingEntry) -> list[str]:
    """Return where the contract does not fit the tables and the dense inputs of its manifest."""
    tables = {table.name: table for table in manifest.tables}
    found = []
    if len({feature.name for feature in serving.features}) != len(serving.features):
        found.append("two features have one name")
    for feature in serving.features:
        found += _find_wrong_ids(feature, manifest)
        table = tables.get(feature.table)
        slot = None if table is None else next((one for one in table.kept if one.name == feature.slot), None)
        if table is None or slot is None:
            found.append(
                f"feature {feature.name!r} is looked up in {feature.table!r}, slot {feature.slot!r}, which is not there"
            )
            continue
        dim = slot.shape[0] if slot.dim is msgspec.UNSET else slot.dim
        if feature.dim != dim:
            found.append(f"feature {feature.name!r} has {feature.dim} columns, its table {feature.table!r} {dim}")
        if feature.default_row != table.default_row:
            found.append(f"feature {feature.name!r} has another default_row than its table {feature.table!r}")
    stated = [] if manifest.dense is None else [entry.name for entry in manifest.dense.inputs]
    names = [entry.name for entry in serving.inputs]
    if names != stated:
        found.append(f"serving.inputs are {names}, the dense inputs are {stated}")
    return found + [text for entry in serving.inputs for text in _find_gaps(entry, serving, manifest)]


def _find_wrong_ids(feature: FeatureEntry, manifest: Manifest) -> list[str]:
    """Return what is wrong with the way from a request to the ids of one feature."""
    told = f"feature {feature.name!r}"
    found = []
    numbers = [] if feature.transforms is msgspec.UNSET else [step.value for step in feature.transforms]
    padding = feature.padding_id
    if any(
        not _INT64.min <= number <= _INT64.max
        for number in [*numbers, *([padding] if isinstance(padding, int) else [])]
    ):
        found.append(f"{told} has a number that is no int64")
    if feature.transforms is not msgspec.UNSET and any(
        not step.value for step in feature.transforms if step.op == "modulo"
    ):
        found.append(f"{told} takes a remainder of 0")
    if feature.ids is msgspec.UNSET:
        return found
    ids = feature.ids
    if not ids.key < ids.num_keys:
        found.append(f"{told} is key {ids.key} of {ids.num_keys}")
    if ids.lengths is not msgspec.UNSET and ids.offsets is not msgspec.UNSET:
        found.append(f"{told} has both lengths and offsets")
    names = (ids.values, ids.lengths, ids.offsets, ids.weights)
    return found + [
        f"{told}: no tensor of a batch is {name!r}"
        for name in names
        if name is not msgspec.UNSET and not _is_tensor(name, manifest)
    ]


def _is_tensor(name: str, manifest: Manifest) -> bool:
    """Whether a batch has this tensor. The inputs of a score program tell; without one nothing does."""
    score = manifest.score
    return score is msgspec.UNSET or name in score.dropped_inputs or any(entry.name == name for entry in score.inputs)


def _find_gaps(entry: DenseInputEntry, serving: ServingEntry, manifest: Manifest) -> list[str]:
    """Return what is wrong with the columns of one dense input."""
    if entry.unknown is not msgspec.UNSET:
        return []
    features = {feature.name: feature for feature in serving.features}
    found, at = [], 0
    for columns in entry.columns:
        if columns.begin != at or columns.end <= columns.begin:
            found.append(f"dense input {entry.name!r}: columns {columns.begin} to {columns.end} follow column {at}")
        at = columns.end
        if (columns.feature is msgspec.UNSET) == (columns.tensor is msgspec.UNSET):
            found.append(f"dense input {entry.name!r}: columns {columns.begin} to {columns.end} have not one origin")
        elif columns.tensor is not msgspec.UNSET and not _is_tensor(columns.tensor, manifest):
            found.append(f"dense input {entry.name!r}: no tensor of a batch is {columns.tensor!r}")
        elif columns.feature is not msgspec.UNSET and columns.feature not in features:
            found.append(f"dense input {entry.name!r}: there is no feature {columns.feature!r}")
        elif columns.feature is not msgspec.UNSET and not features[columns.feature].is_known:
            found.append(f"dense input {entry.name!r}: feature {columns.feature!r} is not known")
        elif (
            columns.feature is not msgspec.UNSET
            and entry.dims > 2
            and features[columns.feature].dim != at - columns.begin
        ):
            found.append(
                f"dense input {entry.name!r}: feature {columns.feature!r} has not {at - columns.begin} columns"
            )
    dense = (
        None if manifest.dense is None else next((one for one in manifest.dense.inputs if one.name == entry.name), None)
    )
    if dense is not None and (dense.dtype != entry.dtype or len(dense.shape) != entry.dims):
        found.append(
            f"dense input {entry.name!r} is {entry.dtype} with {entry.dims} dimensions, dense.inputs says otherwise"
        )
    elif dense is not None and entry.dims > 1 and isinstance(dense.shape[-1], int) and dense.shape[-1] != at:
        found.append(f"dense input {entry.name!r} has {dense.shape[-1]} columns, the contract {at}")
    return found
