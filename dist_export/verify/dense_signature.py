"""Compare the shapes and the largest batch that a manifest states with those that the exported program was traced for."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import TYPE_CHECKING

from dist_export.manifest import MANIFEST, DenseEntry, TensorEntry

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_BATCH = "batch"
_SYMBOL = re.compile(r"[a-z]+\d+")


def check_signature(program: ExportedProgram, entry: DenseEntry, findings: list[str]) -> None:
    """Compare inputs and outputs by their places: fixed sizes, free dimensions with their names, and the bound of the batch."""
    sizes = {node.name: _sizes_of(node.meta.get("val")) for node in program.graph.nodes}
    signature = program.graph_signature
    label_of: dict[str, str] = {}
    """Symbol of the program -> name in the manifest."""
    for node, stated in zip(signature.user_inputs, entry.inputs, strict=False):
        traced = sizes.get(str(node))
        if traced is None:
            continue
        for size, its in zip(traced, stated.shape, strict=False):
            if isinstance(its, str) and not size.isdigit():
                label_of.setdefault(size, its)
        _compare("input", stated, traced, label_of, findings)
    for node, stated in zip(signature.user_outputs, entry.outputs, strict=False):
        traced = sizes.get(str(node))
        if traced is not None:
            _compare("output", stated, traced, label_of, findings)
    if len(set(label_of.values())) < len(label_of):
        findings.append(f"{MANIFEST}: dense.inputs has one name for several free dimensions of {entry.program}")
    symbol = next((symbol for symbol, label in label_of.items() if label == _BATCH), None)
    for traced_symbol, bounds in program.range_constraints.items():
        if str(traced_symbol) == symbol and str(bounds.upper) != str(entry.max_batch_size):
            findings.append(
                f"{MANIFEST}: dense.max_batch_size is {entry.max_batch_size:,}, and {entry.program} was traced for at most "
                f"{bounds.upper}"
            )


def _sizes_of(value: object) -> list[str] | None:
    shape = getattr(value, "shape", None)
    return None if shape is None else [str(size) for size in shape]


def _compare(
    what: str, stated: TensorEntry, traced: Sequence[str], label_of: dict[str, str], findings: list[str]
) -> None:
    """Compare each size: numbers with numbers, a free dimension with its name. The text of an expression depends on torch."""
    told = [str(size) for size in stated.shape]
    expected = [label_of.get(size, size) for size in traced]
    is_kind = len(told) == len(expected) and all(
        one == other if one.isdigit() or other.isdigit() or size in label_of else True
        for one, other, size in zip(told, expected, traced, strict=True)
    )
    if not is_kind:
        named = [_SYMBOL.sub(lambda found: label_of.get(found[0], found[0]), size) for size in traced]
        findings.append(
            f"{MANIFEST}: {what} {stated.name!r} is [{', '.join(told)}], the exported program has [{', '.join(named)}]"
        )
