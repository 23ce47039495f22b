"""Files opened for reading at positions: one of them, or many within the limit on descriptors."""

from __future__ import annotations

import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from dist_export.activity import ACTIVITY
from dist_export.disk import close_quietly, naming_any
from dist_export.errors import TransferError

if TYPE_CHECKING:
    from dist_export.storage import Directory

_PIECE_BYTES = 4 << 20
_MAX_OPEN = 256
_OTHER_DESCRIPTORS = 200
"""Left for sockets, libraries and the caller's own files."""


class RangeReader:
    """A file opened for reading at positions. Local files are read with ``preadv``, thread-safe; others by seeking."""

    def __init__(self, directory: Directory, name: str) -> None:
        self._name = name
        self.where = directory.describe(name)
        self._fd = -1
        self._file: Any = None
        if directory.is_local:
            # non-blocking, for a pipe under this name would let the open wait for ever
            self._fd = os.open(directory.find(name), os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK)
            if not stat.S_ISREG(os.fstat(self._fd).st_mode):
                self.close()
                raise OSError(errno.EINVAL, "is no regular file", self.where)
        else:
            with naming_any(self.where):
                self._file = directory.fs.open(directory.join(name), "rb")

    @property
    def fd(self) -> int:
        """The file descriptor of a local file, -1 elsewhere."""
        return self._fd

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from byte ``offset`` on. TransferError where the file ends before that."""
        ACTIVITY.begin(self.where)
        try:
            self._read_into(view, offset)
        finally:
            ACTIVITY.end()

    def _read_into(self, view: memoryview, offset: int) -> None:
        filled = 0
        while filled < len(view):
            if self._fd >= 0:
                try:
                    count = os.preadv(self._fd, [view[filled:]], offset + filled)
                except OSError as error:  # an error of the disk names no file of itself
                    raise OSError(error.errno, f"{error.strerror} at byte {offset + filled:,}", self.where) from error
            else:
                with naming_any(self.where):
                    self._file.seek(offset + filled)
                    data = self._file.read(len(view) - filled)
                count = len(data)
                view[filled : filled + count] = data
            if count == 0:
                raise TransferError(
                    f"{self.where}: ended at byte {offset + filled:,}, {len(view) - filled:,} bytes before the end of "
                    "a planned read; it shrank while it was being read. Run the export again on a finished checkpoint."
                )
            filled += count

    def read_text(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of text from byte ``offset`` on, read in pieces.

        Text holds no zero byte, and the hole of a sparse file reads as nothing else: so no more is ever held than the
        file really has, whatever length it claims.

        Raises:
            OSError: a zero byte.
            TransferError: the file ends before that.
        """
        pieces = []
        for first in range(0, length, _PIECE_BYTES):
            piece = bytearray(min(_PIECE_BYTES, length - first))
            self.read_into(memoryview(piece), offset + first)
            zero = piece.find(0)
            if zero >= 0:
                raise OSError(
                    errno.EILSEQ,
                    f"byte {offset + first + zero:,} is zero where text should be: it is damaged, or a sparse file",
                    self.where,
                )
            pieces.append(piece)
        return b"".join(pieces)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        fd, file = self._fd, self._file
        self._fd, self._file = -1, None
        if fd >= 0:
            close_quietly(fd)
        if file is not None:
            with naming_any(self.where):
                file.close()

    def __enter__(self) -> RangeReader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def share_descriptors(threads: int) -> int:
    """Return how many files of each of three kinds (sources, outputs, outputs read back) a thread may keep open."""
    soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
    return max(4, min(_MAX_OPEN, (soft - _OTHER_DESCRIPTORS) // (3 * threads)))


class OpenReaders:
    """Readers of numbered files, opened when needed and kept within the limit on descriptors. One for each thread."""

    def __init__(self, open_reader: Callable[[int], RangeReader], *, max_open: int = 64) -> None:
        self._open_reader = open_reader
        self._max_open = max_open
        self._readers: OrderedDict[int, RangeReader] = OrderedDict()

    def __getitem__(self, number: int) -> RangeReader:
        reader = self._readers.pop(number, None)
        if reader is None:
            if len(self._readers) >= self._max_open:
                self._readers.popitem(last=False)[1].close()
            reader = self._open_reader(number)
        self._readers[number] = reader
        return reader

    def close(self) -> None:
        """Close all readers."""
        while self._readers:
            self._readers.popitem()[1].close()

    def __enter__(self) -> OpenReaders:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()
