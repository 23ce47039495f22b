"""A directory of any store that fsspec knows. The stores give different guarantees; only the weakest are relied on."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterator
from pathlib import PurePosixPath
from typing import IO, Any, cast

import fsspec

from dist_export.storage.directory import Directory, FileStat, Location
from dist_export.storage.local_directory import leftover_error
from dist_export.storage.local_io import naming_any
from dist_export.storage.range_reader import FileReader, RangeReader

_VERSIONS = ("ETag", "etag", "mtime", "LastModified", "created")
"""Keys of a store's answer that change with the content; the most reliable comes first."""


class FsspecDirectory(Directory):
    """A directory on a file system of fsspec."""

    def __init__(self, location: Location, fs: fsspec.AbstractFileSystem) -> None:
        super().__init__(location)
        self.fs = fs
        protocols = fs.protocol if isinstance(fs.protocol, tuple) else (fs.protocol,)
        self.is_shared = "memory" not in protocols  # that file system exists in one process only

    def child(self, name: str) -> FsspecDirectory:
        """Return the directory ``name`` in this one."""
        return type(self)(self._location.child(name), self.fs)

    def names_file(self) -> bool:
        """Return whether the path is that of a file. Sends a request to a store."""
        return bool(self.fs.isfile(self.path))

    def _list(self, *, folders: bool) -> Iterator[str]:
        kind = "directory" if folders else "file"
        for entry in self.fs.ls(self.path, detail=True):
            if entry["type"] == kind:
                yield PurePosixPath(entry["name"]).name

    def walk(self) -> Iterator[str]:
        """Yield the paths within the directory of all files below it."""
        root = self.path.strip("/")
        yield from (path.strip("/").removeprefix(f"{root}/") for path in self.fs.find(self.path))

    def _look(self, name: str) -> None:
        self.fs.info(self.join(name) if name else self.path)  # fs.exists reports an error as a missing file

    def _stat(self, name: str) -> FileStat:
        info = self.fs.info(self.join(name))
        return FileStat(int(info["size"]), next((str(info[key]) for key in _VERSIONS if key in info), ""))

    def _read(self, name: str) -> bytes:
        return bytes(self.fs.cat_file(self.join(name)))

    def open_reader(self, name: str) -> RangeReader:
        """Open a file for ranged reads."""
        where = self.describe(name)
        with naming_any(where):
            return FileReader(where, self.fs.open(self.join(name), "rb"))

    def open_stream(self, name: str) -> IO[bytes]:
        """Open a file for a library that reads Python's own file objects."""
        return cast("IO[bytes]", self.fs.open(self.join(name), "rb"))

    def _make(self) -> None:
        self.fs.makedirs(self.path, exist_ok=True)

    def _write(self, name: str, data: bytes) -> None:
        try:
            self.fs.pipe_file(self.join(name), data)  # atomic on object stores
        except Exception as error:
            try:
                self.remove(name)  # some stores write a file piece by piece, or fail after the last one
            except OSError as second:
                raise leftover_error(self.describe(name), error, second) from error
            raise

    def create(self, name: str, data: bytes) -> bool:
        """Write a small file unless one of this name exists; return whether it was written."""
        try:
            with naming_any(self.describe(name)), self.fs.open(self.join(name), "xb") as file:
                file.write(data)
        except FileExistsError:
            return False
        except OSError as error:  # some stores report a failed condition like this
            if error.errno != errno.EINVAL or not self.exists(name):
                raise
            return False
        return True

    def put_file(self, name: str, local: str, note_progress: Callable[[], None]) -> None:
        """Put a local file here under ``name``; ``note_progress`` is called after each piece."""
        self.fs.put_file(local, self.join(name), callback=_Progress(note_progress))

    def _remove(self, name: str) -> None:
        self.fs.rm_file(self.join(name))

    def _remove_tree(self, name: str) -> None:
        self.fs.rm(self.join(name), recursive=True)

    def is_same_store(self, other: Directory) -> bool:
        """Return whether both are reached through one file system with the same options."""
        return isinstance(other, FsspecDirectory) and bool(self.fs == other.fs)


class _Progress(fsspec.Callback):  # type: ignore[misc]
    """Reports progress of an upload: sending a whole shard may take longer than ``timeout``."""

    def __init__(self, note_progress: Callable[[], None], **more: Any) -> None:
        super().__init__(**more)
        self._note_progress = note_progress

    def absolute_update(self, value: int) -> None:
        """Count a step."""
        super().absolute_update(value)
        self._note_progress()

    def relative_update(self, inc: int = 1) -> None:
        """Count a step."""
        super().relative_update(inc)
        self._note_progress()
