"""The files of a delta package and of all that is below it under one roof, as an export reads the files of a source."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import NamedTuple

from dist_export.storage.directory import Directory, FileStat
from dist_export.storage.range_reader import RangeReader

_BASE = "base:"
"""Begins the name of a file of the base, twice that of a file of its base, and so on. Files of the delta have their own."""


class MadeFile(NamedTuple):
    """A file that is on no disk: what it holds is put together while it is read."""

    num_bytes: int
    version: str
    open: Callable[[], RangeReader]


def name_in_layer(layer: int, name: str) -> str:
    """Return the name that a file of a layer has in a :class:`LayeredDirectory`; 0 is the delta."""
    return _BASE * layer + name


class LayeredDirectory(Directory):
    """Reads files of all packages. Writes nothing, and lists nothing. In messages it is the delta."""

    def __init__(self, layers: Sequence[Directory], made: Mapping[str, MadeFile]) -> None:
        """``layers``: the delta first; ``made``: by name, files that are put together while they are read."""
        super().__init__(layers[0].location)
        self._layers, self._made = layers, made
        self.is_local = all(layer.is_local for layer in layers)

    def _owner_of(self, name: str) -> tuple[Directory, str]:
        layer = 0
        while name.startswith(_BASE):
            name, layer = name.removeprefix(_BASE), layer + 1
        return self._layers[layer], name

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
        for directory in self._layers:
            owned = [(name, self._owner_of(name)) for name in sorted(wanted - self._made.keys())]
            mine = {its: name for name, (where, its) in owned if where is directory}
            found |= {mine[its]: stat for its, stat in directory.find_many(mine).items()}
        return found

    def describe(self, name: str) -> str:
        """Return the file with the URL of its package, for messages."""
        if name in self._made:
            return f"{self.url} with {self._layers[-1].url}: {name}"
        directory, its = self._owner_of(name)
        return directory.describe(its)

    def join(self, name: str) -> str:
        """Return the path of a file on the file system of its package."""
        directory, its = self._owner_of(name)
        return directory.join(its)
