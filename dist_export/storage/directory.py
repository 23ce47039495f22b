"""A directory of any store: listing, ranged reads, and files that appear whole.

Each back end is a subclass in its own module, which implements the primitives: :class:`LocalDirectory`,
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
from dist_export.formats.tuning import STANDARD
from dist_export.redact import redact_text
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.local_io import naming_any
from dist_export.storage.range_reader import RangeReader

if TYPE_CHECKING:
    from dist_export.storage.s3 import S3

_MAX_SMALL_BYTES = 4 << 30
_MOST_READS = 10
_SHOWN_FOLDERS = 6

PARTIAL_SUFFIX = ".partial"

WORK_DIRECTORY = ".dist_export"
"""In the target, while an export is not committed: its lock, and a receipt for each finished shard."""


@dataclass(frozen=True, slots=True)
class FileStat:
    """Size in bytes, and a version text that changes when the content does (mtime in ns, or a store's etag)."""

    size: int
    version: str
    inode: int = 0
    """Only for a local file."""
    changed: int = 0
    """Only for a local file: when its inode last changed, in ns. No program can set it back."""
    trace: tuple[int, ...] = ()
    """The inode and the change time, if the file system keeps them: see :func:`~dist_export.storage.file_systems.trace_of`."""
    links: int = 0
    """Only for a local file: the number of its names. A new or removed name changes the inode, but not the content."""


@dataclass(frozen=True, slots=True)
class Location:
    """Where a directory is, and how to reach it."""

    given: str
    """The URL as the user gave it, with its credentials."""
    path: str
    """The path on its file system."""
    storage_options: dict[str, Any] | None = None
    follow_links: bool = False
    only: str | None = None
    """The file that the URL names. The directory then shows only that file, whatever else it holds."""

    def child(self, name: str) -> Location:
        """Return the location of the directory ``name`` in this one."""
        return Location(
            f"{self.given.rstrip('/')}/{name}", f"{self.path}/{name}", self.storage_options, self.follow_links
        )


class Directory:
    """One directory. Cheap to build; does nothing until a method is called. Errors are OSErrors that name the file.

    A file that is read must be in the directory. A link that leads out of it is an OSError, unless links are followed. The
    directory itself may be a link.
    """

    is_local = False
    """Whether it is read and written with plain system calls."""
    s3: S3 | None = None
    """The store's own requests, if it speaks S3."""
    is_shared = True
    """Whether other processes see what is written here."""

    def __init__(self, location: Location) -> None:
        self._location = location
        self.url = redact_text(location.given)
        """The URL as the user gave it, without credentials."""
        self.path = location.path

    # ---- what a back end implements ----

    def child(self, name: str) -> Directory:
        """Return the directory ``name`` in this one."""
        raise NotImplementedError

    def _list(self, *, folders: bool) -> Iterable[str]:
        """Yield the names of the files, or of the directories, directly in the directory. FileNotFoundError if it is missing."""
        raise NotImplementedError

    def walk(self) -> Iterator[str]:
        """Yield the paths within the directory of all files in it and below it, in no particular order."""
        raise NotImplementedError

    def _look(self, name: str) -> None:
        """Raise FileNotFoundError or NotADirectoryError unless ``name`` (the directory itself for "") exists."""
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
        """Write a small file unless one of this name exists; return whether it was written."""
        raise NotImplementedError

    def replace_if(self, name: str, data: bytes, *, expected: bytes | None) -> bool:
        """Write a small file if its content is ``expected``, or if there is none (None); return whether it was written.

        Of several processes that expect the same content one writes: on a disk, and where a store speaks S3. On other stores
        nothing excludes a process that writes between the look and the write. ``data`` must be unlike what any other process
        writes.
        """
        found = self.read_text(name) if self.exists(name) else None
        if found != expected:
            return False
        if expected is None:
            return self.create(name, data)
        self.write(name, data)
        return True

    def put_file(self, name: str, local: str, note_progress: Callable[[], None]) -> None:
        """Put a local file here under ``name``; ``note_progress`` is called from time to time."""
        raise NotImplementedError

    def _remove(self, name: str) -> None:
        raise NotImplementedError

    def _remove_tree(self, name: str) -> None:
        raise NotImplementedError

    def is_same_store(self, other: Directory) -> bool:
        """Return whether both are reached through one file system with the same options."""
        raise NotImplementedError

    def is_same(self, other: Directory) -> bool:
        """Return whether both are the same directory, even if they are spelled differently."""
        return self.is_same_store(other) and self.path == other.path

    def why_not_there(self) -> str | None:
        """Return why nothing can be here, if a cause is known other than that nobody wrote it."""
        return None

    def why_not_writable(self) -> str | None:
        """Return why no file can be made here; None if no reason is visible without writing."""
        return self.why_not_there()

    # ---- names ----

    @property
    def location(self) -> Location:
        """Where it is, and how to reach it. With credentials: not for messages."""
        return self._location

    @property
    def storage_options(self) -> dict[str, Any] | None:
        """The options that the store was opened with."""
        return self._location.storage_options

    @property
    def follows_links(self) -> bool:
        """Whether links that lead out of the directory are followed."""
        return self._location.follow_links

    def names_file(self) -> bool:
        """Return whether the path is that of a file. Sends a request to a store."""
        raise NotImplementedError

    @property
    def is_file(self) -> bool:
        """Whether the URL names a file."""
        return self._location.only is not None

    def locate(self, name: str) -> str:
        """Return the URL of ``name`` in the form that can be opened, credentials included. Not for messages."""
        return f"{self._location.given.rstrip('/')}/{name}"

    def join(self, name: str) -> str:
        """Return the path of ``name`` on this directory's file system."""
        return f"{self.path}/{name}"

    def find(self, name: str) -> str:
        """Return the path of a file to read. OSError if a link leads out of the directory."""
        return self.join(name)

    def describe(self, name: str) -> str:
        """Return ``name`` with the URL as the user gave it, for messages."""
        return self.url if name == self._location.only else f"{self.url.rstrip('/')}/{name}"

    # ---- listing ----

    def names(self) -> list[str]:
        """Return the names of all files directly in the directory, sorted; empty if the directory does not exist.

        A loop of links counts as a file: the error comes when it is opened.
        """
        if self._location.only is not None:
            return [self._location.only]
        try:
            with naming_any(self.url):
                return sorted(self._list(folders=False))
        except FileNotFoundError:
            return []

    def folders(self) -> list[str]:
        """Return the names of all directories directly in the directory, sorted; empty if it does not exist."""
        if self._location.only is not None:
            return []
        try:
            with naming_any(self.url):
                return sorted(self._list(folders=True))
        except (FileNotFoundError, NotADirectoryError):
            return []

    def exists(self, name: str = "") -> bool:
        """Return whether ``name`` (the directory itself by default) exists. OSError if the system cannot answer.

        An error does not mean that it is missing: otherwise a package that cannot be read would be overwritten.
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
        """Return size and version of a file. FileNotFoundError if it does not exist."""
        if self._hides(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.describe(name))
        with naming_any(self.describe(name)):
            return self._stat(name)

    def _hides(self, name: str) -> bool:
        return self._location.only is not None and name not in ("", self._location.only)

    def stat_many(self, names: Iterable[str]) -> dict[str, FileStat]:
        """Return size and version of files directly in the directory. FileNotFoundError if one is missing."""
        wanted = list(names)
        found = self.find_many(wanted)
        missing = next((name for name in wanted if name not in found), None)
        if missing is not None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.describe(missing))
        return found

    def find_many(self, names: Iterable[str]) -> dict[str, FileStat]:
        """Return the same as :meth:`stat_many`, but leave out the files that are missing."""
        found: dict[str, FileStat] = {}
        for name in names:
            with contextlib.suppress(FileNotFoundError):
                found[name] = self.stat(name)
        return found

    # ---- reading ----

    def read(self, name: str) -> bytes:
        """Return a whole (small) file. OSError if it is no regular file, or has more than 4 GiB."""
        for _ in range(_MOST_READS):  # between the two requests it may be replaced, as current.json is
            size = self._small_size(name)
            with naming_any(self.describe(name)):
                data = self._read(name)
            if len(data) == size:
                return data
        raise OSError(errno.EIO, "changes while it is being read", self.describe(name))

    def read_text(self, name: str) -> bytes:
        """Return a whole text file, such as JSON. OSError as :meth:`read`, and if a byte is zero."""
        return self._read_text(name)

    def _read_text(self, name: str) -> bytes:
        data = self.read(name)  # a store has no sparse files, and one request is faster than many
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
        """Write a small file that appears whole and durable, or not at all; ``name`` may be in a subdirectory.

        Raises:
            OSError: it could not be written, and does not exist.
            TransferError: it could not be written, and what may be left of it could not be removed.
        """
        where = self.describe(name)
        with ACTIVITY.of(where), naming_any(where):
            self._write(name, data)

    def write_again(self, name: str, original: str, data: bytes, there: Directory | None = None) -> None:
        """Do as :meth:`write`; if ``original``, of ``there`` or of this directory, has this content, by a link or store copy."""
        where = self.describe(name)
        with ACTIVITY.of(where), naming_any(where):
            if not self._repeat(name, there or self, original, data):
                self._write(name, data)

    def _repeat(self, name: str, there: Directory, original: str, data: bytes) -> bool:
        """Write ``name`` as ``original`` without sending ``data``; return whether that holds ``data`` and it was possible."""
        del name, there, original, data
        return False

    def remove(self, name: str) -> None:
        """Remove a file if it exists."""
        with contextlib.suppress(FileNotFoundError), naming_any(self.describe(name)):
            self._remove(name)

    def remove_tree(self, name: str) -> None:
        """Remove a directory with all its content, if it exists."""
        with contextlib.suppress(FileNotFoundError), naming_any(self.describe(name)):
            self._remove_tree(name)

    # ---- for messages ----

    def say_missing(self) -> str:
        """Return the end of a sentence about a directory without files: why there are none. OSError if nobody answers."""
        return "holds no files" if self.exists() else self.why_not_there() or "does not exist"

    def tell_folders(self) -> str:
        """Return a sentence for an error about a missing file: it may be in one of these directories. Empty if there are none."""
        folders = self.folders()
        if len(folders) < 2:
            which = f"versions:{self.url}" if folders == ["versions"] else "that"  # where packages are published
            return f". It holds the directory {folders[0]}: give {which}" if folders else ""
        more = f" and {len(folders) - _SHOWN_FOLDERS} more" if len(folders) > _SHOWN_FOLDERS else ""
        return f". It holds the directories {', '.join(folders[:_SHOWN_FOLDERS])}{more}: give one of them"


def digest_file(
    directory: Directory, name: str, algorithm: str = XXH3, *, chunk_bytes: int = STANDARD.chunk_bytes
) -> str:
    """Return the digest of a file. The file is read once, through a small buffer."""
    size = directory.stat(name).size
    with directory.open_reader(name) as reader:
        return digest_pieces(pieces_of(reader, size), algorithm, chunk_bytes=chunk_bytes)


def pieces_of(reader: RangeReader, num_bytes: int, begin: int = 0) -> Iterator[memoryview]:
    """Yield ``num_bytes`` bytes of an open file from byte ``begin`` on, in one reused buffer of 1 MiB."""
    buffer = memoryview(bytearray(min(1 << 20, max(num_bytes, 1))))
    with reader.ahead(begin, num_bytes) as stream:
        for offset in range(0, num_bytes, len(buffer)):
            piece = buffer[: min(len(buffer), num_bytes - offset)]
            stream.read_into(piece)
            yield piece


def local_tree(folder: Path) -> list[str]:
    """Return the relative paths (forward slashes) of all files below ``folder``, sorted."""
    return sorted(path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file())
