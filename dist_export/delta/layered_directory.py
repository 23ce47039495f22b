"""The files of a delta package and of its base under one roof, as an export reads the files of a source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping
from typing import NamedTuple

from dist_export.storage.directory import Directory, FileStat
from dist_export.storage.range_reader import RangeReader

_BASE = "base:"
"""Begins the name of a file of the base. Other names are those of the delta's files."""


class MadeFile(NamedTuple):
    """A file that is on no disk: what it holds is put together while it is read."""

    num_bytes: int
    version: str
    open: Callable[[], RangeReader]


def name_in_base(name: str) -> str:
    """Return the name that a file of the base has in a :class:`LayeredDirectory`."""
    return f"{_BASE}{name}"


class LayeredDirectory(Directory):
    """Reads files of both packages. Writes nothing, and lists nothing. In messages it is the delta."""

    def __init__(self, delta: Directory, base: Directory, made: Mapping[str, MadeFile]) -> None:
        """``made``: by name, files that are put together while they are read."""
        super().__init__(delta.location)
        self._delta, self._base, self._made = delta, base, made
        self.is_local = delta.is_local and base.is_local

    def _owner_of(self, name: str) -> tuple[Directory, str]:
        return (self._base, name.removeprefix(_BASE)) if name.startswith(_BASE) else (self._delta, name)

    def open_reader(self, name: str) -> RangeReader:
        """Open a file for ranged reads."""
        if name in self._made:
            return self._made[name].open()
        directory, its = self._owner_of(name)
        return directory.open_reader(its)

    def stat(self, name: str) -> FileStat:
        """Return size and version of a file. FileNotFoundError if it does not exist."""
        if name in self._made:
            return FileStat(self._made[name].num_bytes, self._made[name].version)
        directory, its = self._owner_of(name)
        return directory.stat(its)

    def find_many(self, names: Iterable[str]) -> dict[str, FileStat]:
        """Return size and version of those files that exist. A store is asked once for each package."""
        wanted = set(names)
        found = {name: self.stat(name) for name in wanted & self._made.keys()}
        for directory in (self._delta, self._base):
            owned = [(name, self._owner_of(name)) for name in sorted(wanted - self._made.keys())]
            mine = {its: name for name, (where, its) in owned if where is directory}
            found |= {mine[its]: stat for its, stat in directory.find_many(mine).items()}
        return found

    def describe(self, name: str) -> str:
        """Return the file with the URL of its package, for messages."""
        if name in self._made:
            return f"{self.url} with {self._base.url}: {name}"
        directory, its = self._owner_of(name)
        return directory.describe(its)

    def join(self, name: str) -> str:
        """Return the path of a file on the file system of its package."""
        directory, its = self._owner_of(name)
        return directory.join(its)
