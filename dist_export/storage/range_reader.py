"""Files opened for reading at positions: one of them, or many within the limit on descriptors."""

from __future__ import annotations

import concurrent.futures
import errno
import os
import resource
import stat
from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from typing import TYPE_CHECKING, Any

from dist_export.errors import EndedError
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.local_io import close_quietly, naming_any

if TYPE_CHECKING:
    from dist_export.storage.directory import Directory

_PIECE_BYTES = 4 << 20
_HEAD_BYTES = 64 << 10
"""Of an object, what the first small read brings along: most headers are shorter."""
_REQUEST_BYTES = 4 << 20
"""Of one request to a store: longer ones gain nothing, and several at a time do."""
_WINDOW_BYTES = 8 << 20
_REQUESTS_AT_ONCE = 16
_NEAR_BYTES = 64 << 10
"""A gap that is read along, for another request would take longer."""
_MAX_OPEN = 256
OPEN_FLAGS = os.O_RDONLY | os.O_CLOEXEC | os.O_NONBLOCK
"""Non-blocking, for a pipe under a file's name would let the open wait for ever."""
_OTHER_DESCRIPTORS = 200
"""Left for sockets, libraries and the caller's own files."""


class RangeReader:
    """A file opened for reading at positions.

    Local files are read with ``preadv``, thread-safe; objects of S3 by ranges, the first read bringing along what lies
    behind it, so that a header takes one request; others by seeking.
    """

    def __init__(self, directory: Directory, name: str, *, fd: int = -1, etag: str = "") -> None:
        """Open the file, or take over ``fd``, a descriptor of it. ``etag``: of an object of S3, the only one that is read."""
        self._name = name
        self.where = directory.describe(name)
        self._fd = fd
        self._etag = etag
        self._file: Any = None
        self._s3 = directory.s3
        self._path = ""
        self._head = b""
        """The first bytes of an object, once any of them was asked for."""
        if self._s3 is not None:
            self._path = directory.join(name)  # that it is there, the first read tells
        elif directory.is_local:
            if fd < 0:
                self._fd = os.open(directory.find(name), OPEN_FLAGS)
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
        """Fill ``view`` from byte ``offset`` on. EndedError where the file ends before that."""
        ACTIVITY.begin(self.where)
        try:
            self._read_into(view, offset)
        finally:
            ACTIVITY.end()

    def read_many(self, ranges: Sequence[tuple[memoryview, int]]) -> None:
        """Fill several views, each from its byte on, in any order. EndedError where the file ends before one's end.

        Of an object of S3, ranges that nearly touch are read as one, and several are asked for at once.
        """
        if self._s3 is None or len(ranges) < 2:
            for view, offset in ranges:
                self.read_into(view, offset)
            return
        ACTIVITY.begin(self.where)
        try:
            with naming_any(self.where):
                for group in _group_ranges(ranges):
                    found = self._s3.get_ranges(self._path, [(begin, end) for begin, end, _ in group], etag=self._etag)
                    for (begin, _, members), data in zip(group, found, strict=True):
                        for number in members:
                            view, offset = ranges[number]
                            piece = data[offset - begin : offset - begin + len(view)]
                            if len(piece) < len(view):
                                raise self._ended(offset + len(piece), len(view) - len(piece))
                            view[:] = piece
                    ACTIVITY.done += 1
        finally:
            ACTIVITY.end()

    def ahead(self, offset: int, num_bytes: int, *, window_bytes: int = _WINDOW_BYTES) -> Stream:
        """Return a stream of ``num_bytes`` from byte ``offset`` on, to be read from begin to end and closed.

        Of an object of S3, what comes next is on its way while what came is used; at most twice ``window_bytes`` are held.
        """
        return Stream(self, offset, num_bytes, window_bytes=window_bytes)

    def fetch(self, begin: int, end: int) -> bytes:
        """Return a range of an object of S3, its pieces asked for at once. EndedError where the object ends before."""
        assert self._s3 is not None
        pieces = [(first, min(first + _REQUEST_BYTES, end)) for first in range(begin, end, _REQUEST_BYTES)]
        with naming_any(self.where):
            found = self._s3.get_ranges(self._path, pieces, etag=self._etag)
        data = found[0] if len(found) == 1 else b"".join(found)
        if len(data) < end - begin:
            raise self._ended(begin + len(data), end - begin - len(data))
        return data

    @property
    def is_ranged(self) -> bool:
        """Whether each read is a request to a store."""
        return self._s3 is not None

    def _read_from_s3(self, view: memoryview, offset: int) -> None:
        assert self._s3 is not None
        end = offset + len(view)
        if offset < _HEAD_BYTES and end <= _HEAD_BYTES and not self._head and len(view):
            with naming_any(self.where):
                self._head = self._s3.get(self._path, 0, _HEAD_BYTES, etag=self._etag)
        done = self._head[offset:end]
        if done:
            view[: len(done)] = done
        if len(done) < len(view):
            if self._head and len(self._head) < _HEAD_BYTES:  # the object is that short
                raise self._ended(max(len(self._head), offset), end - max(len(self._head), offset))
            view[len(done) :] = self.fetch(offset + len(done), end)

    def _ended(self, position: int, num_missing: int) -> EndedError:
        return EndedError(
            f"{self.where}: ended at byte {position:,}, {num_missing:,} bytes before the end of a planned read",
            "it shrank while it was being read. Run the export again on a finished checkpoint.",
        )

    def _read_into(self, view: memoryview, offset: int) -> None:
        if self._s3 is not None:
            self._read_from_s3(view, offset)
            return
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
                raise self._ended(offset + filled, len(view) - filled)
            filled += count

    def read_text(self, offset: int, length: int) -> bytes:
        """Return ``length`` bytes of text from byte ``offset`` on, read in pieces.

        Text holds no zero byte, and the hole of a sparse file reads as nothing else: so no more is ever held than the
        file really has, whatever length it claims.

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


class Stream:
    """A range of a file, read from begin to end. One thread; closed by whoever opened it."""

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
        """Fill ``view`` with the next bytes. EndedError where the file ends before that."""
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
        """Let go of what was read ahead."""
        if self._pool is not None:
            self._pool.shutdown(cancel_futures=True)
            self._pool = None

    def __enter__(self) -> Stream:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


def _group_ranges(
    ranges: Sequence[tuple[memoryview, int]],
) -> Iterator[list[tuple[int, int, list[int]]]]:
    """Yield what to ask for at once: (first byte, byte after the last, which of ``ranges`` lie in it)."""
    group: list[tuple[int, int, list[int]]] = []
    num_bytes = 0
    for number in sorted(range(len(ranges)), key=lambda number: ranges[number][1]):
        view, offset = ranges[number]
        end = offset + len(view)
        if group and offset - group[-1][1] <= _NEAR_BYTES and end - group[-1][0] <= _REQUEST_BYTES:
            begin, last, members = group[-1]
            members.append(number)
            group[-1] = (begin, max(last, end), members)
            continue
        if len(group) == _REQUESTS_AT_ONCE or num_bytes > _WINDOW_BYTES:
            yield group
            group, num_bytes = [], 0
        group.append((offset, end, [number]))
        num_bytes += len(view)
    if group:
        yield group


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
