"""What a source says of itself that holds only the rows that a trainer has looked up since a base."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple


class ReadFile(NamedTuple):
    """A file of the dump as it was read."""

    path: str
    num_bytes: int
    digest: str


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainerDump:
    """Where the rows come from. Rows that the source does not hold are those of the base, and none is deleted."""

    steps: tuple[int, ...]
    files: tuple[ReadFile, ...]
    dtypes: tuple[tuple[str, str], ...]
    """(table, dtype of the settings): the casts that its rows need to be as those of the base."""
