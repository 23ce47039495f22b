"""Give the inputs and outputs of an ONNX model their true names. torch's exporter changes some: ``Seq`` becomes ``seq``."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping
from typing import Any


def rename_values(graph: Any, names: Mapping[str, str]) -> None:
    """Rename values of a graph and of all graphs within it. Another value that has one of the new names gets a new one.

    Args:
        graph: the main graph, as a message of protobuf; it is changed.
        names: old -> new name. New names are unique.
    """
    used = {name for part in _graphs(graph) for name in _names(part)}
    wanted = set(names.values())
    renamed = dict(names)
    for name in sorted((used & wanted) - names.keys()):
        fresh = (f"{name}_{number}" for number in itertools.count(1))
        renamed[name] = next(other for other in fresh if other not in used | wanted)
        used.add(renamed[name])
    for part in _graphs(graph):
        for values in (part.input, part.output, part.value_info, part.initializer):
            for value in values:
                value.name = renamed.get(value.name, value.name)
        for node in part.node:
            for operands in (node.input, node.output):
                operands[:] = [renamed.get(name, name) for name in operands]


def _graphs(graph: Any) -> Iterator[Any]:
    """Yield a graph and the graphs of its branches and loops, at every depth."""
    yield graph
    for node in graph.node:
        for attribute in node.attribute:
            inner = [*attribute.graphs, *([attribute.g] if attribute.HasField("g") else [])]
            for part in inner:
                yield from _graphs(part)


def _names(graph: Any) -> Iterator[str]:
    for values in (graph.input, graph.output, graph.value_info, graph.initializer):
        yield from (value.name for value in values)
    for node in graph.node:
        yield from (*node.input, *node.output)
