"""Which inputs of a traced program reach its outputs by value, and not by their shape alone; and which state it changes."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping

import torch
from torch import fx
from torch.export import ExportedProgram

_SIZES = frozenset({"sym_size", "sym_stride", "sym_numel", "sym_storage_offset", "size", "stride", "numel"})
_LIKE_FIRST = frozenset(
    f"{verb}_like" for verb in ("zeros", "ones", "full", "empty", "rand", "randn", "randint")
) | frozenset({"new_zeros", "new_ones", "new_full", "new_empty", "new_empty_strided", "_shape_as_tensor"})
_LIKE_SECOND = frozenset({"expand_as", "view_as", "reshape_as", "type_as"})


def input_names(program: ExportedProgram) -> list[str]:
    """Return the names of the program's keyword inputs, in call order."""
    spec = program.call_spec.in_spec
    children = getattr(spec, "children", None)  # a method, a property or not there, by version
    _, keywords = children() if callable(children) else spec.children_specs
    return list(keywords.context)


def find_used_inputs(program: ExportedProgram, dynamic_dims: Mapping[str, Mapping[int, str]]) -> list[str]:
    """Return the inputs that the program cannot do without, in call order.

    Those are the inputs whose values can reach an output, through views and writes in place too; and an input that no
    value is taken from, but whose shape is used and alone tells the size of a further free dimension.
    """
    graph = _Graph(program.graph)
    outputs = set(program.graph_signature.user_outputs)
    by_value, by_shape = graph.reach(node for node in program.graph.nodes if node.name in outputs)
    nodes = dict(zip(input_names(program), program.graph_signature.user_inputs, strict=True))
    used = [name for name, node in nodes.items() if node in by_value]
    known = {label for name in used for label in dynamic_dims.get(name, {}).values()}
    for name, node in nodes.items():
        labels = set(dynamic_dims.get(name, {}).values())
        if name not in used and node in by_shape and not labels <= known:
            used.append(name)
            known |= labels
    return [name for name in nodes if name in used]


def find_used_state(program: ExportedProgram) -> dict[str, torch.Tensor]:
    """Return the parameters, buffers and lifted constants whose values can reach an output, by name."""
    outputs = set(program.graph_signature.user_outputs)
    by_value, _ = _Graph(program.graph).reach(node for node in program.graph.nodes if node.name in outputs)
    held = {**program.constants, **program.state_dict}
    return {
        target: held[target]
        for node, target in _state_names(program).items()
        if node in by_value and isinstance(held.get(target), torch.Tensor)
    }


def find_written_state(program: ExportedProgram) -> list[str]:
    """Return the parameters, buffers and constants that the program writes into, whether or not an output depends on them."""
    written = {*_Graph(program.graph).written(), *_writers_of_buffers(program)}
    return sorted(target for node, target in _state_names(program).items() if node in written)


def as_loaded(program: ExportedProgram, load: Callable[[], ExportedProgram]) -> ExportedProgram:
    """Return a program that has run as ``load`` gave it: itself, or loaded anew where a run changes its state."""
    return load() if find_written_state(program) else program


def _state_names(program: ExportedProgram) -> dict[str, str]:
    """Return placeholder -> name of each parameter, buffer and lifted constant."""
    signature = program.graph_signature
    return {
        **signature.inputs_to_parameters,
        **signature.inputs_to_buffers,
        **signature.inputs_to_lifted_tensor_constants,
    }


def find_changed_state(program: ExportedProgram) -> list[str]:
    """Return the parameters, buffers and constants that the program writes into and that reach its outputs, sorted.

    With such state, the outputs are others from call to call.
    """
    graph, signature = _Graph(program.graph), program.graph_signature
    outputs = {str(node) for node in signature.user_outputs}
    by_value, _ = graph.reach(node for node in program.graph.nodes if node.name in outputs)
    written = {*graph.written(), *_writers_of_buffers(program)}
    names = _state_names(program)
    return sorted(target for node, target in names.items() if node in by_value and node in written)


def _writers_of_buffers(program: ExportedProgram) -> list[str]:
    """Return the placeholders of buffers that get a new value when the program returns."""
    changed = set(program.graph_signature.buffers_to_mutate.values())
    return [node for node, target in program.graph_signature.inputs_to_buffers.items() if target in changed]


class _Graph:
    """The graph with what an edge list does not show: which nodes share memory, and who writes into it."""

    def __init__(self, graph: fx.Graph) -> None:
        self._nodes = list(graph.nodes)
        self._parent: dict[fx.Node, fx.Node] = {}
        self._writers: dict[fx.Node, list[fx.Node]] = {}
        writes: list[tuple[fx.Node, fx.Node]] = []
        for node in graph.nodes:
            if node.op != "call_function":
                continue
            for source, is_written in _shared_arguments(node):
                self._parent[self._memory(source)] = self._memory(node)
                if is_written:
                    writes.append((source, node))
        for source, node in writes:
            self._writers.setdefault(self._memory(source), []).append(node)

    def reach(self, ends: Iterator[fx.Node]) -> tuple[set[str], set[str]]:
        """Return the names of the nodes from which values reach ``ends``, and of those from which shapes may."""
        by_value: set[fx.Node] = set()
        shaped: list[fx.Node] = []
        stack = list(ends)
        while stack:
            node = stack.pop()
            if node in by_value:
                continue
            by_value.add(node)
            stack += self._writers.get(self._memory(node), [])
            for source in node.all_input_nodes:
                (stack if _carries_value(source, node) else shaped).append(source)
        by_shape: set[fx.Node] = set()
        while shaped:
            node = shaped.pop()
            if node not in by_shape:
                by_shape.add(node)
                shaped += node.all_input_nodes
        return {node.name for node in by_value}, {node.name for node in by_shape}

    def written(self) -> list[str]:
        """Return the names of the nodes whose memory an operator writes into. Regions within the graph do not count."""
        operators = {
            memory
            for memory, writers in self._writers.items()
            if any(isinstance(writer.target, torch._ops.OpOverload) for writer in writers)  # noqa: SLF001 -- as below
        }
        return [node.name for node in self._nodes if self._memory(node) in operators]

    def _memory(self, node: fx.Node) -> fx.Node:
        """Return the node that stands for all that share memory with this one."""
        while node in self._parent and self._parent[node] is not node:
            node = self._parent[node]
        return node


def _shared_arguments(node: fx.Node) -> Iterator[tuple[fx.Node, bool]]:
    """Yield the arguments that the result may share memory with, and whether the node writes into each."""
    if not isinstance(node.target, torch._ops.OpOverload):  # noqa: SLF001 -- an operator's class has no public name
        is_region = isinstance(node.target, torch._ops.HigherOrderOperator)  # noqa: SLF001 -- may write into anything
        if is_region or getattr(node.target, "__name__", "") == "getitem":
            yield from ((source, is_region) for source in node.all_input_nodes)
        return
    for place, argument in enumerate(node.target._schema.arguments):  # noqa: SLF001 -- the only place that tells
        if argument.alias_info is None:
            continue
        given = node.kwargs.get(argument.name, node.args[place] if place < len(node.args) else None)
        for source in given if isinstance(given, (list, tuple)) else [given]:
            if isinstance(source, fx.Node):
                yield source, bool(argument.alias_info.is_write)


def _carries_value(source: fx.Node, user: fx.Node) -> bool:
    name = getattr(user.target, "__name__", str(user.target)).split(".")[0]
    if name in _SIZES:
        return False
    if name in _LIKE_FIRST:
        return source not in user.args[:1]
    if name in _LIKE_SECOND or (name == "to" and "other" in str(user.target)):
        return source in user.args[:1]
    return True
