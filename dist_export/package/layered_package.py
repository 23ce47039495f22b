"""What a package has below it: the base of a delta package, the base of that, and so on down to a full package."""

from __future__ import annotations

import os
from abc import abstractmethod
from collections.abc import Sequence

import msgspec
import numpy as np
from typing_extensions import Self

from dist_export.errors import PackageError
from dist_export.formats.delta_entries import MOST_LINKS
from dist_export.formats.recis import EMBEDDING_SLOT
from dist_export.manifest import Manifest, TableEntry
from dist_export.package.base import find_base
from dist_export.package.chain import ChainReader, Merging, list_links, merge_all, read_layers
from dist_export.package.layers import DeltaIds, LayeredReader
from dist_export.package.open_count import OpenCount
from dist_export.package.opened_files import OpenedFiles
from dist_export.package.slot_reader import SlotReader
from dist_export.storage.directory import Directory


class LayeredPackage:
    """A package that may be a delta: the part of :class:`~dist_export.package.reader.Package` that knows what is below it."""

    directory: Directory
    files: OpenedFiles
    manifest: Manifest
    base: Self | None
    delta_ids: DeltaIds
    _cache_dir: str | os.PathLike[str] | None
    _readers_of_files: OpenCount

    @abstractmethod
    def table(self, name: str) -> TableEntry:
        """Return a table's entry in the manifest. Raises PackageError if there is no such table."""

    @abstractmethod
    def rows_of(self, table: str, *, slot: str = EMBEDDING_SLOT) -> SlotReader:
        """Return what reads its own rows."""

    @abstractmethod
    def close(self) -> None:
        """Close its files."""

    @classmethod
    @abstractmethod
    def open_alone(cls, directory: Directory, cache_dir: str | os.PathLike[str] | None) -> Self:
        """Open a package without what is below it."""

    def _prepare_layers(self) -> None:
        self.base = None
        self._leave = [self._readers_of_files.join(self)]
        self._layered: dict[tuple[str, str], LayeredReader | ChainReader] = {}
        self.delta_ids = DeltaIds(self.files)
        self._merging = Merging()

    @property
    def is_delta(self) -> bool:
        """Whether this is a delta package, whose other rows are in its base."""
        return self.manifest.base is not msgspec.UNSET

    @property
    def layers(self) -> tuple[Self, ...]:
        """Itself, its open base, the base of that, and so on: the full package is the last one."""
        return (self, *(() if self.base is None else self.base.layers))

    def open_base(
        self,
        directory: Directory | None = None,
        *,
        opened: Self | None = None,
        below: Sequence[Directory] = (),
        num_above: int = 1,
    ) -> None:
        """Open the base of a delta package, as the constructor does with these arguments, and what that is on top of.

        ``below``: where the packages below the base are; by default they are searched for. ``num_above``: deltas that are on top
        of the base.

        Raises:
            PackageError: one of them is not found, or is not the one that the delta was made on top of; there are too many.
        """
        known = () if opened is None else opened.layers
        base = find_base(
            self.directory,
            self.manifest,
            lambda place: self.open_alone(place, self._cache_dir),
            given=directory,
            known=known,
            is_asked=num_above == 1,
        )
        try:
            self._refuse_long_chain(base, num_above)
            if base.is_delta and base.base is None:
                base.open_base(*below[:1], opened=opened, below=below[1:], num_above=num_above + 1)
        except PackageError:
            if base not in known:
                base.close()
            raise
        self.base = base
        self._leave += [layer._readers_of_files.join(self) for layer in base.layers]  # noqa: SLF001 -- of the same class
        if base not in known:
            base.close()  # from now on it is closed with the last delta package that reads it

    @staticmethod
    def _refuse_long_chain(base: LayeredPackage, num_above: int) -> None:
        num_links = num_above + (int(base.is_delta) if base.base is None else len(base.layers) - 1)
        if num_links > MOST_LINKS:
            raise PackageError(
                f"{base.directory.url} is a delta package with {num_above:,} others on top of each other above it, and at most "
                f"{MOST_LINKS} deltas can be. Run compact on an earlier one, or export everything"
            )

    def layered_reader(self, table: str, slot: str) -> LayeredReader | ChainReader:
        """Return what reads one slot of a table from a delta package and what is below. PackageError as :meth:`rows_of`."""
        reader = self._layered.get((table, slot))
        if reader is None:
            self.table(table)
            reader = self._layered[table, slot] = read_layers(self._require_layers(), table, slot, self._merging)
        return reader

    def merge_ids(self) -> None:
        """Merge the ids of a chain now, and not at the first lookup of each table. PackageError if a package is damaged."""
        if self.is_delta:
            merge_all(self._require_layers(), self._merging)

    def contains(self, table: str, ids: np.ndarray) -> np.ndarray:
        """Return which ids (int64, (n,)) have a row, bool (n,), as ``lookup`` does. PackageError as :meth:`rows_of`."""
        self.table(table)
        if not self.is_delta:
            return self.rows_of(table).contains(ids)
        return ChainReader(*list_links(self._require_layers(), table, EMBEDDING_SLOT), self._merging).contains(ids)

    def _require_layers(self) -> tuple[Self, ...]:
        if self.base is None:
            raise PackageError(f"{self.directory.url} is a delta package, and was opened without its base")
        return self.layers

    def deleted_ids(self, table: str) -> np.ndarray:
        """Return the ids of the base that a delta package takes away, int64 (n,), in ascending order.

        PackageError if there is no such table, or the files are damaged.
        """
        deleted = self.delta_ids.deleted(self.table(table)) if self.is_delta else None
        return np.zeros(0, np.int64) if deleted is None else deleted.ids
