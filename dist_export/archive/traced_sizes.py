"""The sizes that an exported program was traced for: which are fixed, and what it demands of those that are free."""

from __future__ import annotations

import itertools
import re
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch.export import ExportedProgram

_SYMBOL = re.compile(r"[a-z]+\d+")
_SIZE = re.compile(r"L\['(\w+)'\]\.size\(\)\[(\d+)\]")
_NO_BOUND = 2**62
_WORD = re.compile(r"\b[A-Za-z_]\w*")
_MAX_TRIES = 20_000
"""Of combinations of sizes for one condition."""


def list_conditions(program: ExportedProgram, names: Sequence[str], *, from_zero: bool = True) -> list[str]:
    """Return what the model's code demands of free sizes, such as ``s0 <= 1000``, in symbols. A program checks it itself.

    Args:
        program: what was traced.
        names: of the inputs, in call order. Sizes that are equal have one symbol, and are no condition here.
        from_zero: as it was traced.
    """
    lowest = 0 if is_free_from_zero(from_zero) else 2  # what torch assumes of any size
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
    names = names_in(condition)
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


def names_in(condition: str) -> list[str]:
    """Return the names of sizes in a condition."""
    return sorted(set(_WORD.findall(condition)) - {"or", "and", "not"})


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


def is_free_from_zero(from_zero: bool) -> bool:
    """Whether sizes of 0 and 1 are free in a trace: asked for, and this torch can."""
    from torch.fx.experimental import _config

    return from_zero and hasattr(_config, "backed_size_oblivious")
