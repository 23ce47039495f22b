"""Read the files of one package as they were when it was opened, or raise an error. Later changes of its directory are not read.

A package on a disk is replaced by exchanging directories. The directory is therefore held by a descriptor, under which
its files stay until they are removed. A file that is already open can be read even then. On an S3 store, every read is
of the object that existed when the package was opened (``If-Match``). A new file with the same name is never read.
"""

from __future__ import annotations

import contextlib
import errno
import os
import weakref
from collections.abc import Iterable, Iterator, Mapping

import numpy as np

from dist_export.errors import DistExportError, EndedError, PackageError
from dist_export.formats.digests import algorithm_of, digest_bytes, digest_pieces
from dist_export.package.file_pool import FilePool
from dist_export.package.file_state import FileState, can_hash, state_of
from dist_export.package.held_file import HeldFile
from dist_export.package.links import refuse_link_out
from dist_export.storage.directory import Directory, FileStat
from dist_export.storage.local_io import close_quietly, read_pieces_of
from dist_export.storage.range_reader import OPEN_FLAGS, LocalReader, RangeReader
from dist_export.storage.urls import reopen_directory

_MAX_SMALL_BYTES = 4 << 30
_FEW_FILES = 8
"""Up to this many objects are requested one by one. For more, their folders are listed."""


class OpenedFiles:
    """The files of a package. Safe to use from any thread. If a file is missing, damaged or changed, it raises PackageError.

    It has the methods of :class:`~dist_export.storage.directory.Directory` that reading a package needs.
    """

    def __init__(self, directory: Directory) -> None:
        """Hold the directory. Raises OSError if it is missing or cannot be opened."""
        self.url = directory.url
        self._directory = directory
        self._known: dict[str, FileState | None] = {}
        """The recorded state of each file; None if the file was missing."""
        self._digests: dict[str, str] = {}
        """The digests of whole files, as the package states them."""
        self._anchor = ""
        self._pool = FilePool()
        self._pid = os.getpid()
        self._folder = -1
        if directory.is_local:
            self._folder = os.open(directory.path, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
        self._close = weakref.finalize(self, _close_all, self._folder, self._pool)

    # ---- at the opening ----

    def anchor(self, name: str) -> bytes:
        """Return the content of the file that identifies the package. Raises OSError if it cannot be read."""
        self.anchor_unread(name)
        content = self.read_text(name)
        self._digests[name] = digest_bytes(content)
        return content

    def anchor_unread(self, name: str) -> None:
        """Let a file identify the package, without reading it. Raises OSError if it is missing."""
        self._anchor = name
        self._known[name] = self._find(name)
        if self._known[name] is None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.describe(name))

    def vouch(self, digests: Mapping[str, str]) -> None:
        """Add the digests that the package states for its files. They identify a file if only its times change."""
        self._digests.update(digests)

    def note(self, names: Iterable[str]) -> bool:
        """Record the states of files. All later reads are of files in these states.

        On stores other than S3, a state is recorded at the first read of a file, because each one may take a request.

        Returns:
            Whether the files belong to the same package as the anchor.
        """
        if self._directory.is_local or self._directory.s3 is not None:
            self._known |= self._find_all([name for name in names if name not in self._known])
        is_whole = all(known is not None for known in self._known.values()) or self._is_in_place()
        return is_whole and self._is_anchored()

    def hold(self, names: Iterable[str]) -> None:
        """Open files on a disk now, as many as may be kept open. They can be read even after they are removed."""
        if self._folder < 0:
            return
        for name in list(dict.fromkeys(names))[: self._pool.max_files]:
            with contextlib.suppress(OSError, PackageError):  # a later read reports it
                held = self._take(name)
                self._pool.give_back(name, held)
                if self._pool.is_near_limit(held):
                    return

    # ---- reads ----

    def describe(self, name: str) -> str:
        """Return ``name`` with the URL that the user gave, for messages."""
        return self._directory.describe(name)

    def exists(self, name: str) -> bool:
        """Return whether the package had such a file when it was opened."""
        with self._telling(name):
            return self._get_state(name) is not None

    def stat(self, name: str) -> FileStat:
        """Return the recorded size and version of a file."""
        with self._telling(name):
            known = self._require(name)
            return FileStat(known.size, str(known.version))

    def read(self, name: str) -> bytes:
        """Return a whole (small) file."""
        size = self._small_size(name)
        with self.open_reader(name) as reader:
            if reader.is_ranged:
                return reader.fetch(0, size)
            data = bytearray(size)
            reader.read_into(memoryview(data), 0)
            return bytes(data)

    def read_text(self, name: str) -> bytes:
        """Return a whole text file, such as JSON. PackageError if it holds a zero byte: it is damaged."""
        if self._folder < 0:  # a store has no sparse files, and one request is faster than many
            data = self.read(name)
            if 0 in data:
                raise PackageError(f"{self.describe(name)} holds a zero byte where text should be: it is damaged")
            return data
        size = self._small_size(name)
        with self.open_reader(name) as reader:
            return reader.read_text(0, size)

    @contextlib.contextmanager
    def open_reader(self, name: str) -> Iterator[RangeReader]:
        """Open a file for ranged reads. At the end, check that it was the package's file all the time."""
        with self._use(name) as held:
            yield held.reader

    @contextlib.contextmanager
    def open_mapped(self, name: str) -> Iterator[np.ndarray | RangeReader]:
        """Map a file on a disk, as uint8 of shape (num_bytes,). If that is not possible, open it for ranged reads.

        Reading a mapping beyond the end of its file would end the process. So the state of the file is checked before, too. A
        file of a package is only cut short by a program that writes into it; an export replaces files.
        """
        with self._use(name) as held:
            if self._folder >= 0:
                self._refuse_changed(name, held)
            mapping = held.map() if self._folder >= 0 else None
            yield held.reader if mapping is None else mapping

    @contextlib.contextmanager
    def _use(self, name: str) -> Iterator[HeldFile]:
        held: HeldFile | None = None
        with self._telling(name):
            try:
                held = self._take(name)
                yield held
            except (OSError, DistExportError):
                if held is not None:
                    self._refuse_changed(name, held)  # report the change itself, not its consequence
                raise
            else:
                self._refuse_changed(name, held)
            finally:
                if held is not None:
                    self._pool.give_back(name, held)

    def is_current(self) -> bool:
        """Return whether the package is still under its path, and all recorded files are unchanged."""
        if self._anchor not in self._known:
            return True  # no state was recorded, so nothing can have changed
        try:
            if not (self._is_in_place() and self._is_anchored()):
                return False
            found = self._find_all(self._known)
        except OSError:
            return False
        return all(name in found and self._is_same(name, found[name]) for name in list(self._known))

    def close(self) -> None:
        """Close the directory and all files."""
        self._close()

    # ---- within ----

    def _small_size(self, name: str) -> int:
        if (size := self.stat(name).size) <= _MAX_SMALL_BYTES:
            return size
        raise PackageError(f"{self.describe(name)} cannot be read: has {size:,} bytes, too many for what it should be")

    def _get_state(self, name: str) -> FileState | None:
        if name not in self._known:
            found = self._find(name)
            if not self._is_anchored():
                raise OSError(errno.ESTALE, "is another package's")
            self._known[name] = found
        return self._known[name]

    def _require(self, name: str) -> FileState:
        known = self._get_state(name)
        if known is None:
            raise PackageError(f"{self.describe(name)} is missing")
        return known

    def _is_anchored(self) -> bool:
        return self._is_same(self._anchor, self._find(self._anchor))

    def _is_in_place(self) -> bool:
        """Return whether the directory that is held is still the one under the package's path."""
        if self._folder < 0:
            return True
        try:
            return os.path.samestat(os.stat(self._directory.path), os.fstat(self._folder))
        except FileNotFoundError:
            return False

    def _survive_fork(self) -> None:
        """In a forked child, take a lock that no thread of the parent holds, and for a store a connection of its own."""
        if self._pid != os.getpid():
            self._pid = os.getpid()
            self._pool.survive_fork()
            if self._folder < 0:
                self._directory = reopen_directory(self._directory)

    def _find(self, name: str) -> FileState | None:
        self._survive_fork()
        try:
            return self._look(name)
        except (FileNotFoundError, NotADirectoryError):
            return None

    def _find_all(self, names: Iterable[str]) -> dict[str, FileState | None]:
        """Return the states of files; None for a missing file. A file whose state cannot be read is left out."""
        wanted, s3 = list(names), self._directory.s3
        found: dict[str, FileState | None] = {}
        if s3 is None or len(wanted) <= _FEW_FILES:
            for name in wanted:
                with contextlib.suppress(OSError):  # a later read reports it
                    found[name] = self._find(name)
            return found
        by_folder: dict[str, list[str]] = {}
        for name in wanted:
            by_folder.setdefault(os.path.dirname(name), []).append(name)
        for folder, its in by_folder.items():
            listed = dict(s3.objects(self._directory.join(folder) if folder else self._directory.path))
            for name in its:
                stat_found = listed.get(os.path.basename(name))
                found[name] = None if stat_found is None else FileState(stat_found.size, (stat_found.etag,))
        return found

    def _look(self, name: str) -> FileState:
        if self._folder < 0:
            found = self._directory.stat(name)
            return FileState(found.size, (found.version,))
        return state_of(os.stat(name, dir_fd=self._folder))

    def _take(self, name: str) -> HeldFile:
        """Open a file, or return it if it is open. Raises OSError: ESTALE if it is not in the recorded state."""
        self._survive_fork()
        if (held := self._pool.take(name)) is not None:
            return held
        known = self._require(name)
        if self._folder < 0:
            return HeldFile(self._open_in_store(name, known))
        fd = self._open(name)
        if not (known.is_same(now := state_of(os.fstat(fd))) or self._has_content(name, now, fd)):
            close_quietly(fd)
            raise OSError(errno.ESTALE, "has changed")
        return self._pool.keep(name, LocalReader(self.describe(name), fd))

    def _open_in_store(self, name: str, known: FileState) -> RangeReader:
        directory = self._directory
        if directory.s3 is None:
            return directory.open_reader(name)
        from dist_export.storage.s3_reader import S3Reader

        return S3Reader(self.describe(name), directory.s3, directory.join(name), etag=str(known.version[0]))

    def _open(self, name: str) -> int:
        try:
            fd = os.open(name, OPEN_FLAGS, dir_fd=self._folder)
        except OSError as error:
            if error.errno not in (errno.EMFILE, errno.ENFILE):
                raise
            self._pool.close_unused()
            fd = os.open(name, OPEN_FLAGS, dir_fd=self._folder)
        try:
            if not self._directory.follows_links:
                refuse_link_out(name, fd, self._folder)
        except OSError:
            close_quietly(fd)
            raise
        return fd

    def _refuse_changed(self, name: str, held: HeldFile) -> None:
        """Raise OSError (ESTALE) if a file changed while it was read. S3 checks this for each request."""
        if self._directory.s3 is not None:
            return
        now = self._find(name) if self._folder < 0 else state_of(os.fstat(held.reader.fd))
        if not self._is_same(name, now, held.reader.fd):
            raise OSError(errno.ESTALE, "has changed")

    def _is_same(self, name: str, now: FileState | None, fd: int = -1) -> bool:
        """Return whether a file in the state ``now`` is the package's. ``fd`` is its descriptor; -1 if it is not open."""
        known = self._known[name]
        if known is None or now is None:
            return known is now is None
        if known.is_same(now):
            return True
        if fd >= 0 or not known.may_be_same(now):
            return self._has_content(name, now, fd)
        try:
            fd = self._open(name)
        except OSError:
            return False
        try:
            return self._has_content(name, now, fd)
        finally:
            close_quietly(fd)

    def _has_content(self, name: str, now: FileState, fd: int) -> bool:
        """Return whether a file of which only the times changed has the content that the package states.

        The whole file is read for this. If it has that content, its new state is recorded, so each change costs one read.
        """
        known, stated = self._known[name], self._digests.get(name, "")
        if known is None or fd < 0 or not known.may_be_same(now) or not can_hash(stated):
            return False
        if digest_pieces(read_pieces_of(fd), algorithm_of(stated)) != stated or state_of(os.fstat(fd)) != now:
            return False
        self._known[name] = now
        return True

    @contextlib.contextmanager
    def _telling(self, name: str) -> Iterator[None]:
        """Turn errors of a disk or a store into PackageError. After ``close``, the descriptors may be other files'."""
        if not self._close.alive:
            raise PackageError(f"{self.url}: the package was closed; open it again")
        try:
            yield
        except EndedError as error:
            raise PackageError(f"{error.fact}: it is damaged") from error
        except OSError as error:
            if error.errno not in (errno.ENOENT, errno.ENOTDIR, errno.ESTALE):
                raise PackageError(f"{self.describe(name)} cannot be read: {error.strerror or error}") from error
            what = "has changed" if error.errno == errno.ESTALE else "is gone"
            raise PackageError(
                f"{self.describe(name)} {what} since the package was opened, so it was replaced; open it again"
            ) from error


def _close_all(folder: int, pool: FilePool) -> None:
    pool.close()
    if folder >= 0:
        close_quietly(folder)
