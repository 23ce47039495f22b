"""Write the output files of a transfer under their temporary names: write at offsets, copy inside the kernel, and sync."""

from __future__ import annotations

import errno
import os
from collections import OrderedDict
from collections.abc import Callable

from dist_export.errors import TransferError
from dist_export.plan.plan import SparsePlan
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.local_io import close_quietly, refuse_zero
from dist_export.storage.range_reader import RangeReader
from dist_export.storage.staging import Staging

_NO_ROOM = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)

KernelCopy = Callable[[int, int, int, int, int], int]
"""(source fd, output fd, source offset, output offset, count) -> bytes copied."""


def copy_file_range(source: int, output: int, source_offset: int, offset: int, count: int) -> int:
    """Copy within the kernel, or share the blocks if the file system supports it (XFS, Btrfs, NFS 4.2)."""
    return os.copy_file_range(source, output, count, source_offset, offset)


def send_file(source: int, output: int, source_offset: int, offset: int, count: int) -> int:
    """Copy through the page cache within the kernel, also between file systems."""
    os.lseek(output, offset, os.SEEK_SET)
    return os.sendfile(output, source, source_offset, count)


KERNEL_COPIES: tuple[KernelCopy, ...] = (copy_file_range, send_file)
"""In the order in which they are tried. There is no other way to know which of them kernel, file system and container allow."""


class StagedFiles:
    """Descriptors of the output files under their temporary names. One for each thread.

    Written bytes are made durable before their descriptor is closed, because on a network file system only the writer's
    own ``fsync`` does that.
    """

    def __init__(self, plan: SparsePlan, staging: Staging, *, max_open: int = 64) -> None:
        self._plan = plan
        self._max_open = max_open
        self._staging = staging
        self._fds: OrderedDict[int, int] = OrderedDict()
        self._is_dirty: set[int] = set()

    def _fd(self, number: int) -> int:
        fd = self._fds.pop(number, -1)
        if fd < 0:
            if len(self._fds) >= self._max_open:
                self._close(*self._fds.popitem(last=False))
            fd = os.open(self._staging.path(self._plan.files[number].name), os.O_WRONLY | os.O_CLOEXEC)
        self._fds[number] = fd
        return fd

    def write(self, number: int, view: memoryview, offset: int) -> None:
        """Write all of ``view`` at byte ``offset`` of output ``number``."""
        fd = self._fd(number)
        self._is_dirty.add(number)
        written = 0
        ACTIVITY.begin(self._plan.files[number].name)
        try:
            while written < len(view):
                written += refuse_zero(os.pwrite(fd, view[written:], offset + written))
        except OSError as error:
            raise self._failure(number, f"byte {offset + written:,} cannot be written", error) from error
        finally:
            ACTIVITY.end()

    def write_columns(self, number: int, rows: memoryview, offset: int, row_bytes: int, begin: int, end: int) -> None:
        """Write only bytes ``begin`` to ``end`` of each row, for rows of ``row_bytes`` that begin at byte ``offset``.

        Each row is one call. A memory mapping is not used, because a network file system may write back whole pages of it,
        over bytes that another machine wrote in between.
        """
        fd = self._fd(number)
        self._is_dirty.add(number)
        ACTIVITY.begin(self._plan.files[number].name)
        first = 0
        try:
            for first in range(begin, len(rows), row_bytes):
                piece = rows[first : first - begin + end]
                written = os.pwrite(fd, piece, offset + first)
                while written < len(piece):
                    written += refuse_zero(os.pwrite(fd, piece[written:], offset + first + written))
        except OSError as error:
            raise self._failure(number, f"byte {offset + first:,} cannot be written", error) from error
        finally:
            ACTIVITY.end()

    def copy(self, number: int, offset: int, source: RangeReader, source_offset: int, num_bytes: int) -> int:
        """Copy a range of a local file into output ``number`` inside the kernel; return the number of bytes copied.

        If the kernel copies fewer than ``num_bytes``, the caller must read and write the rest. Doing both separately also
        shows whether reading or writing fails, so other errors are not raised here.

        Raises:
            TransferError: the disk is full.
        """
        fd = self._fd(number)
        self._is_dirty.add(number)
        done = 0
        for kernel_copy in KERNEL_COPIES:
            try:
                while done < num_bytes:
                    ACTIVITY.begin(self._plan.files[number].name)
                    count = kernel_copy(source.fd, fd, source_offset + done, offset + done, num_bytes - done)
                    if (
                        count == 0
                    ):  # the source ends here, which reading it reports, or the call does not support the file
                        break
                    done += count
            except OSError as error:
                if error.errno in _NO_ROOM:
                    raise self._failure(number, f"byte {offset + done:,} cannot be written", error) from error
            finally:
                ACTIVITY.end()
            if done == num_bytes:
                break
        return done

    def sync(self, number: int) -> None:
        """Make the bytes durable that this object wrote into output ``number``. Raises TransferError if the disk fails."""
        fd = self._fds.get(number, -1)
        if fd >= 0 and number in self._is_dirty:
            self._sync(number, fd)

    def close(self, *, sync: bool) -> None:
        """Close all descriptors. With ``sync``, make the content durable first. Without it, an error is known: raise no other."""
        try:
            while sync and self._fds:
                self._close(*self._fds.popitem())
        finally:
            while self._fds:
                close_quietly(self._fds.popitem()[1])

    def _close(self, number: int, fd: int) -> None:
        try:
            if number in self._is_dirty:
                self._sync(number, fd)
        except TransferError:
            close_quietly(fd)
            raise
        try:
            os.close(fd)
        except OSError as error:  # some file systems write, and report errors, only when a file is closed
            raise self._failure(number, "its content cannot be made durable", error) from error

    def _sync(self, number: int, fd: int) -> None:
        ACTIVITY.begin(self._plan.files[number].name)
        try:
            os.fsync(fd)
        except OSError as error:
            raise self._failure(number, "its content cannot be made durable", error) from error
        finally:
            ACTIVITY.end()
        self._is_dirty.discard(number)

    def _failure(self, number: int, what: str, error: OSError) -> TransferError:
        path = self._staging.path(self._plan.files[number].name)
        return TransferError(
            f"{path}: {what}: {error.strerror}. No manifest was written, so there is no package; shards that are whole are "
            "kept for the next run. Mend the disk or free space there and run the export again"
        )
