"""Which table of the checkpoint a module of the model is: by its path, or that of its weight."""

from __future__ import annotations

from dist_export.checkpoint.model_weights import plain_name
from dist_export.dense.known_tables import KnownTables
from dist_export.errors import ModelError

_WEIGHT = ".weight"
"""Ends the name of a parameter, which is what trainers but RecIS call a table."""


class TableNames:
    """Finds the table of a module by its path or that of its weight, whatever wrappers put into it.

    Paths count from the model or, where the checkpoint is of the sparse arch alone, from that.
    """

    def __init__(self, finder: KnownTables, prefix: str) -> None:
        self._finder = finder
        self._prefix = prefix
        self._by_path: dict[str, list[str]] = {}
        for name in finder.table_names():
            path = plain_name(name)
            for known in {path, path.removesuffix(_WEIGHT)}:
                self._by_path.setdefault(known, []).append(name)
        begin = f"{plain_name(prefix)}."
        self._has_prefix = bool(prefix) and any(path.startswith(begin) for path in self._by_path)

    def join(self, path: str) -> str:
        """Return the path within the model."""
        return ".".join(element for element in (self._prefix, path) if element)

    def has(self, path: str) -> bool:
        """Whether a path within the sparse arch may be that of a table."""
        paths = [self.join(path)] if self._has_prefix else [self.join(path), path]
        return any(plain_name(full) in self._by_path for full in paths)

    def find(self, path: str) -> str | None:
        """Return the table of a path within the sparse arch, None where there is none. ModelError where there are several."""
        for full in [self.join(path)] if self._has_prefix else [self.join(path), path]:
            exact = [name for name in (full, full + _WEIGHT) if self._finder.has_table(name)]
            found = exact or self._by_path.get(plain_name(full), [])
            if len(found) > 1:
                raise ModelError(
                    f"the model's table {full} may be {' or '.join(map(repr, found[:3]))} of the checkpoint; leave one of them "
                    "out of the checkpoint, or rename the module"
                )
            if found and self._finder.has_table(found[0]):  # which raises where the settings leave it out
                return found[0]
        return None
