"""What the summary says of a score program that was traced."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from dist_export.humanize import few
from dist_export.manifest import ScoreEntry


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
    if named := ", ".join(row_modules):
        notes.append(
            f"in the score program, lookups are in the place of whole modules of the sparse arch ({named}): their code "
            "cannot be exported, and for the sample they gave exactly the rows of their ids. Row numbers "
            "below 0 were not tried, nor on several ranks those that a table lacks: the program gives them default rows. "
            "lookup_modules chooses others"
        )
    return notes
