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
"""What a tensor is made of: ``value`` (rows, or floats of the request), ``id`` (integers of the request), ``count`` (masks, and
their sums), ``position`` (numbers from 0 on), ``size`` (sizes of tensors)."""

VALUE, ID, COUNT, POSITION, SIZE = "value", "id", "count", "position", "size"

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
_ORDERS = frozenset({"lt", "le", "gt", "ge"})
_EQUALS = frozenset({"eq", "ne"})
_NOT = frozenset({"logical_not", "bitwise_not"})
_CASTS = frozenset({"to", "_to_copy", "type_as", "float", "double", "half", "bfloat16", "long", "bool"})
_END = (1 << 63) - 1
_LARGEST = 1 << 62


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
    if name == "index":
        return given[0]
    if name in {"where", "masked_fill", "index_put", "index_add", "scatter_reduce"} and isinstance(
        node.args[0], fx.Node
    ):
        kept = [kinds for arg, kinds in zip(node.all_input_nodes, given, strict=True) if arg in _values_in(node, name)]
        return frozenset().union(*kept) - {SIZE}
    return frozenset().union(*given) - {SIZE} if given else frozenset()


def _values_in(node: fx.Node, name: str) -> list[Any]:
    """Return the arguments whose values the result has; the others say which and where."""
    args = list(node.args)
    if name == "where":
        return args[1:]
    if name == "masked_fill":
        return [args[0], *args[2:]]
    return [args[0], args[2]] if name == "index_put" else [args[0], args[3]]


def is_plain(node: fx.Node, name: str, kinds: dict[fx.Node, Kinds]) -> bool:
    """Whether a node is part of a plain lookup, pooling and concatenation."""
    nodes = [arg for arg in node.args if isinstance(arg, fx.Node)]
    own = [kinds[arg] for arg in nodes]
    numbers = [arg for arg in node.args if isinstance(arg, int | float) and not isinstance(arg, bool)]
    has_value = any(VALUE in its for its in own)
    if SIZE in kinds[node]:
        return _is_plain_size(node.meta.get("val"))
    if name in _FILLS or name == "arange":
        fill = node.args[1:2] if name in {"full", "full_like"} else node.args[2:3] if name == "new_full" else (0,)
        return all(isinstance(number, int | float) and number in (0, 1, -math.inf) for number in fill)
    if name in _ORDERS:
        is_shifted = any(_is_shifted(arg) and not kinds[arg] <= {ID} for arg in nodes)  # ids may count from the end
        return not has_value and not is_shifted and all(number == 0 for number in numbers)
    if name in _EQUALS:
        is_of_ids = all(its <= {ID} for its in own)
        return not has_value and all(number in (0, 1) or (is_of_ids and abs(number) < _LARGEST) for number in numbers)
    if name in _NOT or name == "cumsum":
        return not has_value
    if name in {"clamp", "clamp_min"}:
        bounds = [*node.args[1:], *node.kwargs.values()]
        return own[0] <= {COUNT} and bounds[:1] in ([0], [1]) and all(bound is None for bound in bounds[1:])
    if name == "mul":
        return (
            not numbers
            and len(own) == 2
            and (has_value or all(its <= {COUNT} for its in own))
            and (all(its <= {COUNT} or VALUE in its for its in own))
        )
    if name == "div":
        return not numbers and len(own) == 2 and VALUE in own[0] and own[1] <= {COUNT} and bool(own[1])
    if name in {"add", "sub"}:
        return not has_value and not any(SIZE in its for its in own)
    if name in {"remainder", "bitwise_and", "__and__"}:
        return not has_value and all(its <= {ID, COUNT} for its in own)
    if name in {"bitwise_or", "__or__"}:  # the number of a child of a coalesced table, and back
        return not has_value and all(number % (1 << CHILD_BITS) == 0 for number in numbers)
    if name in {"bitwise_right_shift", "__rshift__"}:
        return not has_value and numbers == [CHILD_BITS]
    if name in {"slice", "narrow"}:
        return _is_plain_slice(node, is_value=has_value)
    if name == "select":
        return not has_value
    if name in _CASTS:
        return _is_plain_cast(node, nodes[0])
    if name == "where":
        return VALUE not in own[0]
    return name in _VIEWS


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


def _is_shifted(node: fx.Node) -> bool:
    """Whether a node adds a number: to compare the sum with 0 is to compare with that number."""
    name = str(getattr(node.target, "_opname", getattr(node.target, "__name__", ""))).partition(".")[0]
    return name in {"add", "sub", "rsub"} and any(isinstance(arg, int | float) for arg in node.args)


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
