"""Open files of a transfer, kept within the limit on descriptors."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Callable

from dist_export.errors import TransferError
from dist_export.plan.shards import SparsePlan
from dist_export.storage import RangeReader, Staging

_MAX_OPEN = 128
"""Of each kind; the usual limit of a process is 1024 descriptors."""


class OpenReaders:
    """Readers of numbered files, opened when needed. One for each thread."""

    def __init__(self, open_reader: Callable[[int], RangeReader]) -> None:
        self._open_reader = open_reader
        self._readers: OrderedDict[int, RangeReader] = OrderedDict()

    def __getitem__(self, number: int) -> RangeReader:
        reader = self._readers.pop(number, None)
        if reader is None:
            if len(self._readers) >= _MAX_OPEN:
                self._readers.popitem(last=False)[1].close()
            reader = self._open_reader(number)
        self._readers[number] = reader
        return reader

    def close(self) -> None:
        """Close all readers."""
        while self._readers:
            self._readers.popitem()[1].close()


class StagedFiles:
    """Descriptors of the output files under their temporary names. One for each thread.

    What was written through a descriptor is made durable before it is closed: on a network file system only the
    writer's own ``fsync`` does that.
    """

    def __init__(self, plan: SparsePlan, staging: Staging) -> None:
        self._plan = plan
        self._staging = staging
        self._fds: OrderedDict[int, int] = OrderedDict()
        self._is_dirty: set[int] = set()

    def _fd(self, number: int) -> int:
        fd = self._fds.pop(number, -1)
        if fd < 0:
            if len(self._fds) >= _MAX_OPEN:
                self._close(*self._fds.popitem(last=False))
            fd = os.open(self._staging.path(self._plan.files[number].name), os.O_WRONLY | os.O_CLOEXEC)
        self._fds[number] = fd
        return fd

    def write(self, number: int, view: memoryview, offset: int) -> None:
        """Write all of ``view`` at byte ``offset`` of output ``number``."""
        fd = self._fd(number)
        self._is_dirty.add(number)
        written = 0
        try:
            while written < len(view):
                written += os.pwrite(fd, view[written:], offset + written)
        except OSError as error:
            raise self._failure(number, f"byte {offset + written:,} cannot be written", error) from error

    def sync(self, number: int) -> None:
        """Make durable what was written into output ``number`` here; an error of the disk shows now."""
        fd = self._fds.get(number, -1)
        if fd >= 0 and number in self._is_dirty:
            self._sync(number, fd)

    def close(self, *, sync: bool) -> None:
        """Close all descriptors; ``sync`` makes the content durable before."""
        while self._fds:
            number, fd = self._fds.popitem()
            self._close(number, fd, sync=sync)

    def _close(self, number: int, fd: int, *, sync: bool = True) -> None:
        try:
            if sync and number in self._is_dirty:
                self._sync(number, fd)
        finally:
            os.close(fd)

    def _sync(self, number: int, fd: int) -> None:
        try:
            os.fsync(fd)
        except OSError as error:
            raise self._failure(number, "its content cannot be made durable", error) from error
        self._is_dirty.discard(number)

    def _failure(self, number: int, what: str, error: OSError) -> TransferError:
        path = self._staging.path(self._plan.files[number].name)
        return TransferError(
            f"{path}: {what}: {error.strerror}. No manifest was written, so there is no package; shards that are whole are "
            "kept for the next run. Mend the disk or free space there and run the export again"
        )
