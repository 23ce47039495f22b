"""What a feature may be, as far as the graph allows: which tensor its ids are in, what fills its lists, how rows are pooled."""

from __future__ import annotations

import itertools
from collections.abc import Collection, Iterator, Sequence

import msgspec
import numpy as np
import torch

from dist_export.contract.graph import Ancestry, Lookup, list_padding_ids, list_transforms
from dist_export.contract.made_up import Lists, MadeUpRows, Trial
from dist_export.contract.operators import LONGEST_LIST
from dist_export.errors import UserError
from dist_export.formats.serving_entries import FeatureEntry, IdsEntry
from dist_export.package.dense_inputs import compute_feature, read_lists, transform_ids
from dist_export.score.block_program import BlockProgram

_MAX_COLUMNS = 64
"""Columns of a tensor of ids that are tried one by one."""


def find_lists(traced: BlockProgram, ids: Sequence[str]) -> list[Lists]:
    """Return the lists of different lengths in the sample: those that the batch tells, and those that its values allow.

    A tensor that may bound several lists is taken to bound those with the most similar name. That is a guess, which trials
    confirm or not.

    ``ids``: the inputs that ids come from.
    """
    tensors = traced.tensors
    found = [
        Lists(jagged.values[0], jagged.lengths, "lengths", jagged.num_keys, jagged.keys)
        for jagged in traced.batch.jagged
    ]
    told = {name for its in found for name in (its.values, its.bounds)}
    flat = [name for name in ids if tensors[name].dim() == 1 and name not in told]
    for bounds, tensor in tensors.items():
        is_whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
        if bounds in told or not is_whole or tensor.dim() != 1 or not tensor.numel():
            continue
        fitting = [
            Lists(values, bounds, kind)
            for values in flat
            if values != bounds
            for kind in _kinds_of_bounds(bounds, tensor, tensors[values].numel(), traced.num_examples)
        ]
        if fitting:
            found.append(max(fitting, key=lambda its: _count_common(its.values, bounds)))
    return found


def _count_common(one: str, other: str) -> int:
    """Return how many characters two names have in common at the beginning."""
    pairs = itertools.takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False))
    return sum(1 for _ in pairs)


def _kinds_of_bounds(name: str, bounds: torch.Tensor, num_ids: int, num_examples: int) -> list[str]:
    """Return what ``bounds`` may hold of so many ids, the likeliest first: that of one list for each example, then by name."""
    numbers: np.ndarray = bounds.detach().cpu().to(torch.int64).numpy()
    if bool((numbers < 0).any()):
        return []
    kinds = ["lengths"] if int(numbers.sum()) == num_ids else []
    if numbers[0] == 0 and bool((np.diff(numbers) >= 0).all()) and numbers[-1] <= num_ids:
        kinds += ["ends"] if numbers[-1] == num_ids and len(numbers) > 1 else []
        kinds += ["offsets"]
    is_one_each = {kind: len(numbers) - (kind == "ends") == num_examples for kind in kinds}
    return sorted(kinds, key=lambda kind: (not is_one_each[kind], kind[:3] not in name))


def list_features(
    lookup: Lookup, block: Ancestry, traced: BlockProgram, lists: Sequence[Lists], dim: int
) -> Iterator[FeatureEntry]:
    """Yield what the ids of a lookup may be: every field is known but ``pooling``."""
    transforms = list_transforms(lookup.ids)
    for ids in _list_ids(lookup, block, traced, lists):
        for padding_id in list_padding_ids(block):
            for steps in transforms:
                yield FeatureEntry(
                    name="", table=lookup.table, dim=dim, ids=ids, padding_id=padding_id, transforms=steps
                )


def _list_ids(lookup: Lookup, block: Ancestry, traced: BlockProgram, lists: Sequence[Lists]) -> Iterator[IdsEntry]:
    """Yield where the ids of a lookup may be, the plainest first."""
    for name in sorted(lookup.ids.inputs & block.inputs):
        tensor = traced.tensors[name]
        if tensor.is_floating_point() or tensor.dtype == torch.bool:
            continue
        if tensor.dim() == 1:
            own = [its for its in lists if its.values == name and its.bounds in block.inputs]
            for its in own:
                yield from _list_runs(its, traced, block)
            if not own:
                yield IdsEntry(values=name)
        elif tensor.dim() == 2:
            yield IdsEntry(values=name)
            if tensor.shape[1] <= _MAX_COLUMNS:
                yield from (IdsEntry(values=name, column=column) for column in range(tensor.shape[1]))
            size = traced.shapes[name]
            for other in sorted(block.inputs):
                if traced.tensors[other].is_floating_point() and traced.shapes[other] == size:
                    yield IdsEntry(values=name, weights=other)


def _list_runs(its: Lists, traced: BlockProgram, block: Ancestry) -> Iterator[IdsEntry]:
    size = traced.shapes[its.values]
    weights = [
        name
        for name in sorted(block.inputs)
        if traced.tensors[name].is_floating_point() and traced.shapes[name] == size
    ]
    for key in range(its.num_keys):
        for name in (None, *weights):
            yield IdsEntry(
                values=its.values,
                lengths=its.bounds if its.kind == "lengths" else msgspec.UNSET,
                offsets=its.bounds if its.kind != "lengths" else msgspec.UNSET,
                has_end=its.kind == "ends",
                key=key,
                num_keys=its.num_keys,
                weights=msgspec.UNSET if name is None else name,
            )


def is_looked_up(feature: FeatureEntry, trial: Trial) -> bool:
    """Whether the ids at the beginning of each list of a feature were looked up in its table. Lists may be cut before that."""
    assert feature.ids is not msgspec.UNSET
    assert feature.transforms is not msgspec.UNSET
    try:
        lists = read_lists(feature.ids, trial.inputs, where="")
    except UserError:
        return False
    if feature.padding_id is not None:
        lists = lists.select(lists.ids != feature.padding_id)
    asked = trial.asked.get(feature.table, set())
    return all(number in asked for number in transform_ids(lists.ids[lists.place_of == 0], feature.transforms).tolist())


def list_poolings(feature: FeatureEntry, traced: BlockProgram, block: Ancestry) -> list[FeatureEntry]:
    """Return the feature with each pooling that its lists allow, in a block."""
    assert feature.ids is not msgspec.UNSET
    ids = feature.ids
    has_lists = ids.lengths is not msgspec.UNSET or ids.offsets is not msgspec.UNSET
    is_padded = traced.tensors[ids.values].dim() == 2 and ids.column is msgspec.UNSET
    if not has_lists and not is_padded:
        return [msgspec.structs.replace(feature, pooling="none")]
    length = traced.shapes[ids.values][1] if is_padded else None
    if isinstance(length, int):
        feature = msgspec.structs.replace(feature, longest=length)
    found = [msgspec.structs.replace(feature, pooling=pooling) for pooling in ("none", "sum", "mean", "max")]
    if has_lists:
        lengths = [number for number in sorted({number for _, number in block.numbers}) if 0 < number < LONGEST_LIST]
        found += [msgspec.structs.replace(found[0], longest=length) for length in lengths]
    return found


def compute(feature: FeatureEntry, trial: Trial, rows: MadeUpRows) -> np.ndarray | None:
    """Return the columns of a feature in a made-up batch; None if its lists do not fit that batch."""
    try:
        find = lambda table, _, ids: rows.rows_of(table, ids, trial.turn)  # noqa: E731
        return compute_feature(feature, trial.inputs, find, where="")
    except UserError:
        return None


def name_feature(feature: FeatureEntry, lists: Sequence[Lists], taken: Collection[str]) -> str:
    """Return a name for a feature: that of its key or tensor. If others have it already, its table is added."""
    ids = feature.ids
    assert ids is not msgspec.UNSET
    own = next((its for its in lists if its.values == ids.values and its.bounds == ids.lengths and its.keys), None)
    name = own.keys[ids.key] if own is not None else ids.values.removesuffix("_values")
    if own is None and ids.num_keys > 1:
        name = f"{name}_{ids.key}"
    if ids.column is not msgspec.UNSET:
        name = f"{name}_{ids.column}"
    names = [name, f"{name}/{feature.table}", f"{name}/{feature.table}/{feature.pooling}"]
    names += [f"{names[-1]}/{number}" for number in range(2, len(taken) + 3)]
    return next(one for one in names if one not in taken)
