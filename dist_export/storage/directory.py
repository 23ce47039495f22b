"""Directories behind fsspec URLs: listing, ranged reads, files that appear whole.

A local directory is read and written with plain system calls; anything else goes through fsspec. Where a store cannot
write at a position, files are built in a local staging directory and put up whole.
"""

from __future__ import annotations

import contextlib
import errno
import os
import shutil
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from dist_export.errors import ConfigError, TransferError
from dist_export.formats.digests import XXH3, digest_pieces
from dist_export.redact import conceal, first_line, note_secrets, reason_of
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage import s3
from dist_export.storage.file_systems import trace_of
from dist_export.storage.local_io import make_directories, naming_any, sync_directory, write_new
from dist_export.storage.range_reader import OPEN_FLAGS, FileReader, LocalReader, RangeReader
from dist_export.storage.s3_reader import S3Reader

_MAX_SMALL_BYTES = 4 << 30
_FEW_FILES = 8
"""So many are asked for one by one: the directory may hold thousands of others."""
_SHOWN_FOLDERS = 6

PARTIAL_SUFFIX = ".partial"

WORK_DIRECTORY = ".dist_export"
"""In the target, while an export is not committed: its lock, and a receipt for each shard that is whole."""


_PACKAGES = {
    "s3": "s3fs (the extra [s3] of dist_export)",
    "s3a": "s3fs (the extra [s3] of dist_export)",
    "gs": "gcsfs",
    "gcs": "gcsfs",
    "az": "adlfs",
    "abfs": "adlfs",
    "abfss": "adlfs",
    "oss": "ossfs",
    "hdfs": "pyarrow",
}
"""What pip installs for a protocol whose fsspec package is missing."""

STORES = tuple(sorted({"file", "memory", *_PACKAGES}))
"""Protocols of stores, for messages; fsspec has more."""


def known_protocols() -> set[str]:
    """Return the protocols of all fsspec URLs that could be opened, those whose package is missing included."""
    return {*fsspec.available_protocols(), *fsspec.registry}


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


class Directory:
    """One directory behind an fsspec URL. Cheap to build; touches nothing until asked.

    What is read lies in the directory: a link that leads out of it is an OSError, unless ``follow_links``. The directory
    itself may be a link.
    """

    def __init__(
        self,
        url: str | os.PathLike[str],
        storage_options: dict[str, Any] | None = None,
        *,
        follow_links: bool = False,
        is_file: bool = False,
    ) -> None:
        """With ``is_file`` the URL is a file's: its directory is taken to hold that file alone, whatever else lies there."""
        given = os.fspath(url)
        self.url = conceal(given)
        """As it was given, without credentials."""
        self._given = given
        if not isinstance(storage_options, (Mapping, type(None))):
            raise ConfigError(f"{self.url}: storage_options is a {type(storage_options).__name__}, expected a mapping")
        note_secrets(storage_options)
        self.storage_options = storage_options
        self._follow_links = follow_links
        if "::" in given:
            # an alias could hide that the target is the source, whose files would then be overwritten
            raise ConfigError(f"{self.url}: chained URLs are not taken; give the URL of the store itself")
        protocol = given.partition("://")[0] if "://" in given else "file"
        try:
            self.fs, path = fsspec.core.url_to_fs(given, **s3.adapt_options(protocol, storage_options or {}))
        except ImportError as error:
            package = _PACKAGES.get(protocol)
            advice = f"pip install {package}" if package else "install the fsspec package of this store"
            raise ConfigError(
                f"{self.url}: the package that {protocol}:// needs is missing ({first_line(error)}): {advice}"
            ) from error
        except Exception as error:  # options go to a store's own code, which may raise anything
            raise ConfigError(f"{self.url}: no file system for this URL: {first_line(error)}") from error
        self.is_local: bool = isinstance(self.fs, LocalFileSystem)
        self.path = os.path.abspath(path) if self.is_local else path.rstrip("/")
        self._only: str | None = None
        if is_file:
            self.path, _, self._only = self.path.rpartition("/")
        self.s3 = s3.connect(self.fs)
        """The store's own requests, where it speaks S3."""
        if self.s3 is not None and not self.path.partition("/")[0]:
            raise ConfigError(f"{self.url}: names no bucket; expected {protocol}://BUCKET/PREFIX")

    @property
    def is_shared(self) -> bool:
        """Whether other processes see what is written here. ``memory://`` lives in one process."""
        return "memory" not in (self.fs.protocol if isinstance(self.fs.protocol, tuple) else (self.fs.protocol,))

    @property
    def follows_links(self) -> bool:
        """Whether links that lead out of the directory are read."""
        return self._follow_links

    @property
    def is_file(self) -> bool:
        """Whether the URL is that of a file."""
        return self._only is not None

    def child(self, name: str) -> Directory:
        """Return the directory ``name`` in this one."""
        return Directory(self.locate(name), self.storage_options, follow_links=self._follow_links)

    def locate(self, name: str) -> str:
        """Return the URL of ``name`` as it can be opened: with what was given, credentials included. Not for messages."""
        return f"{self._given.rstrip('/')}/{name}"

    def join(self, name: str) -> str:
        """Return the path of ``name`` on this directory's file system."""
        return f"{self.path}/{name}"

    def find(self, name: str) -> str:
        """Return the local path of a file that is to be read. OSError where a link leads out of the directory."""
        path = self.join(name)
        if self._follow_links or name == self._only or not self._has_link(name):
            return path  # what the user names may be a link, as the directory itself may be
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

    def describe(self, name: str) -> str:
        """Return ``name`` with the URL as the user gave it, for messages."""
        return self.url if name == self._only else f"{self.url.rstrip('/')}/{name}"

    def names(self) -> list[str]:
        """Return the names of all files directly in the directory, sorted; empty where there is no directory.

        A loop of links counts as a file: opening it tells what is wrong.
        """
        if self._only is not None:
            return [self._only]
        try:
            if self.is_local:  # fsspec takes a symbolic link to a file for no file
                with os.scandir(self.path) as found:
                    return sorted(entry.name for entry in found if _may_be_file(entry))
            with naming_any(self.url):
                if self.s3 is not None:
                    return [name for name, _ in self.s3.objects(self.path)]
                entries = self.fs.ls(self.path, detail=True)
        except (FileNotFoundError, ValueError):  # the latter: a path with a zero byte
            return []
        return sorted(PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "file")

    def folders(self) -> list[str]:
        """Return the names of all directories directly in the directory, sorted; empty where there is no directory."""
        if self._only is not None:
            return []
        try:
            if self.is_local:
                with os.scandir(self.path) as found:
                    return sorted(entry.name for entry in found if _is_folder(entry))
            with naming_any(self.url):
                if self.s3 is not None:
                    return sorted(self.s3.folders(self.path))
                entries = self.fs.ls(self.path, detail=True)
        except (FileNotFoundError, NotADirectoryError, ValueError):
            return []
        return sorted(PurePosixPath(entry["name"]).name for entry in entries if entry["type"] == "directory")

    def exists(self, name: str = "") -> bool:
        """Return whether ``name`` (the directory itself by default) is there. OSError where the system does not tell.

        Not by ``fs.exists``, for which an error is an absence: a package that cannot be looked at would be overwritten.
        """
        path = self.join(name) if name else self.path
        if self._hides(name):
            return False
        try:
            if self.is_local:
                os.stat(path)
            else:
                with naming_any(self.describe(name)):
                    if self.s3 is not None:
                        return self._exists_on_s3(name)
                    self.fs.info(path)
        except (FileNotFoundError, NotADirectoryError, ValueError):  # the last: a path with a zero byte
            return False
        except OSError as error:
            if error.errno in (errno.ELOOP, errno.ENAMETOOLONG):  # nothing can be under such a path
                return False
            raise
        return True

    def _exists_on_s3(self, name: str) -> bool:
        assert self.s3 is not None
        if not name:
            return self.s3.has_any(self.path)
        try:
            self.s3.head(self.join(name))
        except FileNotFoundError:
            return self.s3.has_any(self.join(name))
        return True

    def stat_many(self, names: Iterable[str]) -> dict[str, FileStat]:
        """Return size and version of files directly in the directory. FileNotFoundError where one is missing.

        On S3 it takes a request for each thousand files that are there, not one for each file.
        """
        wanted = list(names)
        found = self.find_many(wanted)
        missing = next((name for name in wanted if name not in found), None)
        if missing is not None:
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.describe(missing))
        return found

    def find_many(self, names: Iterable[str]) -> dict[str, FileStat]:
        """Return what :meth:`stat_many` does, without those that are missing."""
        wanted = list(names)
        found: dict[str, FileStat] = {}
        if self.s3 is None or len(wanted) < _FEW_FILES:
            for name in wanted:
                with contextlib.suppress(FileNotFoundError):
                    found[name] = self.stat(name)
            return found
        with naming_any(self.url):
            listed = dict(self.s3.objects(self.path))
        return {name: FileStat(*listed[name]) for name in wanted if name in listed}

    def stat(self, name: str) -> FileStat:
        """Return size and version of a file. FileNotFoundError where there is none."""
        if self._hides(name):
            raise FileNotFoundError(errno.ENOENT, os.strerror(errno.ENOENT), self.describe(name))
        if self.is_local:
            path = self.find(name)
            found = os.stat(path)
            trace = trace_of(found, path)
            return FileStat(
                found.st_size, str(found.st_mtime_ns), found.st_ino, found.st_ctime_ns, trace, found.st_nlink
            )
        with naming_any(self.describe(name)):
            if self.s3 is not None:
                return FileStat(*self.s3.head(self.join(name)))
            info = self.fs.info(self.join(name))
        version = next(
            (str(info[key]) for key in ("ETag", "etag", "mtime", "LastModified", "created") if key in info), ""
        )
        return FileStat(int(info["size"]), version)

    def _hides(self, name: str) -> bool:
        return self._only is not None and name not in ("", self._only)

    def read(self, name: str) -> bytes:
        """Return a whole (small) file. OSError for one that is no regular file, or larger than any index can be."""
        size = self._small_size(name)
        if self.is_local:
            with self.open_reader(name) as reader, open(reader.fd, "rb", closefd=False) as file:
                data = file.read(size)
        else:
            with naming_any(self.describe(name)):
                path = self.join(name)
                data = self.fs.cat_file(path) if self.s3 is None else self.s3.get(path)
        if len(data) != size:
            raise OSError(errno.EIO, "changes while it is being read", self.describe(name))
        return data

    def read_text(self, name: str) -> bytes:
        """Return a whole text file, such as JSON. OSError as :meth:`read`, and where a byte is zero."""
        if not self.is_local:  # a store has no sparse files, and answers one request sooner than many
            data = self.read(name)
            if 0 in data:
                raise OSError(
                    errno.EILSEQ, "holds a zero byte where text should be: it is damaged", self.describe(name)
                )
            return data
        size = self._small_size(name)
        with self.open_reader(name) as reader:
            return reader.read_text(0, size)

    def _small_size(self, name: str) -> int:
        size = self.stat(name).size
        if size > _MAX_SMALL_BYTES:
            raise OSError(errno.EFBIG, f"has {size:,} bytes, too many for what it should be", self.describe(name))
        return size

    def open_reader(self, name: str) -> RangeReader:
        """Open a file for ranged reads."""
        where = self.describe(name)
        if self.s3 is not None:
            return S3Reader(where, self.s3, self.join(name))
        if self.is_local:
            return LocalReader(where, os.open(self.find(name), OPEN_FLAGS))
        with naming_any(where):
            return FileReader(where, self.fs.open(self.join(name), "rb"))

    def make(self) -> None:
        """Create the directory and its parents."""
        if self.is_local:
            make_directories(self.path)
            return
        if self.s3 is not None:  # a prefix is there once an object has it, and to make a bucket is not ours
            return
        with naming_any(self.url):
            self.fs.makedirs(self.path, exist_ok=True)

    def write(self, name: str, data: bytes) -> None:
        """Write a small file that appears whole and durable, or not at all; ``name`` may lie in a subdirectory.

        Raises:
            OSError: it could not be written, and is not there.
            TransferError: the same, but what may be there of it could not be removed.
        """
        where = self.describe(name)
        ACTIVITY.begin(where)
        try:
            with naming_any(where):
                write = self._write_local if self.is_local else self._put
                write(name, data)
        finally:
            ACTIVITY.end()

    def write_if(self, name: str, data: bytes, *, version: str | None) -> str | None:
        """Write an object on S3 only if there is none (``version`` None), or only over the one of this version.

        Returns the new version, None where the condition does not hold. ``data`` must be this process's own: where the
        answer to a first try is lost, an object with the same content counts as written.
        """
        assert self.s3 is not None
        where = self.describe(name)
        ACTIVITY.begin(where)
        try:
            with naming_any(where):
                return self.s3.put_if(self.join(name), data, etag=version)
        finally:
            ACTIVITY.end()

    def _put(self, name: str, data: bytes) -> None:
        if self.s3 is not None:
            self.s3.put(self.join(name), data)  # whole or not at all: there is nothing to take back
            return
        try:
            self.fs.pipe_file(self.join(name), data)  # atomic on object stores
        except Exception as error:
            self._take_back(name, error)  # some stores write a file piece by piece, or fail after the last one
            raise

    def _write_local(self, name: str, data: bytes) -> None:
        path = self.join(name)
        folder, partial = os.path.dirname(path), path + PARTIAL_SUFFIX
        make_directories(folder)
        with contextlib.suppress(FileNotFoundError):
            os.unlink(partial)  # not through a link that might stand there
        try:
            write_new(partial, data)
            os.replace(partial, path)
        except OSError:
            with contextlib.suppress(OSError):  # what failed before this is what the user must hear of
                os.unlink(partial)
            raise
        try:
            sync_directory(folder)
        except OSError as error:
            self._take_back(name, error)  # it is there now, and may not be after a crash
            raise

    def _take_back(self, name: str, error: Exception) -> None:
        try:
            self.remove(name)
        except OSError as second:
            raise TransferError(
                f"{self.describe(name)}: writing it failed ({reason_of(error)}), and what may be there of it cannot be "
                f"removed ({reason_of(second)}). Remove it and run the export again"
            ) from error

    def remove(self, name: str) -> None:
        """Remove a file if it is there."""
        with contextlib.suppress(FileNotFoundError), naming_any(self.describe(name)):
            if self.s3 is not None:
                self.s3.delete(self.join(name))
                return
            self.fs.rm_file(self.join(name))

    def remove_tree(self, name: str) -> None:
        """Remove a directory with all that is in it, if it is there."""
        with contextlib.suppress(FileNotFoundError), naming_any(self.describe(name)):
            if self.s3 is not None:
                self.s3.delete_tree(self.join(name))
                return
            shutil.rmtree(self.join(name)) if self.is_local else self.fs.rm(self.join(name), recursive=True)

    def say_missing(self) -> str:
        """Return what to say of a directory that holds nothing: that it is not there, or its bucket is not, or it is empty.

        OSError where the system does not tell.
        """
        if self.exists():
            return "holds no files"
        reason = None
        if self.s3 is not None:
            with naming_any(self.url):
                reason = self.s3.why_no_bucket(self.path)
        return reason or "does not exist"

    def tell_folders(self) -> str:
        """Return a sentence for an error about what is not here: it may lie in a directory here. Empty where there is none."""
        folders = self.folders()
        if len(folders) < 2:
            return f". It holds the directory {folders[0]}: give that" if folders else ""
        more = f" and {len(folders) - _SHOWN_FOLDERS} more" if len(folders) > _SHOWN_FOLDERS else ""
        return f". It holds the directories {', '.join(folders[:_SHOWN_FOLDERS])}{more}: give one of them"

    def is_same(self, other: Directory) -> bool:
        """Whether both are one directory, symbolic links and different spellings included."""
        if self.is_local and other.is_local:
            try:
                return bool(os.path.samefile(self.path, other.path))  # also through a bind mount
            except OSError:  # one of them is not there yet
                return bool(os.path.realpath(self.path) == os.path.realpath(other.path))
        return bool(self.fs == other.fs and self.path == other.path)

    def why_not_writable(self) -> str | None:
        """Return why no file could be made here, as far as can be seen without writing; None where it can."""
        if not self.is_local:
            with naming_any(self.url):
                return None if self.s3 is None else self.s3.why_no_bucket(self.path)
        nearest = Path(self.path)
        while not os.path.lexists(nearest) and nearest.parent != nearest:
            nearest = nearest.parent
        if not os.path.isdir(nearest):
            return f"{nearest} is no directory"
        longest = os.pathconf(nearest, "PC_NAME_MAX")
        if any(len(os.fsencode(part)) > longest for part in Path(self.path).parts):
            return f"a name in it is longer than the {longest} bytes that the file system takes"
        return None if os.access(nearest, os.W_OK | os.X_OK) else f"{nearest} cannot be written to"


def open_place(
    url: str | os.PathLike[str], storage_options: dict[str, Any] | None = None, *, follow_links: bool = False
) -> Directory:
    """Return the directory at ``url``; where a file is there, the directory that it lies in, as if that held it alone."""
    directory = Directory(url, storage_options, follow_links=follow_links)
    is_file = os.path.isfile(directory.path) if directory.is_local else directory.fs.isfile(directory.path)
    return Directory(url, storage_options, follow_links=follow_links, is_file=True) if is_file else directory


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
