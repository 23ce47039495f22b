"""What the graph of a sparse arch tells of each lookup: which inputs its ids come from, and with which numbers they meet."""

from __future__ import annotations

import math
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import fx, nn
from torch.export import ExportedProgram
from torch.export.graph_signature import InputKind

from dist_export.archive.lookup_operator import LOOKUP_TARGET, list_lookups
from dist_export.contract.operators import Kinds, is_plain, kinds_after, kinds_of_input, name_operator, values_in
from dist_export.formats.serving_entries import TransformEntry
from dist_export.score.block_program import BlockProgram

_MAX_NUMBERS = 16
"""Numbers of one kind that are tried; a graph that has more in the way of one lookup is not read."""
_SIZES = frozenset({"sym_size", "ones_like", "zeros_like", "new_zeros", "new_ones", "new_full", "new_empty"})
"""Operators that take no more than the size, dtype and device of a tensor."""
_CONSTANT = "constant"
"""In the place of an operator, for a number that a small tensor of the model holds."""
_COMPARISONS = frozenset({"eq", "ne", "gt", "ge", "lt", "le"})


@dataclass(frozen=True, slots=True)
class Ancestry:
    """What a node is computed from."""

    inputs: frozenset[str]
    """Inputs of the program whose values matter; those of which only a size is used are not among them."""
    numbers: frozenset[tuple[str, int | float]]
    """(operator, number): the constants that the operators on the way have. Whole numbers are int."""
    lookups: frozenset[str]
    """Tables that are looked up on the way."""
    state: frozenset[str]
    """Parameters, buffers, and constants with more values than can be tried."""
    others: frozenset[str]
    """Operators that are none of a plain lookup, pooling and concatenation."""

    def constants(self, *operators: str) -> list[int]:
        """Return the whole numbers that are constants of these operators, sorted."""
        return sorted({its for operator, its in self.numbers if operator in operators and isinstance(its, int)})


@dataclass(frozen=True, slots=True)
class Lookup:
    """One lookup: its table, and what its ids are computed from."""

    table: str
    ids: Ancestry
    sources: frozenset[str]
    """Inputs whose values become these ids; of the others the values only decide which ones."""


@dataclass(frozen=True, slots=True)
class GraphFacts:
    """What :func:`read_graph` found."""

    lookups: tuple[Lookup, ...]
    blocks: dict[str, Ancestry]
    """By output of the program."""

    def numbers_of(self, name: str) -> set[int | float]:
        """Return the numbers in all blocks that are computed from an input."""
        return {number for block in self.blocks.values() if name in block.inputs for _, number in block.numbers}


def list_looked_up(traced: BlockProgram) -> list[str]:
    """Return the inputs whose values are looked up, sorted. Lengths may be among them."""
    return sorted(_Reader(traced, ()).ids)


def read_graph(traced: BlockProgram, *, not_ids: Collection[str]) -> GraphFacts:
    """Return what the graph of the sparse arch tells. ``not_ids``: inputs that are lengths or offsets, looked up or not."""
    reader = _Reader(traced, not_ids)
    lookups = []
    for node in reader.nodes:
        for owner, table in reader.lookups_at(node):
            ids = owner.args[0] if owner is node and isinstance(owner.args[0], fx.Node) else node
            lookups.append(Lookup(table, reader.ancestry[ids], reader.sources_of([ids])))
    output = next(node for node in reader.nodes if node.op == "output")
    blocks = dict(zip(traced.blocks, output.args[0], strict=True))
    found = {name: reader.ancestry[node] for name, node in blocks.items() if isinstance(node, fx.Node)}
    return GraphFacts(tuple(lookups), found)


def list_transforms(ids: Ancestry) -> list[tuple[TransformEntry, ...]]:
    """Return the ways from an id in the request to the id that is looked up that the graph allows, the plainest first."""
    steps = [TransformEntry(op="modulo", value=value) for value in ids.constants("remainder") if value > 0]
    steps += [TransformEntry(op="mask", value=value) for value in ids.constants("bitwise_and", "__and__")]
    added = {*ids.constants("add", "__add__"), *(-value for value in ids.constants("sub", "__sub__"))}
    steps += [TransformEntry(op="add", value=value) for value in sorted(added) if value]
    steps += [TransformEntry(op="from_end", value=value) for value in sorted(added) if value > 0]
    if len(steps) > 2 * _MAX_NUMBERS:
        return [()]
    pairs = [(first, second) for first in steps for second in steps if first != second]
    return [(), *((step,) for step in steps), *pairs]


def list_padding_ids(block: Ancestry) -> list[int | None]:
    """Return the ids that may fill lists up, none first: the numbers that something on the way is compared with."""
    found = block.constants(*_COMPARISONS, _CONSTANT)
    return [None, *found] if len(found) <= _MAX_NUMBERS else [None]


class _Reader:
    def __init__(self, traced: BlockProgram, not_ids: Collection[str]) -> None:
        program = traced.program
        self._root = program.graph_module
        self.nodes = list(program.graph.nodes)
        self._names = dict(zip(program.graph_signature.user_inputs, traced.tensors, strict=True))
        self._state = _tensors_by_placeholder(program)
        self._inner = {id(node): table for node, table in list_lookups(program.graph_module)}
        self.ancestry: dict[fx.Node, Ancestry] = {}
        self._kinds: dict[fx.Node, Kinds] = {}
        looked_up = [
            owner.args[0] if owner is node else node for node in self.nodes for owner, _ in self.lookups_at(node)
        ]
        self.ids = self.sources_of(looked_up) - set(not_ids)
        for node in self.nodes:
            self.ancestry[node] = self._look_at(node)

    def lookups_at(self, node: fx.Node) -> Iterator[tuple[fx.Node, str]]:
        """Yield the lookups of a node: its own, and those of the graphs that it runs."""
        if id(node) in self._inner:
            yield node, self._inner[id(node)]
        for inner in self._nodes_within(node):
            if id(inner) in self._inner:
                yield inner, self._inner[id(inner)]

    def sources_of(self, nodes: Sequence[Any]) -> frozenset[str]:
        """Return the inputs whose values these nodes have, in whatever order and however changed."""
        found, seen, left = set(), set(), list(nodes)
        while left:
            node = left.pop()
            if not isinstance(node, fx.Node) or node in seen:
                continue
            seen.add(node)
            if node.op == "placeholder" and node.name in self._names:
                found.add(self._names[node.name])
            left += values_in(node, name_operator(node)) if node.op == "call_function" else []
        return frozenset(found)

    def _nodes_within(self, node: fx.Node) -> Iterator[fx.Node]:
        """Yield the nodes of the graphs that a node runs, such as that of a ``torch.enable_grad`` block."""
        for given in node.all_input_nodes if node.op == "call_function" else ():
            module = getattr(self._root, str(given.target), None) if given.op == "get_attr" else None
            if isinstance(module, fx.GraphModule):
                yield from module.graph.nodes

    def _look_at(self, node: fx.Node) -> Ancestry:
        inputs, numbers, tables, state, others = set(), set(), set(), set(), set()
        self._kinds[node] = self._kinds_of(node)
        if node.op == "call_function" and not is_plain(node, name_operator(node), self._kinds):
            others.add(name_operator(node))
        if node.op == "placeholder" and node.name in self._names:
            inputs.add(self._names[node.name])
        elif node.op == "placeholder":
            values = self._state.get(node.name)
            if values is None or values.numel() > _MAX_NUMBERS or isinstance(values, nn.Parameter):
                state.add(node.name)
            else:
                plain = values.detach().reshape(-1).tolist()
                numbers |= {(_CONSTANT, number) for number in _numbers_in(plain)}
        for inner in (node, *self._nodes_within(node)):
            if str(inner.target) != LOOKUP_TARGET:
                numbers |= {(name_operator(inner), number) for number in _numbers_in((inner.args, inner.kwargs))}
            if id(inner) in self._inner:
                tables.add(self._inner[id(inner)])
        for given in node.all_input_nodes:
            known = self.ancestry[given]
            inputs |= known.inputs if name_operator(node) not in _SIZES else frozenset()
            numbers |= known.numbers
            tables |= known.lookups
            state |= known.state
            others |= known.others
        return Ancestry(frozenset(inputs), frozenset(numbers), frozenset(tables), frozenset(state), frozenset(others))

    def _kinds_of(self, node: fx.Node) -> Kinds:
        if node.op == "placeholder":
            name = self._names.get(node.name, "")
            return kinds_of_input(node.meta.get("val"), is_input=bool(name), is_id=name in self.ids)
        if node.op != "call_function":
            return frozenset()
        return kinds_after(node, name_operator(node), [self._kinds[given] for given in node.all_input_nodes])


def _tensors_by_placeholder(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Return the constants of a program by the names of their nodes; parameters and buffers may have other values later."""
    found = {}
    for spec in program.graph_signature.input_specs:
        value = program.state_dict.get(spec.target or "", program.constants.get(spec.target or ""))
        if spec.kind is InputKind.CONSTANT_TENSOR and isinstance(value, torch.Tensor):
            found[str(getattr(spec.arg, "name", ""))] = value
    return found


def _numbers_in(value: Any) -> Iterator[int | float]:
    """Yield the numbers within arguments: whole ones as int, others as float."""
    if isinstance(value, bool | torch.dtype):
        return
    if isinstance(value, int):
        yield value
    elif isinstance(value, float) and math.isfinite(value):
        yield int(value) if value.is_integer() and abs(value) < 1 << 53 else value
    elif isinstance(value, list | tuple):
        for one in value:
            yield from _numbers_in(one)
    elif isinstance(value, dict):
        yield from _numbers_in(list(value.values()))
