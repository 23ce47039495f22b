"""Cut a batch to a number of examples, or repeat its examples: of jagged lists too, through lengths or offsets."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass

import torch

from dist_export.score.inputs import FlatBatch

_BOUNDS = re.compile(r"(.*?)_?(offsets|row_splits|splits|starts|bounds|lengths|length)")
_VALUES = ("values", "ids", "indices", "weights")
_LENGTHS, _OFFSETS, _STARTS = "lengths", "offsets", "starts"
"""What a tensor says of lists: how long each is; where each begins, and the end of the last one; where each begins."""


@dataclass(slots=True)
class _Lists:
    """Lists of different lengths: tensors with one element for each id, and tensors that say which list has which."""

    values: list[str]
    lengths: torch.Tensor
    num_keys: int
    """There are so many lists for each example, key by key."""
    bounds: dict[str, str]
    """Tensor -> what it says of the lists."""


class Resizer:
    """Knows which elements of a batch belong to one example."""

    def __init__(self, batch: FlatBatch, num_examples: int) -> None:
        """``num_examples``: of the batch, as the model's own blocks have it."""
        self.num_examples = num_examples
        self._tensors = batch.tensors
        self._lists = [
            _Lists(list(its.values), batch.tensors[its.lengths], its.num_keys, {its.lengths: _LENGTHS})
            for its in batch.jagged
        ]
        known = self._known()
        rest = {name: tensor for name, tensor in batch.tensors.items() if name not in known and tensor.dim()}
        self._lists += _find_lists(rest, num_examples)
        known = self._known()
        self.unknown = [name for name, its in rest.items() if name not in known and its.shape[0] != num_examples]
        """Tensors whose elements belong to no known example."""
        for its in self._lists:
            if its.lengths.shape[0] != num_examples * its.num_keys:
                self.unknown += its.bounds

    def resize(self, num_examples: int) -> dict[str, torch.Tensor]:
        """Return the tensors for so many examples: the first ones, and from the beginning again where there are fewer."""
        assert not self.unknown
        chosen = torch.arange(num_examples) % self.num_examples
        done: dict[str, torch.Tensor] = {}
        for lists in self._lists:
            done |= _choose(self._tensors, lists, chosen)
        return {
            name: done[name] if name in done else tensor[chosen.to(tensor.device)] if tensor.dim() else tensor
            for name, tensor in self._tensors.items()
        }

    def first_sizes(self) -> dict[str, str]:
        """Return the first sizes of the tensors that follow from the number of examples, in terms of ``batch``."""
        words = {name: "batch" for name, tensor in self._tensors.items() if tensor.dim()}
        for lists in self._lists:
            words = {name: word for name, word in words.items() if name not in lists.values}
            for name, kind in lists.bounds.items():
                words[name] = f"{lists.num_keys}*batch" if lists.num_keys > 1 else "batch"
                words[name] += " + 1" if kind == _OFFSETS else ""
        return words

    def _known(self) -> set[str]:
        return {name for its in self._lists for name in (*its.values, *its.bounds)}


def _choose(tensors: Mapping[str, torch.Tensor], lists: _Lists, chosen: torch.Tensor) -> dict[str, torch.Tensor]:
    lengths = lists.lengths
    begins = lengths.cumsum(0) - lengths
    per_key = lengths.shape[0] // lists.num_keys
    positions = (torch.arange(lists.num_keys)[:, None] * per_key + chosen[None]).reshape(-1).to(lengths.device)
    new = lengths[positions]
    ends = new.cumsum(0)
    elements = torch.arange(int(new.sum()), device=lengths.device)
    elements = elements + torch.repeat_interleave(begins[positions] - (ends - new), new)
    forms = {_LENGTHS: new, _OFFSETS: torch.cat([ends.new_zeros(1), ends]), _STARTS: ends - new}
    found = {name: tensors[name][elements] for name in lists.values}
    return found | {name: forms[kind].to(tensors[name].dtype) for name, kind in lists.bounds.items()}


def _find_lists(tensors: Mapping[str, torch.Tensor], num_examples: int) -> list[_Lists]:
    """Find which tensor says how the elements of which others belong to examples: by names, else where only one fits."""
    readings = {name: _read_bounds(name, tensor, num_examples) for name, tensor in tensors.items()}
    found: list[_Lists] = []
    taken: set[str] = set()

    def add(bounds: str, values: list[str]) -> None:
        kind = readings[bounds][0]
        found.append(_Lists(values, _lengths_of(tensors[bounds], kind, tensors[values[0]].shape[0]), 1, {bounds: kind}))
        taken.update([bounds, *values])

    for name, (kind, total) in readings.items():
        match = _BOUNDS.fullmatch(name)
        if not kind or match is None:
            continue
        names = [match[1], *(f"{match[1]}_{end}".lstrip("_") for end in _VALUES)]
        its = [one for one in names if one in tensors and one not in (name, *taken)]
        if its and all(
            _has_total(tensors[one], total, kind) and len(tensors[one]) == len(tensors[its[0]]) for one in its
        ):
            add(name, its)
    for other, tensor in tensors.items():
        if other in taken or tensor.shape[0] == num_examples or readings[other][0] == _OFFSETS:
            continue
        fitting = [
            name for name, (kind, total) in readings.items() if kind and kind != _STARTS and total == len(tensor)
        ]
        fitting = [name for name in fitting if name not in taken]
        if len(fitting) == 1:
            add(fitting[0], [other])
    for name, (kind, _) in readings.items():  # a second tensor that says the same of the same lists
        for lists in found if kind and name not in taken else ():
            lengths = _lengths_of(tensors[name], kind, int(lists.lengths.sum()))
            if torch.equal(lengths, lists.lengths.to(lengths.dtype)):
                lists.bounds[name] = kind
                taken.add(name)
                break
    return found


def _has_total(tensor: torch.Tensor, total: int, kind: str) -> bool:
    return tensor.shape[0] >= total if kind == _STARTS else tensor.shape[0] == total


def _lengths_of(bounds: torch.Tensor, kind: str, num_elements: int) -> torch.Tensor:
    if kind == _LENGTHS:
        return bounds
    return (bounds if kind == _OFFSETS else torch.cat([bounds, bounds.new_full((1,), num_elements)])).diff()


def _read_bounds(name: str, tensor: torch.Tensor, num_examples: int) -> tuple[str, int]:
    """Return what a tensor may say of lists, and of how many elements it speaks; an empty text for others."""
    is_whole = tensor.dim() == 1 and tensor.dtype in (torch.int32, torch.int64)
    if not is_whole or not tensor.shape[0]:
        return "", 0
    is_rising = not int(tensor[0]) and bool((tensor.diff() >= 0).all())
    if tensor.shape[0] == num_examples + 1 and is_rising:
        return _OFFSETS, int(tensor[-1])
    if tensor.shape[0] == num_examples and is_rising and name.endswith(("offsets", "starts")):
        return _STARTS, int(tensor[-1])
    if tensor.shape[0] == num_examples and bool((tensor >= 0).all()):
        return _LENGTHS, int(tensor.sum())
    return "", 0
