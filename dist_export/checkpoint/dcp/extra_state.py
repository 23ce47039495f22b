"""The parts of modules' extra state in the metadata of a DCP checkpoint, which takes dicts and lists apart."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any, NamedTuple

from dist_export.checkpoint.dcp.metadata import Chunk, DcpMetadata, TensorMeta
from dist_export.checkpoint.extra_state import find_extra_state


class Leaf(NamedTuple):
    """A part of a module's extra state, which DCP takes apart."""

    path: tuple[Any, ...] | None
    """Keys that lead to it within the extra state; None where the metadata lacks them."""
    key: str
    """The name that DCP gave it."""
    item: TensorMeta | Chunk
    """A tensor, or the place of what is no tensor."""


def find_leaves(
    metadata: DcpMetadata, folder: str, tensors: dict[str, TensorMeta]
) -> Iterator[tuple[tuple[Any, ...], Leaf]]:
    """Return (path of a module's extra state, leaf) for each part of one, in the order that they were saved."""
    positions = {name: chunk._replace(file=folder + chunk.file) for name, chunk in metadata.objects.items()}
    for name in dict.fromkeys([*metadata.paths, *metadata.tensors, *metadata.objects]):
        if name not in tensors and name not in positions:
            continue
        path = metadata.paths.get(name)
        steps = tuple(name.split(".")) if path is None else path
        if depth := find_extra_state(steps):
            is_cut = path is None and depth < len(steps)
            within = steps[:depth] if path is not None else (".".join(steps[:depth]),)
            yield within, Leaf(None if is_cut else steps[depth:], name, tensors.get(name) or positions[name])
