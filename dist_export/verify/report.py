"""Collect the findings and notes of a verification. Each is one line about one file, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dist_export.errors import printable

_MOST_ALIKE = 10
"""Findings of one check in one file that are listed. The others are only counted."""

_MAX_TEXT = 2000


class Finding(NamedTuple):
    """One fault, or in a note, something legal but surprising."""

    file: str
    """Relative to the directory."""
    check: str
    """The name of the check. docs/how-to/verify-in-ci.md lists the names."""
    message: str

    @property
    def line(self) -> str:
        """The finding as text for people."""
        return f"{self.file}: {self.message}"


class Report:
    """The findings of a verification, and a list of what it checked."""

    def __init__(self, kind: str = "package") -> None:
        self.kind = kind
        """``package``, ``interrupted export``, ``package without manifest``, or ``RecIS directory``, which needs none."""
        self.checked: list[str] = []
        """What was checked and is sound, as text for people."""
        self._found: dict[bool, list[Finding]] = {True: [], False: []}
        self._alike: dict[tuple[bool, str, str], int] = {}

    def add(self, file: str, check: str, message: str) -> None:
        """Add a finding."""
        self._take(Finding(file, check, message), is_finding=True)

    def note(self, file: str, check: str, message: str) -> None:
        """Add a note. It does not make the directory unsound."""
        self._take(Finding(file, check, message), is_finding=False)

    def add_lines(self, check: str, lines: Iterable[str]) -> None:
        """Add findings from lines of the form ``<file>: <message>``."""
        for line in lines:
            file, _, message = line.partition(": ")
            self.add(file, check, message)

    @property
    def findings(self) -> list[str]:
        """One line for each finding; empty if everything is sound."""
        return [finding.line for finding in self.found]

    @property
    def found(self) -> list[Finding]:
        """The findings, in the order of the checks."""
        return self._told(is_finding=True)

    @property
    def notes(self) -> list[Finding]:
        """The notes, in the order of the checks."""
        return self._told(is_finding=False)

    def count(self) -> int:
        """Return the number of findings, listed or not."""
        return sum(number for (is_finding, _, _), number in self._alike.items() if is_finding)

    def render(self) -> list[str]:
        """Return the report as lines for people: findings, notes, then what was checked or the number of findings."""
        lines = [*self.findings, *(f"note: {note.line}" for note in self.notes)]
        if not self.count():
            return lines + self.checked
        return [*lines, f"unsound: {self.kind} with {self.count():,} finding{'s' * (self.count() != 1)}"]

    def as_json(self) -> dict[str, object]:
        """Return the report as plain values."""
        return {
            "kind": self.kind,
            "findings": [finding._asdict() for finding in self.found],
            "notes": [note._asdict() for note in self.notes],
            "checked": self.checked,
        }

    def _take(self, finding: Finding, *, is_finding: bool) -> None:
        kind = is_finding, finding.file, finding.check
        self._alike[kind] = self._alike.get(kind, 0) + 1
        if self._alike[kind] <= _MOST_ALIKE:
            self._found[is_finding].append(Finding(*(_one_line(text) for text in finding)))

    def _told(self, *, is_finding: bool) -> list[Finding]:
        more = [
            Finding(_one_line(file), check, f"and {number - _MOST_ALIKE:,} more of this kind")
            for (of_finding, file, check), number in self._alike.items()
            if of_finding == is_finding and number > _MOST_ALIKE
        ]
        return self._found[is_finding] + more


def _one_line(text: str) -> str:
    """Return foreign text as one short line that is safe to print on a terminal."""
    if len(text) > _MAX_TEXT:
        text = f"{text[: _MAX_TEXT // 2]} ... {text[-_MAX_TEXT // 2 :]}"
    return printable(text)
