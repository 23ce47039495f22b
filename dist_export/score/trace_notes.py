"""What the summary says of a score program that was traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_export.humanize import few
from dist_export.manifest import ScoreEntry

_WHOLE = ("int64", "int32", "int16", "int8", "uint8")
"""Dtypes of padded lists of ids, whose sizes are free where the model's code lets them be."""


def list_trace_notes(entry: ScoreEntry, constants: Mapping[str, Any], row_modules: Sequence[str]) -> list[str]:
    """Return notes.

    Args:
        entry: what the manifest says of the program.
        constants: numbers and strings of the sample, by place.
        row_modules: paths of modules that were replaced by a lookup as a whole, unless the settings name them.
    """
    notes = []
    if constants:
        told = few([f"{place} ({value})" for place, value in constants.items()])
        notes.append(
            f"the score program has numbers and strings of the sample in it, as constants for every batch: {told}. If scores "
            "depend on one that varies, give it as a tensor"
        )
    if entry.conditions:
        notes.append(
            f"the score program takes only sizes with {', '.join(entry.conditions)}, because the model's code branches "
            "on them; it refuses other inputs"
        )
    if fixed := _list_fixed_lengths(entry):
        notes.append(
            f"the score program takes lists of one length alone, that of the sample: {few(fixed)}. The model's code fixes it, or "
            "the trace of a layer that has a step for each element, such as nn.GRU and nn.LSTM; pad or cut lists to it. It "
            "refuses other inputs"
        )
    if named := ", ".join(row_modules):
        notes.append(
            f"in the score program, lookups are in the place of whole modules of the sparse arch ({named}): their code "
            "cannot be exported, and for the sample they gave exactly the rows of their ids. Row numbers "
            "below 0 were not tried, nor on several ranks those that a table lacks: the program gives them default rows. "
            "lookup_modules chooses others"
        )
    return notes


def _list_fixed_lengths(entry: ScoreEntry) -> list[str]:
    """Return the inputs of whole numbers with a size, besides the first one, that is always that of the sample."""
    return [
        f"{tensor.name!r} of shape ({', '.join(map(str, tensor.shape))})"
        for tensor in entry.inputs
        if tensor.dtype in _WHOLE and any(isinstance(size, int) for size in tensor.shape[1:])
    ]
