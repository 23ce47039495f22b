"""Which operators a plain lookup, pooling and concatenation consists of. With any other one, trials would prove little.

A trial shows that a guess is wrong, not that it is right: made-up batches have no NaN, no row of zeros, no list of a thousand
ids. So whatever could treat such values apart makes a dense input unknown.
"""

from __future__ import annotations

import math
from typing import Any

import sympy  # type: ignore[import-untyped]
import torch
from torch import fx

from dist_export.formats.recis import CHILD_BITS

Kinds = frozenset[str]
"""What a tensor is made of: ``value`` (rows, or floats of the request), ``id`` (integers of the request that are looked up),
``bound`` (its other integers, such as lengths and offsets), ``count`` (masks, and their sums), ``position`` (numbers from 0 on),
``constant`` (numbers that the model holds), ``size`` (sizes of tensors). ``changed`` is beside them where a number was added, or
a remainder, bits or a rounded float taken: to compare that with a number is to compare with another one. ``coded`` is beside
``id`` where the number of a child of a coalesced table was put into its bits or taken out; ``child`` is that number."""

VALUE, ID, BOUND, COUNT, POSITION, CONSTANT, SIZE = "value", "id", "bound", "count", "position", "constant", "size"
CHANGED, CODED, CHILD = "changed", "coded", "child"
_OF_IDS = frozenset({ID, CHANGED, CODED, CHILD})

_VIEWS = frozenset(
    [
        "view",
        "reshape",
        "flatten",
        "unflatten",
        "unsqueeze",
        "squeeze",
        "expand",
        "expand_as",
        "cat",
        "concat",
        "stack",
        "clone",
        "contiguous",
        "alias",
        "detach",
        "getitem",
        "permute",
        "transpose",
        "t",
        "split_with_sizes",
        "split",
        "lookup",
        "sym_size",
        "index",
        "index_put",
        "index_add",
        "scatter_reduce",
        "where",
        "masked_fill",
        "sum",
        "mean",
        "amax",
        "searchsorted",
        "repeat_interleave",
        "nonzero",
        "broadcast_to",
        "unbind",
    ]
)
_FILLS = frozenset(
    [
        "ones_like",
        "zeros_like",
        "full_like",
        "new_zeros",
        "new_ones",
        "new_full",
        "new_empty",
        "zeros",
        "ones",
        "full",
        "scalar_tensor",
    ]
)
_FILL_AT = {"full": 1, "full_like": 1, "new_full": 2, "scalar_tensor": 0}
"""Which argument of these has the number."""
_ORDERS = frozenset({"lt", "le", "gt", "ge"})
_EQUALS = frozenset({"eq", "ne"})
_NOT = frozenset({"logical_not", "bitwise_not"})
_SUMS = frozenset({"add", "sub"})
_ANDS, _ORS = frozenset({"bitwise_and", "__and__"}), frozenset({"bitwise_or", "__or__"})
_BITS = frozenset({"remainder"}) | _ANDS | _ORS
_SHIFTS = frozenset({"bitwise_right_shift", "__rshift__"})
_UNIQUE = "_unique2"
_CHOICES = frozenset({"where", "masked_fill", "index_put", "index_add", "scatter_reduce"})
_REDUCTIONS = frozenset({"sum", "mean", "amax", "cumsum", "index_add", "scatter_reduce"})
_CASTS = frozenset({"to", "_to_copy", "type_as", "float", "double", "half", "bfloat16", "long", "bool"})
_END = (1 << 63) - 1
_LARGEST = 1 << 62
_ID_BITS = (1 << CHILD_BITS) - 1
_CHILD_NUMBERS = (1 << (64 - CHILD_BITS)) - 1
LONGEST_LIST = 256
"""Made-up lists are so long at most; what the code counts beyond that is not tried."""


def kinds_of_input(value: Any, *, is_input: bool, is_id: bool) -> Kinds:
    """Return what an input of a program is made of. ``is_input``: it is of the request; others are of the model."""
    is_float = isinstance(value, torch.Tensor) and (value.is_floating_point() or value.is_complex())
    if is_float:
        return frozenset({VALUE})
    if not is_input:
        return frozenset({CONSTANT})
    if isinstance(value, torch.Tensor) and value.dtype == torch.bool:
        return frozenset({COUNT})
    return frozenset({ID if is_id else BOUND})


def kinds_after(node: fx.Node, name: str, given: list[Kinds]) -> Kinds:
    """Return what the result of a node is made of. ``given``: of its inputs, in order."""
    if name == "lookup":
        return frozenset({VALUE})
    if name in _FILLS:
        return frozenset({COUNT})
    if name in {"arange", "searchsorted"}:
        return frozenset({POSITION})
    if not isinstance(node.meta.get("val"), torch.Tensor | list | tuple):
        return frozenset({SIZE})
    if name in _ORDERS | _EQUALS | _NOT:
        return frozenset({COUNT})
    if name == "getitem" and is_result_of(_UNIQUE, node.args[0]):
        return given[0] if node.args[1] == 0 else frozenset({POSITION if node.args[1] == 1 else COUNT})
    chosen = values_in(node, name)
    kept = [kinds for arg, kinds in zip(node.all_input_nodes, given, strict=True) if arg in chosen]
    found = frozenset().union(*kept) - {SIZE}
    if name in _SHIFTS and _numbers_of(node) == [CHILD_BITS] and ID in found:
        return found - {CODED} | {CHILD}
    if ID in found and _is_coded(name, found, _numbers_of(node)):
        return found if CHILD in found else found | {CODED}
    return found | {CHANGED} if found and _is_changed(node, name, found) else found


def is_result_of(name: str, node: Any) -> bool:
    """Whether a node is a call of the operator of that plain name."""
    return isinstance(node, fx.Node) and node.op == "call_function" and name_operator(node) == name


def name_operator(node: fx.Node) -> str:
    """Return the plain name of an operator: ``aten.remainder.Scalar`` is ``remainder``."""
    target: Any = node.target
    name = getattr(target, "_opname", None) or getattr(target, "__name__", "")
    return str(name).split(".", maxsplit=1)[0].rstrip("_") if not str(name).startswith("__") else str(name)


def _is_coded(name: str, kinds: Kinds, numbers: list[int | float]) -> bool:
    """Whether a node puts the number of a child into ids, or takes it out: ``child << 52 | id & (2**52 - 1)``."""
    if len(numbers) != 1:
        return False
    if name in _ANDS:
        return numbers[0] == (_CHILD_NUMBERS if CHILD in kinds else _ID_BITS)
    return name in _ORS and CHILD not in kinds and numbers[0] % (1 << CHILD_BITS) == 0


def _is_changed(node: fx.Node, name: str, kinds: Kinds) -> bool:
    """Whether a node makes other numbers of those that it gets."""
    if name in _SUMS:
        return bool(_numbers_of(node)) or CONSTANT in kinds
    if name in _CASTS:
        return ID in kinds and node.meta["val"].dtype.is_floating_point
    return name in _BITS and (bool(_numbers_of(node)) or CONSTANT in kinds)


def values_in(node: fx.Node, name: str) -> list[Any]:
    """Return the arguments whose values the result has; the others say which and where."""
    args = list(node.args)
    if name in _ORDERS | _EQUALS | _NOT | _FILLS | {"arange", "searchsorted", "lookup", "sym_size"}:
        return []
    if name == "index":
        return args[:1]
    if name not in _CHOICES or not isinstance(node.args[0], fx.Node):
        return list(node.all_input_nodes)
    if name == "where":
        return args[1:]
    if name == "masked_fill":
        return [args[0], *args[2:]]
    return [args[0], args[2]] if name == "index_put" else [args[0], args[3]]


def _numbers_of(node: fx.Node) -> list[int | float]:
    return [arg for arg in node.args if isinstance(arg, int | float) and not isinstance(arg, bool)]


def is_plain(node: fx.Node, name: str, kinds: dict[fx.Node, Kinds]) -> bool:
    """Whether a node is part of a plain lookup, pooling and concatenation."""
    nodes = [arg for arg in node.args if isinstance(arg, fx.Node)]
    own, numbers = [kinds[arg] for arg in nodes], _numbers_of(node)
    if SIZE in kinds[node]:
        return _is_plain_size(node.meta.get("val"))
    if name in _FILLS:
        at = _FILL_AT.get(name)
        return at is None or all(
            isinstance(its, int | float) and its in (0, 1, -math.inf) for its in node.args[at : at + 1]
        )
    if name == "arange":
        return _is_plain_range(node)
    if name in _ORDERS | _EQUALS:
        return _is_plain_comparison(name, own, numbers)
    if name in _NOT:
        return VALUE not in own[0]
    if name in {"clamp", "clamp_min"}:
        bounds = [*node.args[1:], *node.kwargs.values()]
        return _is_number_of_ids(own[0]) and bounds[:1] in ([0], [1]) and all(bound is None for bound in bounds[1:])
    if name in {"mul", "div"}:
        return not numbers and len(own) == 2 and _is_plain_factor(name, *own)
    if name in _SUMS:
        return not node.kwargs and all(VALUE not in its and SIZE not in its for its in own) and _is_of_one_id(own)
    if name in _BITS | _SHIFTS:
        return _is_plain_bits(name, own, numbers)
    if name in {"slice", "narrow"}:
        return _is_plain_slice(node, is_value=any(VALUE in its for its in own))
    if name == "select":
        return all(VALUE not in its for its in own)
    if name in _CASTS:
        return _is_plain_cast(node, nodes[0])
    if name == "where":
        return VALUE not in own[0]
    if name == "searchsorted":
        return all(its <= {BOUND, COUNT, POSITION} for its in own)
    if name == _UNIQUE:
        return own[0] <= _OF_IDS
    if name == "getitem" and is_result_of(_UNIQUE, node.args[0]):
        return node.args[1] in (0, 1)  # how often an id is in the batch is nothing of one example
    if name in _REDUCTIONS:
        return ID not in kinds[node] and (name != "cumsum" or VALUE not in own[0])
    return name in _VIEWS


def _is_plain_comparison(name: str, own: list[Kinds], numbers: list[int | float]) -> bool:
    """Whether trials show what a comparison does.

    Each number that ids are compared with is tried, with its neighbours. Of lengths, counts and positions no number is.
    """
    if any({VALUE, CONSTANT, SIZE} & its for its in own):
        return name in _EQUALS and sorted(map(sorted, own)) == [[CONSTANT], [ID]]
    if name in _ORDERS:
        if any(its <= {ID, CHANGED, CODED} for its in own):  # ids may count from the end
            return len(own) == 1 and numbers == [0]
        return all(not _OF_IDS & its for its in own) and all(number == 0 for number in numbers)
    if any({CHANGED, CODED} & its for its in own):
        return False
    if all(its <= {ID, CHILD} for its in own):
        return len(own) == 1 and all(abs(number) < _LARGEST for number in numbers)
    return all(number in (0, 1) for number in numbers)


def _is_number_of_ids(kinds: Kinds) -> bool:
    """Whether a tensor counts ids: it is a sum of masks, or the request has it."""
    return bool(kinds) and (kinds <= {COUNT} or kinds <= {BOUND})


def _is_plain_factor(name: str, own: Kinds, other: Kinds) -> bool:
    if name == "div":
        return VALUE in own and _is_number_of_ids(other)
    return all(its <= {COUNT} or VALUE in its for its in (own, other))


def _is_of_one_id(own: list[Kinds]) -> bool:
    """Whether a node takes ids alone, or no ids. What becomes of a pair of ids is tried for few pairs."""
    return len(own) == 1 or not any(ID in its for its in own)


def _is_plain_bits(name: str, own: list[Kinds], numbers: list[int | float]) -> bool:
    if not numbers:
        return name not in _SHIFTS | {"remainder"} and all(its <= {COUNT} for its in own)
    if len(own) != 1 or not own[0] <= _OF_IDS:
        return False
    if name in _ORS:  # the number of a child of a coalesced table, and back
        return all(number % (1 << CHILD_BITS) == 0 for number in numbers)
    return name in _BITS or numbers == [CHILD_BITS]


def _is_plain_range(node: fx.Node) -> bool:
    """Whether a range counts from 0, one by one, as far as made-up lists reach."""
    args = [*node.args, *(node.kwargs[name] for name in ("start", "end", "step") if name in node.kwargs)]
    if len(args) > 1 and (args[0] != 0 or args[2:] not in ([], [1])):
        return False
    end = args[min(1, len(args) - 1)]
    return isinstance(end, fx.Node) or (isinstance(end, int) and end < LONGEST_LIST)


def _is_plain_slice(node: fx.Node, *, is_value: bool) -> bool:
    """Whether a slice takes all; or of bounds, all but the first or last one; or of lists side by side, those of one key."""
    bounds: tuple[Any, ...] = (*node.args[2:], None, None, None)
    start, end, step = bounds[:3]
    if step not in (None, 1):
        return False
    if isinstance(start, fx.Node) or isinstance(end, fx.Node):
        source = node.args[0]
        return isinstance(source, fx.Node) and bool(source.meta["val"].dim() == 1)
    begins, ends = start in (None, 0), end is None or end >= _END
    return (begins and ends) or (not is_value and ((begins and end == -1) or (start == 1 and ends)))


def _is_plain_size(size: Any) -> bool:
    """Whether a size is one of a tensor, or a number of lists: a symbol, a multiple or a share of it, or one more or less.

    A size that is cut (``min(length, 50)``) is none: only some batches show that it is.
    """
    if not isinstance(size, torch.SymInt):
        return not isinstance(size, torch.SymBool | torch.SymFloat)
    return all(_is_plain_term(term) for term in sympy.preorder_traversal(size.node.expr))


def _is_plain_term(term: Any) -> bool:
    if isinstance(term, sympy.Add):
        if any(type(one).__name__ == "FloorDiv" for one in sympy.preorder_traversal(term)):
            return False
        numbers = [one for one in term.args if one.is_Integer]
        return len(term.args) == 2 and len(numbers) == 1 and abs(int(numbers[0])) == 1
    return isinstance(term, sympy.Symbol | sympy.Integer | sympy.Mul) or type(term).__name__ == "FloorDiv"


def _is_plain_cast(node: fx.Node, source: fx.Node) -> bool:
    """Whether no value can become another one, apart from rounding of floats."""
    before, after = source.meta["val"].dtype, node.meta["val"].dtype
    if after.is_floating_point or before in (torch.bool, after):
        return True
    return bool(not before.is_floating_point and after != torch.bool and after.itemsize >= before.itemsize)
