"""A range of an open file as a file of its own, for libraries that read files."""

from __future__ import annotations

import io
from typing import cast

from dist_export.storage.range_reader import RangeReader


class RangeFile(io.RawIOBase):
    """``size`` bytes from ``begin`` on. It is read at once what is asked for: wrap it in a buffer where reads are small."""

    def __init__(self, reader: RangeReader, begin: int, size: int) -> None:
        self._reader = reader
        self._begin = begin
        self._size = size
        self._position = 0

    def readable(self) -> bool:
        """Return true."""
        return True

    def seekable(self) -> bool:
        """Return true."""
        return True

    def tell(self) -> int:
        """Return the position."""
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        """Set the position, and return it."""
        self._position = max(0, offset + (0, self._position, self._size)[whence])
        return self._position

    def readinto(self, buffer: object) -> int:
        """Fill a buffer, or its beginning, from the position on; return how many bytes, 0 at the end."""
        view = memoryview(cast("bytearray", buffer)).cast("B")
        count = max(0, min(len(view), self._size - self._position))
        if count:
            count = self._fill(view[:count], self._position)
            self._position += count
        return count

    def _fill(self, view: memoryview, position: int) -> int:
        """Fill ``view``, or its beginning, from a position of the range on; return how many bytes."""
        self._reader.read_into(view, self._begin + position)
        return len(view)
