"""Mistakes of a user, collected so that all of them are told at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from dist_export.errors import ConfigError, DistExportError, PlanError, UserError

T = TypeVar("T")

_HEADING = re.compile(r"\d+ mistakes:")


class Mistakes:
    """Goes on after a mistake for as long as what comes next does not need what was wrong."""

    def __init__(self) -> None:
        self._found: list[DistExportError] = []

    def collect(self, work: Callable[[], T], default: T, *, ignored: tuple[type[DistExportError], ...] = ()) -> T:
        """Return what ``work`` returns, or ``default`` where it raises a mistake of the user, which is kept.

        Args:
            work: what may raise; what is no mistake of the user's goes through.
            default: is returned after a mistake.
            ignored: mistakes that follow from one that was found before, and are not told.
        """
        try:
            return work()
        except DistExportError as error:
            if error.exit_code != UserError.exit_code:
                raise
            if not isinstance(error, ignored):
                self._found.append(error)
        return default

    def add(self, error: UserError) -> None:
        """Keep a mistake."""
        self._found.append(error)

    def __bool__(self) -> bool:
        """Whether there are any."""
        return bool(self._found)

    def refuse(self) -> None:
        """Raise the mistake that was found; where there are several, one error with a line for each. Nothing without any."""
        if not self._found:
            return
        if len(self._found) == 1:
            raise self._found[0]
        entries = list(dict.fromkeys(entry for error in self._found for entry in _entries_of(error)))
        lines = [line for first, *rest in entries for line in (first, *(f"  {more.strip()}" for more in rest))]
        kinds = (kind for kind in (ConfigError, PlanError) if all(isinstance(error, kind) for error in self._found))
        raise next(kinds, UserError)(f"{len(entries)} mistakes:", *lines)


def _entries_of(error: DistExportError) -> list[tuple[str, ...]]:
    """Return an error's mistakes, each as its lines."""
    if not _HEADING.fullmatch(error.args[0]):
        return [error.args]
    entries: list[tuple[str, ...]] = []
    for line in error.args[1:]:
        if line.startswith("  "):
            entries[-1] += (line,)
        else:
            entries.append((line,))
    return entries
