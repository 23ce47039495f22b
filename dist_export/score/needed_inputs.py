"""Which inputs the score program needs, and which of their sizes are free."""

from __future__ import annotations

import itertools
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

import torch
from torch.export import Dim, ExportedProgram

from dist_export.dense.used_inputs import find_used_inputs

_SYMBOL = re.compile(r"[a-z]+\d+")
_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_NO_BOUND = 2**62
_WORD = re.compile(r"\b[A-Za-z_]\w*")
_MAX_TRIES = 20_000
"""Of combinations of sizes for one condition."""


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
    return _is_free_from_zero(from_zero) or min(tensor.shape, default=2) > 1


def _is_free_from_zero(from_zero: bool) -> bool:
    from torch.fx.experimental import _config

    return from_zero and hasattr(_config, "backed_size_oblivious")


def list_conditions(program: ExportedProgram, names: Sequence[str], *, from_zero: bool = True) -> list[str]:
    """Return what the model's code demands of free sizes, such as ``s0 <= 1000``, in symbols. A program checks it itself.

    Args:
        program: what was traced.
        names: of the inputs, in call order. Sizes that are equal have one symbol, and are no condition here.
        from_zero: as it was traced.
    """
    lowest = 0 if _is_free_from_zero(from_zero) else 2  # what torch assumes of any size
    shapes = input_shapes(program, names)
    found: list[str] = []
    for symbol, bounds in program.range_constraints.items():
        for bound, sign in ((str(bounds.lower), ">="), (str(bounds.upper), "<=")):
            if bound.isdigit() and (int(bound) > lowest if sign == ">=" else int(bound) < _NO_BOUND):
                found.append(f"{symbol} {sign} {bound}")
    for guard in getattr(program, "_guards_code", None) or ():
        text = _SIZE.sub(lambda match: _in_guard(shapes, match), guard)
        left, _, right = text.partition(" == ")
        is_bound = re.fullmatch(r"[a-z]+\d+ (<|>|<=|>=|!=) \d+", text) and "!=" not in text
        if left != right and not is_bound and _SYMBOL.search(text) and not holds_always(text):
            found.append(text)
    return found


def holds_always(condition: str, *, smallest: int = 0) -> bool:
    """Whether a condition in names of sizes says nothing of sizes from ``smallest`` on, such as ``batch + 1 >= 1``.

    It is tried with small sizes and with those near the numbers in it.
    """
    names = _names_in(condition)
    numbers = {int(text) for text in re.findall(r"\d+", _WORD.sub("", condition))}
    near = {size for number in numbers for size in (number - 1, number, number + 1)}
    near |= {size for number in numbers for other in numbers - {0} for size in (number * other, number // other)}
    sizes = sorted(size for size in {0, 1, 2, 3, 7, 64, 10**6 + 3} | near if size >= smallest)
    if not names or len(sizes) ** len(names) > _MAX_TRIES:
        return False
    try:
        code = compile(condition.strip(), "<condition>", "eval")
        return all(
            eval(code, {"__builtins__": {}}, dict(zip(names, its, strict=True)))  # noqa: S307 -- torch wrote it, of the caller's model
            for its in itertools.product(sizes, repeat=len(names))
        )
    except (NameError, TypeError, SyntaxError, ArithmeticError):
        return False


def _names_in(condition: str) -> list[str]:
    return sorted(set(_WORD.findall(condition)) - {"or", "and", "not"})


def is_of_tried_sizes(condition: str) -> bool:
    """Whether a condition, in names of sizes, is of the batch and of lengths of lists alone, with which a program is tried."""
    return all(name == "batch" or re.fullmatch(r"\w+_size_[1-9]\d*", name) for name in _names_in(condition))


def _in_guard(shapes: Mapping[str, tuple[Any, ...]], match: re.Match[str]) -> str:
    text = str(shapes[match[1]][int(match[2])]) if match[1] in shapes else match[0]
    return text if re.fullmatch(r"\w+", text) else f"({text})"


def input_shapes(program: ExportedProgram, names: Sequence[str]) -> dict[str, tuple[Any, ...]]:
    """Return the shapes of the inputs, with a symbol or an expression for each free size."""
    values = {node.name: node.meta.get("val") for node in program.graph.nodes if node.op == "placeholder"}
    found = zip(names, program.graph_signature.user_inputs, strict=True)
    return {name: sizes_of(values.get(str(node))) for name, node in found}


def sizes_of(value: Any) -> tuple[Any, ...]:
    """Return the sizes of a traced tensor: symbols or expressions, and numbers for what the trace has made constant."""
    sizes = value.shape if isinstance(value, torch.Tensor) else ()
    return tuple(int(str(size)) if str(size).isdigit() else size for size in sizes)


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
