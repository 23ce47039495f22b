"""Compare dtypes, sizes and conditions that a manifest states of the score program with those that the program was traced for."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Any

import torch

from dist_export.archive.traced_sizes import holds_always, input_shapes, list_conditions, sizes_of
from dist_export.manifest import MANIFEST, ScoreEntry

if TYPE_CHECKING:
    from torch.export import ExportedProgram

_SYMBOL = re.compile(r"[a-z]+\d+")


def check_traced(program: ExportedProgram, entry: ScoreEntry, findings: list[str]) -> None:
    """Add a finding for each input or output of another dtype or with other fixed sizes, and for other conditions.

    Names of free sizes are the manifest's own. Conditions depend on torch, so they are compared with the version that wrote them.
    """
    signature = program.graph_signature
    if len(signature.user_inputs) != len(entry.inputs) or len(signature.user_outputs) != len(entry.outputs):
        findings.append(
            f"{MANIFEST}: score has {len(entry.inputs)} inputs and {len(entry.outputs)} outputs, {entry.program} "
            f"{len(signature.user_inputs)} and {len(signature.user_outputs)}"
        )
        return
    values = {node.name: node.meta.get("val") for node in program.graph.nodes}
    pairs = [("input", *pair) for pair in zip(entry.inputs, signature.user_inputs, strict=True)]
    pairs += [("output", *pair) for pair in zip(entry.outputs, signature.user_outputs, strict=True)]
    before = len(findings)
    for what, stated, node in pairs:
        traced = values.get(str(node))
        if not isinstance(traced, torch.Tensor):
            continue
        shape, dtype = sizes_of(traced), str(traced.dtype).removeprefix("torch.")
        if dtype != stated.dtype or _fixed(shape) != _fixed(stated.shape):
            findings.append(
                f"{MANIFEST}: score.{what}s says that {stated.name!r} is {stated.dtype} [{', '.join(map(str, stated.shape))}], "
                f"{entry.program} has {dtype} [{', '.join(map(str, shape))}]"
            )
    if len(findings) == before and entry.torch == torch.__version__:
        _check_conditions(program, entry, findings)


def _fixed(shape: tuple[Any, ...]) -> list[int | None]:
    """Return the sizes that are fixed; None for free ones."""
    return [size if isinstance(size, int) else None for size in shape]


def _check_conditions(program: ExportedProgram, entry: ScoreEntry, findings: list[str]) -> None:
    """Compare the conditions, in the manifest's names of sizes. A trace without sizes of 0 and 1 takes 2 for granted."""
    names = [one.name for one in entry.inputs]
    words: dict[str, str] = {}
    for traced, stated in zip(input_shapes(program, names).values(), entry.inputs, strict=True):
        for size, word in zip(traced, stated.shape, strict=True):
            if _SYMBOL.fullmatch(str(size)):
                words.setdefault(str(size), str(word))
    demanded = []
    for from_zero in (True, False):
        texts = {_in_words(text, words) for text in list_conditions(program, names, from_zero=from_zero)}
        demanded.append({text for text in texts if not holds_always(text)})
    if set(entry.conditions) not in demanded:
        findings.append(
            f"{MANIFEST}: score.conditions are {list(entry.conditions)}, {entry.program} demands {sorted(demanded[0])}"
        )


def _in_words(text: str, words: dict[str, str]) -> str:
    for symbol, word in words.items():
        text = re.sub(rf"\b{symbol}\b", word if word.isidentifier() else f"({word})", text)
    return text
