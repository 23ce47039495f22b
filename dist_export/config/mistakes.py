"""Collect a user's mistakes, so that all of them are reported at once."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import TypeVar

from dist_export.errors import ConfigError, DistExportError, PlanError, UserError

T = TypeVar("T")

FORMER_VALUES = {("digest", "require"): "digest: require is no value any more; set server_side_copy: false instead"}
"""(setting, its former value) -> the error."""

_HEADING = re.compile(r"\d+ mistakes:")


class Mistakes:
    """Collects mistakes. Work continues as long as it does not depend on something that was wrong."""

    def __init__(self) -> None:
        self._found: list[DistExportError] = []

    def collect(self, work: Callable[[], T], default: T, *, ignored: tuple[type[DistExportError], ...] = ()) -> T:
        """Return the result of ``work``; if it raises a mistake of the user, keep that and return ``default``.

        Args:
            work: may raise any error. Errors that are not mistakes of the user pass through.
            default: the result after a mistake.
            ignored: mistakes that follow from an earlier one, and are not reported.
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
        """Add a mistake."""
        self._found.append(error)

    def __bool__(self) -> bool:
        """Return whether there are any mistakes."""
        return bool(self._found)

    def refuse(self) -> None:
        """Raise the mistake; for several, one error with a line for each. Do nothing if there are none."""
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
