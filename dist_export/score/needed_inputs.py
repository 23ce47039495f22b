"""Which inputs the score program needs, and which of their sizes are free."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from dist_export.archive.traced_sizes import input_shapes, is_free_from_zero, list_conditions, names_in
from dist_export.dense.used_inputs import find_used_inputs

_SYMBOL = re.compile(r"[a-z]+\d+")


def free_dims(tensor: torch.Tensor, *, all_free: bool = False) -> dict[int, Any]:
    """Return which dimensions are free: the first one; and of whole numbers, which may be padded lists of ids, all."""
    is_whole = not (tensor.is_floating_point() or tensor.is_complex() or tensor.dtype == torch.bool)
    return dict.fromkeys(range(tensor.dim() if is_whole or all_free else min(1, tensor.dim())), Dim.AUTO)


def find_needed(
    program: ExportedProgram,
    tensors: Mapping[str, torch.Tensor],
    names: Sequence[str],
    *,
    all_free: Sequence[str] = (),
    from_zero: bool = True,
) -> list[str]:
    """Return the inputs that the program cannot do without, in call order.

    Those are the inputs whose values reach an output; and the inputs with a size that no such input has, if it reaches an
    output or the model's code compares it with something.
    """
    shapes = input_shapes(program, names)
    labels = {name: {dim: str(size) for dim, size in enumerate(shapes[name])} for name in names}
    numbers = {str(size): str(size) for shape in shapes.values() for size in shape if isinstance(size, int)}
    by_value = set(find_used_inputs(program, {}))
    by_size = set(find_used_inputs(program, labels)) - by_value
    known = set(numbers) | {label for name in by_value for label in labels[name].values()}
    compared = {
        symbol for text in list_conditions(program, names, from_zero=from_zero) for symbol in _SYMBOL.findall(text)
    }
    needed = set(by_value)
    for name in names:
        new = {dim for dim, label in labels[name].items() if label not in known}
        free = free_dims(tensors[name], all_free=name in all_free)
        is_fixed = any(isinstance(shapes[name][dim], int) for dim in free)
        is_fixed = is_fixed and can_be_free(tensors[name], from_zero=from_zero)
        if name in by_value or not (is_fixed or (new and (name in by_size or compared & _symbols(shapes[name], new)))):
            continue
        needed.add(name)
        known |= set(labels[name].values())
    return [name for name in names if name in needed]


def _symbols(shape: Sequence[Any], dims: Iterable[int]) -> set[str]:
    return {symbol for dim in dims for symbol in _SYMBOL.findall(str(shape[dim]))}


def can_be_free(tensor: torch.Tensor, *, from_zero: bool = True) -> bool:
    """Whether this torch lets each size of the tensor be free."""
    return is_free_from_zero(from_zero) or min(tensor.shape, default=2) > 1


def is_of_tried_sizes(condition: str) -> bool:
    """Whether a condition, in names of sizes, is of the batch and of lengths of lists alone, with which a program is tried."""
    return all(name == "batch" or re.fullmatch(r"\w+_size_[1-9]\d*", name) for name in names_in(condition))


def find_free_lists(
    program: ExportedProgram, inputs: Sequence[str], sizes: Mapping[str, tuple[Any, ...]], conditions: Sequence[str]
) -> list[list[tuple[str, int]]]:
    """Return the free lengths of padded lists: for each, the tensors and dimensions that have it.

    Args:
        program: the score program.
        inputs: its inputs, in call order.
        sizes: shapes of all tensors of the batch, with one symbol for sizes that are always equal.
        conditions: what the program demands of sizes. Lengths in them are left as they are.
    """
    traced = input_shapes(program, inputs)
    compared = {symbol for text in conditions for symbol in _SYMBOL.findall(text)}
    batch = {str(shape[0]) for shape in sizes.values() if shape}
    found: dict[str, list[tuple[str, int]]] = {}
    bound: set[str] = set()
    for name, shape in sizes.items():
        for dim, size in enumerate(shape):
            text = str(size)
            if dim and text not in batch and _SYMBOL.fullmatch(text):
                found.setdefault(text, []).append((name, dim))
                own = str(traced[name][dim]) if name in traced else text  # the size of a dropped input may not matter
                if not _SYMBOL.fullmatch(own) or own in compared:
                    bound.add(text)
    return [its for text, its in found.items() if text not in bound]
