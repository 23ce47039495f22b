"""Files that are open for reads at positions: a single file, or many within the limit on descriptors."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Callable, Sequence
from typing import IO, Any, Protocol

from typing_extensions import Self

from dist_export.errors import EndedError
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.local_io import close_quietly, naming_any

_PIECE_BYTES = 4 << 20
WINDOW_BYTES = 8 << 20
"""How many bytes a stream reads ahead. Up to twice as much is in memory."""
_MAX_OPEN = 256
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Non-blocking, because opening a pipe with a file's name would block forever."""
_OTHER_DESCRIPTORS = 200
"""Left for sockets, libraries and the caller's own files."""


class RangeReader(Protocol):
    """A file that is open for reads at positions. A back end implements ``_fill`` and ``close``.

    ``Directory.open_reader`` returns the right one for its store.
    """

    where: str
    """The file, for messages."""

    @property
    def fd(self) -> int:
        """The file descriptor of a local file; -1 for any other file."""
        return -1

    @property
    def is_ranged(self) -> bool:
        """Whether each read is a request to a store."""
        return False

    def _fill(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from byte ``offset`` on. EndedError if the file ends before that."""
        ...

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        return

    def read_into(self, view: memoryview, offset: int) -> None:
        """Fill ``view`` from byte ``offset`` on. EndedError if the file ends before that."""
        ACTIVITY.begin(self.where)
        try:
            self._fill(view, offset)
        finally:
            ACTIVITY.end()

    def read_many(self, ranges: Sequence[tuple[memoryview, int]]) -> None:
        """Fill several views, each from its own byte on, in any order. EndedError if the file ends before one is full."""
        for view, offset in ranges:
            self.read_into(view, offset)

    def fetch(self, begin: int, end: int) -> bytes:
        """Return bytes ``begin`` to ``end``. EndedError if the file ends before that."""
        data = bytearray(end - begin)
        self.read_into(memoryview(data), begin)
        return bytes(data)

    def read_text(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of text from byte ``offset`` on, read in pieces.

        Text contains no zero byte, but the hole of a sparse file reads as zeros. So this never holds more than the file
        really contains, whatever length it claims.

        Raises:
            OSError: a zero byte.
            EndedError: the file ends before that.
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

    def ahead(self, offset: int, num_bytes: int, *, window_bytes: int = WINDOW_BYTES) -> Stream:
        """Return a stream of ``num_bytes`` from byte ``offset`` on, to be read from start to end and closed.

        An object of S3 is fetched ahead while earlier bytes are used; at most twice ``window_bytes`` are in memory.
        """
        return Stream(self, offset, num_bytes, window_bytes=window_bytes)

    def ended(self, position: int, num_missing: int) -> EndedError:
        """Return the error for a file that ends at byte ``position``, ``num_missing`` bytes too early."""
        return EndedError(
            f"{self.where}: ended at byte {position:,}, {num_missing:,} bytes before the end of a planned read",
            "it shrank while it was being read. Run the export again on a finished checkpoint.",
        )

    def __enter__(self) -> Self:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LocalReader(RangeReader):
    """A file on a disk, read with ``preadv``. Any thread."""

    def __init__(self, where: str, fd: int) -> None:
        """Take over the descriptor ``fd``. If it is no regular file, close it and raise OSError."""
        self.where = where
        self._fd = fd
        if not stat.S_ISREG(os.fstat(fd).st_mode):
            self.close()
            raise OSError(errno.EINVAL, "is no regular file", where)

    @property
    def fd(self) -> int:
        """The file descriptor; -1 once it is closed."""
        return self._fd

    def read_many(self, ranges: Sequence[tuple[memoryview, int]]) -> None:
        """See the base."""
        read, fd = os.preadv, self._fd
        ACTIVITY.begin(self.where)
        try:
            for view, offset in ranges:
                try:
                    is_read = read(fd, (view,), offset) == len(view)
                except OSError:
                    is_read = False
                if not is_read:
                    self._fill(view, offset)  # it says what is wrong
        finally:
            ACTIVITY.end()

    def _fill(self, view: memoryview, offset: int) -> None:
        filled = 0
        while filled < len(view):
            try:
                count = os.preadv(self._fd, [view[filled:]], offset + filled)
            except OSError as error:  # an error of the disk does not name the file
                raise OSError(error.errno, f"{error.strerror} at byte {offset + filled:,}", self.where) from error
            if count == 0:
                raise self.ended(offset + filled, len(view) - filled)
            filled += count

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        fd, self._fd = self._fd, -1
        if fd >= 0:
            close_quietly(fd)


class FileReader(RangeReader):
    """A file of any fsspec file system, read by seeking. One thread at a time."""

    def __init__(self, where: str, file: IO[bytes]) -> None:
        """Take over ``file``, which is open for reading."""
        self.where = where
        self._file: Any = file

    def _fill(self, view: memoryview, offset: int) -> None:
        filled = 0
        while filled < len(view):
            with naming_any(self.where):
                self._file.seek(offset + filled)
                data = self._file.read(len(view) - filled)
            if not data:
                raise self.ended(offset + filled, len(view) - filled)
            view[filled : filled + len(data)] = data
            filled += len(data)

    def close(self) -> None:
        """Close the file. Safe to call twice."""
        file, self._file = self._file, None
        if file is not None:
            with naming_any(self.where):
                file.close()


class Stream:
    """A range of a file, read from start to end. One thread; the caller that opened it closes it."""

    def __init__(self, reader: RangeReader, offset: int, num_bytes: int, *, window_bytes: int) -> None:
        self._reader = reader
        self._position = offset
        self._end = offset + num_bytes
        self._window_bytes = window_bytes
        self._window = memoryview(b"")
        self._next: concurrent.futures.Future[bytes] | None = None
        self._asked = offset
        self._pool: concurrent.futures.ThreadPoolExecutor | None = None
        if reader.is_ranged and num_bytes > window_bytes:
            self._pool = concurrent.futures.ThreadPoolExecutor(1, thread_name_prefix="ahead")

    def read_into(self, view: memoryview) -> None:
        """Fill ``view`` with the next bytes. EndedError if the file ends before that."""
        assert self._position + len(view) <= self._end
        if not self._reader.is_ranged:
            self._reader.read_into(view, self._position)
            self._position += len(view)
            return
        filled = 0
        while filled < len(view):
            if not self._window:
                self._window = memoryview(self._take_window())
            count = min(len(view) - filled, len(self._window))
            view[filled : filled + count] = self._window[:count]
            self._window = self._window[count:]
            filled += count
        self._position += len(view)

    def _take_window(self) -> bytes:
        ACTIVITY.begin(self._reader.where)
        try:
            if self._pool is None:
                begin = self._asked
                self._asked = min(begin + self._window_bytes, self._end)
                return self._reader.fetch(begin, self._asked)
            if self._next is None:
                self._next = self._ask()
            assert self._next is not None
            data = self._next.result()
            self._next = self._ask()
            return data
        finally:
            ACTIVITY.end()

    def _ask(self) -> concurrent.futures.Future[bytes] | None:
        begin, self._asked = self._asked, min(self._asked + self._window_bytes, self._end)
        assert self._pool is not None
        return self._pool.submit(self._reader.fetch, begin, self._asked) if begin < self._end else None

    def close(self) -> None:
        """Release what was read ahead."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Stream:
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
