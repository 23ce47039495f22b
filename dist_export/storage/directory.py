"""A directory of any store: listing, ranged reads, files that appear whole.

Each back end is a subclass in a module of its own, which gives the primitives: :class:`LocalDirectory`,
:class:`S3Directory`, :class:`FsspecDirectory`. :func:`dist_export.storage.urls.open_directory` returns the right one.
"""

from __future__ import annotations

import contextlib
import errno
import os
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import IO, TYPE_CHECKING, Any

from dist_export.formats.digests import XXH3, digest_pieces
from dist_export.redact import conceal
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.local_io import naming_any
from dist_export.storage.range_reader import RangeReader

if TYPE_CHECKING:
    from dist_export.storage.s3 import S3

_MAX_SMALL_BYTES = 4 << 30
_SHOWN_FOLDERS = 6

PARTIAL_SUFFIX = ".partial"

WORK_DIRECTORY = ".dist_export"
"""In the target, while an export is not committed: its lock, and a receipt for each shard that is whole."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """Size in bytes, and a version text that changes when the content does (mtime in ns, or a store's etag)."""

    size: int
    version: str
    inode: int = 0
    """Of a local file."""
    changed: int = 0
    """Of a local file: when its inode was changed last, in ns. No program can set it back."""
    trace: tuple[int, ...] = ()
    """Of the two the ones that the file system keeps: see :func:`~dist_export.storage.file_systems.trace_of`."""
    links: int = 0
    """Of a local file: its names. One more or less changes the inode, and not the content."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a directory is, and how it is reached."""

    given: str
    """The URL as it was given, with its credentials."""
    path: str
    """On its file system."""
    storage_options: dict[str, Any] | None = None
    follow_links: bool = False
    only: str | None = None
    """The file that the URL names: the directory is taken to hold that file alone, whatever else lies there."""

    def child(self, name: str) -> Location:
        """Return the location of the directory ``name`` in this one."""
        return Location(
            f"{self.given.rstrip('/')}/{name}", f"{self.path}/{name}", self.storage_options, self.follow_links
        )


class Directory:
    """One directory. Cheap to build; touches nothing until asked. Errors are OSErrors that name the file.

    What is read lies in the directory: a link that leads out of it is an OSError, unless links are followed. The
    directory itself may be a link.
    """

    is_local = False
    """Whether it is read and written with plain system calls."""
    s3: S3 | None = None
    """The store's own requests, where it speaks S3."""
    is_shared = True
    """Whether other processes see what is written here."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self.url = conceal(location.given)
        """As it was given, without credentials."""
        self.path = location.path

    # ---- what a back end gives ----

    def child(self, name: str) -> Directory:
        """Return the directory ``name`` in this one."""
        raise NotImplementedError

    def _list(self, *, folders: bool) -> Iterable[str]:
        """Yield the names of the files, or of the directories, directly in the directory. FileNotFoundError for none."""
        raise NotImplementedError

    def walk(self) -> Iterator[str]:
        """Yield the paths within the directory of all files in it and below it, in no order that is promised."""
        raise NotImplementedError

    def _look(self, name: str) -> None:
        """Raise FileNotFoundError or NotADirectoryError unless ``name`` (the directory itself for "") is there."""
        raise NotImplementedError

    def _stat(self, name: str) -> FileStat:
        raise NotImplementedError

    def _read(self, name: str) -> bytes:
        """Return a whole file."""
        raise NotImplementedError

    def open_reader(self, name: str) -> RangeReader:
        """Open a file for ranged reads."""
        raise NotImplementedError

    def open_stream(self, name: str) -> IO[bytes]:
        """Open a file for a library that reads Python's own file objects."""
        raise NotImplementedError

    def _make(self) -> None:
        raise NotImplementedError

    def _write(self, name: str, data: bytes) -> None:
        raise NotImplementedError

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless there is one of this name; return whether it was written."""
        raise NotImplementedError

    def put_file(self, name: str, local: str, note_progress: Callable[[], None]) -> None:
        """Put a local file here under ``name``; ``note_progress`` is called now and then meanwhile."""
        raise NotImplementedError

    def _remove(self, name: str) -> None:
        raise NotImplementedError

    def _remove_tree(self, name: str) -> None:
        raise NotImplementedError

    def is_same_store(self, other: Directory) -> bool:
        """Whether both are reached through one file system with the same options."""
        raise NotImplementedError

    def is_same(self, other: Directory) -> bool:
        """Whether both are one directory, different spellings included."""
        return self.is_same_store(other) and self.path == other.path

    def why_not_there(self) -> str | None:
        """Return why nothing can be here, where that is known to have another reason than that nobody wrote it."""
        return None

    def why_not_writable(self) -> str | None:
        """Return why no file could be made here, as far as can be seen without writing; None where it can."""
        return self.why_not_there()

    # ---- names ----

    @property
    def storage_options(self) -> dict[str, Any] | None:
        """What the store was opened with."""
        return self._location.storage_options

    @property
    def follows_links(self) -> bool:
        """Whether links that lead out of the directory are read."""
        return self._location.follow_links

    def names_file(self) -> bool:
        """Return whether the path is that of a file. Asks the store."""
        raise NotImplementedError

    @property
    def is_file(self) -> bool:
        """Whether the URL is that of a file."""
        return self._location.only is not None

    def locate(self, name: str) -> str:
        """Return the URL of ``name`` as it can be opened: with what was given, credentials included. Not for messages."""
        return f"{self._location.given.rstrip('/')}/{name}"

    def join(self, name: str) -> str:
        """Return the path of ``name`` on this directory's file system."""
        return f"{self.path}/{name}"

    def find(self, name: str) -> str:
        """Return the path of a file that is to be read. OSError where a link leads out of the directory."""
        return self.join(name)

    def describe(self, name: str) -> str:
        """Return ``name`` with the URL as the user gave it, for messages."""
        return self.url if name == self._location.only else f"{self.url.rstrip('/')}/{name}"

    # ---- looking ----

    def names(self) -> list[str]:
        """Return the names of all files directly in the directory, sorted; empty where there is no directory.

        A loop of links counts as a file: opening it tells what is wrong.
        """
        if self._location.only is not None:
            return [self._location.only]
        try:
            with naming_any(self.url):
                return sorted(self._list(folders=False))
        except FileNotFoundError:
            return []

    def folders(self) -> list[str]:
        """Return the names of all directories directly in the directory, sorted; empty where there is no directory."""
        if self._location.only is not None:
            return []
        try:
            with naming_any(self.url):
                return sorted(self._list(folders=True))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str = "") -> bool:
        """Return whether ``name`` (the directory itself by default) is there. OSError where the system does not tell.

        An error is no absence: a package that cannot be looked at would be overwritten.
        """
        if self._hides(name):
            return False
        try:
            with naming_any(self.describe(name) if name else self.url):
                self._look(name)
        except (FileNotFoundError, NotADirectoryError):
            return False
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):  # nothing can be under such a path
                return False
            raise
        return True

    def stat(self, name: str) -> FileStat:
        """Return size and version of a file. FileNotFoundError where there is none."""
        if self._hides(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.describe(name))
        with naming_any(self.describe(name)):
            return self._stat(name)

    def _hides(self, name: str) -> bool:
        return self._location.only is not None and name not in ("", self._location.only)

    def stat_many(self, names: Iterable[str]) -> dict[str, FileStat]:
        """Return size and version of files directly in the directory. FileNotFoundError where one is missing."""
        wanted = list(names)
        found = self.find_many(wanted)
        missing = next((name for name in wanted if name not in found), None)
        if missing is not None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.describe(missing))
        return found

    def find_many(self, names: Iterable[str]) -> dict[str, FileStat]:
        """Return what :meth:`stat_many` does, without those that are missing."""
        found: dict[str, FileStat] = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = self.stat(name)
        return found

    # ---- reading ----

    def read(self, name: str) -> bytes:
        """Return a whole (small) file. OSError for one that is no regular file, or larger than any index can be."""
        size = self._small_size(name)
        with naming_any(self.describe(name)):
            data = self._read(name)
        if len(data) != size:
            raise OSError(errno.EIO, "changes while it is being read", self.describe(name))
        return data

    def read_text(self, name: str) -> bytes:
        """Return a whole text file, such as JSON. OSError as :meth:`read`, and where a byte is zero."""
        return self._read_text(name)

    def _read_text(self, name: str) -> bytes:
        data = self.read(name)  # a store has no sparse files, and answers one request sooner than many
        if 0 in data:
            raise OSError(errno.EILSEQ, "holds a zero byte where text should be: it is damaged", self.describe(name))
        return data

    def _small_size(self, name: str) -> int:
        size = self.stat(name).size
        if size > _MAX_SMALL_BYTES:
            raise OSError(errno.EFBIG, f"has {size:,} bytes, too many for what it should be", self.describe(name))
        return size

    # ---- writing ----

    def make(self) -> None:
        """Create the directory and its parents."""
        with naming_any(self.url):
            self._make()

    def write(self, name: str, data: bytes) -> None:
        """Write a small file that appears whole and durable, or not at all; ``name`` may lie in a subdirectory.

        Raises:
            OSError: it could not be written, and is not there.
            TransferError: the same, but what may be there of it could not be removed.
        """
        where = self.describe(name)
        with ACTIVITY.of(where), naming_any(where):
            self._write(name, data)

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError), naming_any(self.describe(name)):
            self._remove(name)

    def remove_tree(self, name: str) -> None:
        """Remove a directory with all that is in it, if it is there."""
        with contextlib.suppress(FileNotFoundError), naming_any(self.describe(name)):
            self._remove_tree(name)

    # ---- for messages ----

    def say_missing(self) -> str:
        """Return what to say of a directory that holds nothing: that it is not there, or its bucket is not, or it is empty.

        OSError where the system does not tell.
        """
        return "holds no files" if self.exists() else self.why_not_there() or "does not exist"

    def tell_folders(self) -> str:
        """Return a sentence for an error about what is not here: it may lie in a directory here. Empty where there is none."""
        folders = self.folders()
        if len(folders) < 2:
            return f". It holds the directory {folders[0]}: give that" if folders else ""
        more = f" and {len(folders) - _SHOWN_FOLDERS} more" if len(folders) > _SHOWN_FOLDERS else ""
        return f". It holds the directories {', '.join(folders[:_SHOWN_FOLDERS])}{more}: give one of them"


def digest_file(directory: Directory, name: str, algorithm: str = XXH3) -> str:
    """Return the digest of a file, read once through a small buffer."""
    return digest_pieces(read_pieces(directory, name), algorithm)


def read_pieces(directory: Directory, name: str) -> Iterator[memoryview]:
    """Yield a file's content from begin to end, over one reused buffer of 1 MiB."""
    size = directory.stat(name).size
    buffer = memoryview(bytearray(min(1 << 20, max(size, 1))))
    with directory.open_reader(name) as reader, reader.ahead(0, size) as stream:
        for offset in range(0, size, len(buffer)):
            piece = buffer[: min(len(buffer), size - offset)]
            stream.read_into(piece)
            yield piece


def local_tree(folder: Path) -> list[str]:
    """Return the relative paths (forward slashes) of all files below ``folder``, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
