"""Where output files are built before they get their final names."""

from __future__ import annotations

import contextlib
import functools
import os
import shutil
import tempfile

from dist_export.errors import TransferError
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.directory import PARTIAL_SUFFIX, Directory
from dist_export.storage.local_io import close_quietly, is_in_memory, naming_any, reserve
from dist_export.storage.range_reader import OPEN_FLAGS, LocalReader, RangeReader

_PREFIX = "dist_export-"


def _note_progress() -> None:
    ACTIVITY.done += 1


class Staging:
    """Where output files are built before they get their final names. Every process builds its own for one target.

    On a local target the file is built beside its final path under a temporary name, so a rename publishes it. For other
    stores it is built in a local temporary directory, then uploaded whole. Ranks that see the same disk share that directory.
    """

    def __init__(self, target: Directory) -> None:
        self._target = target
        self._made = ""

    @functools.cached_property
    def _temporary(self) -> str | None:
        """The local directory for another store's files. It is made at the first use, in a step that may fail."""
        return None if self._target.is_local else self.make()

    def make(self) -> str:
        """Make and return a local directory for another store's files; :meth:`close` removes it."""
        if not self._made:
            self._made = tempfile.mkdtemp(prefix=_PREFIX)
        return self._made

    def join(self, folder: str) -> None:
        """Build files in a directory that this or another rank has made."""
        self.__dict__["_temporary"] = folder  # where the cached property keeps its value

    def path(self, name: str) -> str:
        """Return the local path under which ``name`` is being built."""
        base = self._target.path if self._temporary is None else self._temporary
        return f"{base}/.{name}{PARTIAL_SUFFIX}"

    def open_reader(self, name: str) -> RangeReader:
        """Open a file that is being built."""
        path = self.path(name)
        return LocalReader(path, os.open(path, OPEN_FLAGS))

    @functools.cached_property
    def _is_in_memory(self) -> bool:
        return is_in_memory(self._target.path if self._temporary is None else self._temporary)

    def check_room(self, num_bytes: int) -> None:
        """Refuse to begin if the target is a tmpfs without enough space; :meth:`create` checks other file systems.

        Raises:
            TransferError: less than ``num_bytes`` bytes are free.
        """
        if not self._is_in_memory:
            return
        folder = self._target.path if self._temporary is None else self._temporary
        found = os.statvfs(folder)
        free = found.f_bavail * found.f_frsize
        if num_bytes > free:
            raise TransferError(
                f"{folder}: no room for {num_bytes:,} bytes: the tmpfs has {free:,} left. Nothing was published; free "
                "space there and run the export again"
            )

    def create(self, name: str, num_bytes: int, *, has_holes: bool = False) -> None:
        """Make an empty file of ``num_bytes`` and reserve its space, so that a full disk is reported at once.

        The file is only given its size, and a full disk is noticed while it is filled, in three cases: the file system
        cannot reserve; it is a tmpfs, where reserving costs as much as writing (:meth:`check_room` checks it); the file
        ``has_holes`` that are not filled.

        Raises:
            TransferError: no space.
        """
        path = self.path(name)
        self.remove(name)  # an existing file, for example a link into the checkpoint, must not be written to
        fd = os.open(path, os.O_RDWR | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
        ACTIVITY.begin(path)
        try:
            if self._is_in_memory or has_holes:
                os.ftruncate(fd, num_bytes)
            elif num_bytes:
                reserve(fd, num_bytes)
        except OSError as error:
            where = self._target.describe(name) if self._temporary is None else path
            raise TransferError(
                f"{where}: no room for its {num_bytes:,} bytes: {error.strerror}. Nothing was published; free space "
                "there and run the export again"
            ) from error
        finally:
            ACTIVITY.end()
            close_quietly(fd)  # the file has no content yet

    def remove(self, name: str) -> None:
        """Remove a file that is being built, if it exists."""
        with contextlib.suppress(FileNotFoundError):
            os.unlink(self.path(name))

    def publish(self, name: str) -> None:
        """Give a finished file its final name. Its content must be durable (``fsync``) on a local target."""
        where = self._target.describe(name)
        with ACTIVITY.of(where):
            with naming_any(where):
                self._target.put_file(name, self.path(name), _note_progress)
            if self._temporary is not None:
                os.unlink(self.path(name))

    def close(self) -> None:
        """Remove the local directory that this process has made, if it made one."""
        if self._made:
            shutil.rmtree(self._made, ignore_errors=True)
