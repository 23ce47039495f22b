"""A file of a package that is kept open between lookups."""

from __future__ import annotations

import mmap

import numpy as np

from dist_export.storage.range_reader import RangeReader


class HeldFile:
    """An open file, and the number of lookups that use it now."""

    def __init__(self, reader: RangeReader) -> None:
        self.reader = reader
        self.uses = 0
        self._mapping: np.ndarray | None = None

    def map(self) -> np.ndarray | None:
        """Return the content of a file on a disk as uint8; None if it cannot be mapped.

        It stays mapped while the file is open or the array is in use. Python takes a second descriptor for it.
        """
        if self._mapping is None:
            try:
                self._mapping = np.frombuffer(mmap.mmap(self.reader.fd, 0, prot=mmap.PROT_READ), np.uint8)
            except (OSError, ValueError):  # no descriptor is left, or the file system cannot map; reading still works
                return None
        return self._mapping

    def close(self) -> None:
        """Close the file."""
        self._mapping = None
        self.reader.close()
