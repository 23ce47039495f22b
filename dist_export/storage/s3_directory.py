"""A directory of an S3 store, with its own requests: conditional writes, and listings for many files at once."""

from __future__ import annotations

import errno
from collections.abc import Callable, Iterable, Iterator

import fsspec

from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.directory import Directory, FileStat, Location
from dist_export.storage.fsspec_directory import FsspecDirectory
from dist_export.storage.local_io import naming_any
from dist_export.storage.range_reader import RangeReader
from dist_export.storage.s3 import S3
from dist_export.storage.s3_reader import S3Reader
from dist_export.storage.s3_upload import put_file

_FEW_FILES = 8
"""Fewer files than this are requested one by one, because the directory may hold thousands of others."""


class S3Directory(FsspecDirectory):
    """A prefix of a bucket. Its :attr:`path` is ``bucket/prefix``."""

    s3: S3

    def __init__(self, location: Location, fs: fsspec.AbstractFileSystem) -> None:
        super().__init__(location, fs)
        self.s3 = S3(fs)

    def _list(self, *, folders: bool) -> Iterator[str]:
        if folders:
            return self.s3.folders(self.path)
        return (name for name, _ in self.s3.objects(self.path))

    def walk(self) -> Iterator[str]:
        """Yield the paths within the directory of all objects below it, in order."""
        return (path for path, _ in self.s3.objects(self.path, is_deep=True))

    def _look(self, name: str) -> None:
        try:
            if name:
                self.s3.head(self.join(name))
        except FileNotFoundError:
            is_there = self.s3.has_any(self.join(name))
        else:
            is_there = bool(name) or self.s3.has_any(self.path)
        if not is_there:
            raise FileNotFoundError(self.join(name))

    def _stat(self, name: str) -> FileStat:
        return FileStat(*self.s3.head(self.join(name)))

    def find_many(self, names: Iterable[str]) -> dict[str, FileStat]:
        """Return the same as :meth:`stat_many` without missing files; one request for each thousand objects in the directory."""
        wanted = list(names)
        if len(wanted) < _FEW_FILES:
            return super().find_many(wanted)
        with naming_any(self.url):
            listed = dict(self.s3.objects(self.path))
        return {name: FileStat(*listed[name]) for name in wanted if name in listed}

    def _read(self, name: str) -> bytes:
        return self.s3.get(self.join(name))

    def open_reader(self, name: str) -> RangeReader:
        """Open a file for ranged reads."""
        return S3Reader(self.describe(name), self.s3, self.join(name))

    def _make(self) -> None:
        """Do nothing: a prefix exists once an object has it, and buckets are not created here."""

    def _write(self, name: str, data: bytes) -> None:
        self.s3.put(self.join(name), data)  # whole or not at all, so there is nothing to remove

    def _repeat(self, name: str, there: Directory, original: str, data: bytes) -> bool:
        """Make the store copy the other object, if its ETag says that it has this content."""
        if not isinstance(there, S3Directory) or not self.is_same_store(there):
            return False
        return self.s3.copy_if_same(there.join(original), self.join(name), data)

    def write_if(self, name: str, data: bytes, *, version: str | None) -> str | None:
        """Write an object only if there is none (``version`` None), or only over the one of this version.

        Returns the new version, or None if the condition does not hold. ``data`` must be unique to this process: if the
        answer to a first try is lost, an object with the same content counts as written.
        """
        where = self.describe(name)
        with ACTIVITY.of(where), naming_any(where):
            return self.s3.put_if(self.join(name), data, etag=version)

    def create(self, name: str, data: bytes) -> bool:
        """Write a small object unless one of this name exists; return whether it was written."""
        return self.write_if(name, data, version=None) is not None

    def replace_if(self, name: str, data: bytes, *, expected: bytes | None) -> bool:
        """Write a small object if its content is ``expected``, or if there is none (None); return whether it was written."""
        if expected is None:
            return self.create(name, data)
        where = self.describe(name)
        try:
            with ACTIVITY.of(where), naming_any(where):
                found = self.s3.head(self.join(name))
                if found.size != len(expected):
                    return False
                content = self.s3.get(self.join(name), 0, found.size, etag=found.etag)
        except FileNotFoundError:
            return False
        except OSError as error:
            if error.errno != errno.ESTALE:
                raise
            return False  # it was replaced between the two requests
        return content == expected and self.write_if(name, data, version=found.etag) is not None

    def put_file(self, name: str, local: str, note_progress: Callable[[], None]) -> None:
        """Put a local file here under ``name``, in parts; ``note_progress`` is called after each part."""
        put_file(self.s3, local, self.join(name), note_progress=note_progress)

    def _remove(self, name: str) -> None:
        self.s3.delete(self.join(name))

    def _remove_tree(self, name: str) -> None:
        self.s3.delete_tree(self.join(name))

    def why_not_there(self) -> str | None:
        """Return that the bucket does not exist, if that is the case."""
        with naming_any(self.url):
            return self.s3.why_no_bucket(self.path)
