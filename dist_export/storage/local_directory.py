"""A directory on a disk, read and written with plain system calls."""

from __future__ import annotations

import contextlib
import errno
import fcntl
import os
import shutil
import stat
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import IO

from dist_export.errors import TransferError
from dist_export.redact import reason_of
from dist_export.storage.directory import PARTIAL_SUFFIX, Directory, FileStat
from dist_export.storage.file_systems import trace_of
from dist_export.storage.local_io import make_directories, read_pieces_of, sync_directory, write_new
from dist_export.storage.range_reader import OPEN_FLAGS, LocalReader, RangeReader


class LocalDirectory(Directory):
    """A directory whose :attr:`path` is absolute."""

    is_local = True

    def child(self, name: str) -> LocalDirectory:
        """Return the directory ``name`` in this one."""
        return LocalDirectory(self._location.child(name))

    def names_file(self) -> bool:
        """Return whether the path is that of a file."""
        return os.path.isfile(self.path)

    def find(self, name: str) -> str:
        """Return the path of a file to read. OSError if a link leads out of the directory."""
        path = self.join(name)
        if self.follows_links or name == self._location.only or not self._has_link(name):
            return path  # the path that the user gives may be a link
        found, root = os.path.realpath(path), os.path.realpath(self.path)
        if os.path.commonpath([found, root]) != root:
            raise OSError(
                errno.EPERM,
                f"is a link that leads out of the directory, to {found}; put the file itself there (cp -L), or set "
                "follow_links: true to export a checkpoint that has such links",
                self.describe(name),
            )
        return path

    def _has_link(self, name: str) -> bool:
        steps = name.split("/")
        return any(os.path.islink(self.join("/".join(steps[:length]))) for length in range(1, len(steps) + 1))

    def _list(self, *, folders: bool) -> Iterator[str]:
        with _possible_path(self.path), os.scandir(self.path) as found:
            yield from (entry.name for entry in found if (_is_folder if folders else _may_be_file)(entry))

    def walk(self) -> Iterator[str]:
        """Yield the paths within the directory of all files below it. Links to directories are not followed."""
        for folder, _, names in os.walk(self.path):
            within = os.path.relpath(folder, self.path)
            yield from (name if within == "." else f"{within}/{name}" for name in names)

    def _look(self, name: str) -> None:
        path = self.join(name) if name else self.path
        with _possible_path(path):
            os.stat(path)

    def _stat(self, name: str) -> FileStat:
        path = self.find(name)
        with _possible_path(path):
            found = os.stat(path)
        trace = trace_of(found, path)
        return FileStat(found.st_size, str(found.st_mtime_ns), found.st_ino, found.st_ctime_ns, trace, found.st_nlink)

    def _read(self, name: str) -> bytes:
        with self.open_reader(name) as reader, open(reader.fd, "rb", closefd=False) as file:
            return file.read()

    def _read_text(self, name: str) -> bytes:
        self._small_size(name)
        with self.open_reader(name) as reader:  # the file may have been replaced since then by a longer one
            return reader.read_text(0, os.fstat(reader.fd).st_size)

    def open_reader(self, name: str) -> RangeReader:
        """Open a file for ranged reads."""
        return LocalReader(self.describe(name), os.open(self.find(name), OPEN_FLAGS))

    def open_stream(self, name: str) -> IO[bytes]:
        """Open a file for a library that reads Python's own file objects."""
        return open(self.find(name), "rb")

    def _make(self) -> None:
        make_directories(self.path)

    def _write(self, name: str, data: bytes) -> None:
        path = self.join(name)
        folder, partial = os.path.dirname(path), path + PARTIAL_SUFFIX
        make_directories(folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)  # if it is a link, its target must not be written to
        try:
            write_new(partial, data)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):  # the first error is the one that the user must see
                os.unlink(partial)
            raise
        try:
            sync_directory(folder)
        except OSError as error:
            self._take_back(name, error)  # the file exists now, but may be lost in a crash
            raise

    def _repeat(self, name: str, there: Directory, original: str, data: bytes) -> bool:
        """Make ``name`` a hard link to the other file, if that is a regular file with this content."""
        path = self.join(name)
        folder, partial = os.path.dirname(path), path + PARTIAL_SUFFIX
        make_directories(folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)
        try:
            os.link(there.join(original), partial, follow_symlinks=False)
        except (
            OSError
        ):  # another file system, one without hard links, no more links of this file, or a file of another user
            return False
        try:
            is_same = _makes_durable(partial, data)  # the new name stays, whatever becomes of the old one
            if is_same:
                os.replace(partial, path)
        finally:
            with contextlib.suppress(FileNotFoundError):  # a rename over a link to the same file does nothing
                os.unlink(partial)
        if is_same:
            sync_directory(folder)
        return is_same

    def _take_back(self, name: str, error: Exception) -> None:
        try:
            self.remove(name)
        except OSError as second:
            raise leftover_error(self.describe(name), error, second) from error

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless one of this name exists; return whether it was written."""
        return self.replace_if(name, data, expected=None)

    def replace_if(self, name: str, data: bytes, *, expected: bytes | None) -> bool:
        """Write a small file if its content is ``expected``, or if there is none (None); return whether it was written.

        Writers take turns by a lock on a file beside it, ``.<name>.lock``, which stays. Readers see no file, or a whole one.
        """
        path = self.join(name)
        make_directories(os.path.dirname(path))
        with open(os.path.join(os.path.dirname(path), f".{os.path.basename(path)}.lock"), "ab") as turn:
            fcntl.flock(turn, fcntl.LOCK_EX)
            if (self.read_text(name) if self.exists(name) else None) != expected:
                return False
            self.write(name, data)
            return True

    def put_file(self, name: str, local: str, note_progress: Callable[[], None]) -> None:
        """Move a file here that is durable and on the same file system; the rename becomes durable too."""
        os.replace(local, self.join(name))
        sync_directory(self.path)
        note_progress()

    def _remove(self, name: str) -> None:
        os.unlink(self.join(name))

    def _remove_tree(self, name: str) -> None:
        shutil.rmtree(self.join(name))

    def is_same_store(self, other: Directory) -> bool:
        """Return whether both are local."""
        return other.is_local

    def is_same(self, other: Directory) -> bool:
        """Return whether both are the same directory, also through symbolic links and bind mounts."""
        if not other.is_local:
            return False
        try:
            return os.path.samefile(self.path, other.path)
        except OSError:  # one of them does not exist yet
            return os.path.realpath(self.path) == os.path.realpath(other.path)

    def why_not_writable(self) -> str | None:
        """Return why no file can be made here; None if no reason is visible without writing."""
        nearest = Path(self.path)
        while not os.path.lexists(nearest) and nearest.parent != nearest:
            nearest = nearest.parent
        if not os.path.isdir(nearest):
            return f"{nearest} is no directory"
        longest = os.pathconf(nearest, "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > longest for part in Path(self.path).parts):
            return f"a name in it is longer than the {longest} bytes that the file system takes"
        return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} cannot be written to"


def leftover_error(where: str, error: Exception, second: Exception) -> TransferError:
    """Return the error for a file whose writing failed (``error``) and whose removal failed too (``second``)."""
    return TransferError(
        f"{where}: writing it failed ({reason_of(error)}), and what may be there of it cannot be "
        f"removed ({reason_of(second)}). Remove it and run the export again"
    )


def _makes_durable(path: str, data: bytes) -> bool:
    """Return whether a path is a regular file with this content, which is durable then."""
    try:
        fd = os.open(path, OPEN_FLAGS | os.O_NOFOLLOW)
    except OSError:  # a symbolic link, or a file that only its owner can read
        return False
    try:
        found = os.fstat(fd)
        if not stat.S_ISREG(found.st_mode) or found.st_size != len(data):
            return False
        offset = 0
        for piece in read_pieces_of(fd):
            if piece != data[offset : offset + len(piece)]:
                return False
            offset += len(piece)
        os.fsync(fd)
        return offset == len(data)
    finally:
        os.close(fd)


@contextlib.contextmanager
def _possible_path(path: str) -> Iterator[None]:
    """Raise FileNotFoundError for a path that no file can have, such as one with a zero byte."""
    try:
        yield
    except ValueError:
        raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), path) from None


def _is_folder(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_dir()
    except OSError:  # a loop of links
        return False


def _may_be_file(entry: os.DirEntry[str]) -> bool:
    try:
        return entry.is_file()
    except OSError:  # a loop of links
        return True
