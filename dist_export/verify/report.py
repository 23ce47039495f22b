"""What a verification found: findings and notes, each one line about one file, in a fixed order."""

from __future__ import annotations

from collections.abc import Iterable
from typing import NamedTuple

from dist_export.errors import printable

_MOST_ALIKE = 10
"""So many findings of one check in one file are told one by one; of the rest the number is enough."""

_MAX_TEXT = 2000


class Finding(NamedTuple):
    """One thing that is wrong, or, among the notes, legal and surprising."""

    file: str
    """Relative to the directory."""
    check: str
    """Which check it is of; docs/how-to/verify-in-ci.md lists the names."""
    message: str

    @property
    def line(self) -> str:
        """The finding for people."""
        return f"{self.file}: {self.message}"


class Report:
    """What a verification found, and what it looked at."""

    def __init__(self, kind: str = "package") -> None:
        self.kind = kind
        """``package``, ``interrupted export``, or ``RecIS directory``, which has no manifest.json."""
        self.checked: list[str] = []
        """What was looked at and found sound, for people."""
        self._found: dict[bool, list[Finding]] = {True: [], False: []}
        self._alike: dict[tuple[bool, str, str], int] = {}

    def add(self, file: str, check: str, message: str) -> None:
        """Add a finding."""
        self._take(Finding(file, check, message), is_finding=True)

    def note(self, file: str, check: str, message: str) -> None:
        """Add a note: it does not make the directory unsound."""
        self._take(Finding(file, check, message), is_finding=False)

    def add_lines(self, check: str, lines: Iterable[str]) -> None:
        """Add findings that come as ``<file>: <what>``."""
        for line in lines:
            file, _, message = line.partition(": ")
            self.add(file, check, message)

    @property
    def findings(self) -> list[str]:
        """One line for each finding; empty where all is sound."""
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
        """Return how many findings there are, told or not."""
        return sum(number for (is_finding, _, _), number in self._alike.items() if is_finding)

    def render(self) -> list[str]:
        """Return the report line by line, for people: findings, notes, then what was checked or how much is wrong."""
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
    """Return foreign text as one short line that a terminal may be given."""
    if len(text) > _MAX_TEXT:
        text = f"{text[: _MAX_TEXT // 2]} ... {text[-_MAX_TEXT // 2 :]}"
    return printable(text)
