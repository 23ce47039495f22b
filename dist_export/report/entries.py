"""What was read beside the manifest, as data. Pure."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any, NamedTuple

from dist_export.diff.entries import PackageDiff
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.manifest import SlotEntry, TableEntry
from dist_export.registry.versions import Version
from dist_export.report.norms import NormEntry


class FoundEvents(NamedTuple):
    """The lines of an events file."""

    where: str
    lines: list[Any]
    """Parsed, of any JSON type: no digest covers them."""
    why_not: str = ""
    """Why there are none."""


class FoundVersions(NamedTuple):
    """The versions beside a package that was published."""

    where: str
    name: str
    """The name of the package that the report is about."""
    versions: list[Version]
    why_not: str = ""
    """Why they could not be read."""


class Found(NamedTuple):
    """What was read beside the manifest."""

    norms: Mapping[str, NormEntry | str]
    """By table; a text says why its rows were not read."""
    events: FoundEvents
    versions: FoundVersions | None
    against: PackageDiff | None


def embedding_of(table: TableEntry) -> SlotEntry | None:
    """Return the slot whose rows are looked up."""
    return next((slot for slot in table.kept if slot.name == EMBEDDING_SLOT), None)
