"""Read the sparse part of an exported directory, or of a RecIS checkpoint: headers and the two indexes."""

from __future__ import annotations

from contextlib import AbstractContextManager
from typing import Protocol

from dist_export.errors import CheckpointError, DistExportError, EndedError, PackageError
from dist_export.formats.recis import INDEX, TENSORKEY
from dist_export.formats.recis_index import Indexes, decode_indexes
from dist_export.formats.safetensors import Header, decode_header, header_length
from dist_export.storage.directory import FileStat
from dist_export.storage.range_reader import RangeReader


class Files(Protocol):
    """The methods that reading needs, of a directory or of the files of an open package."""

    url: str

    def describe(self, name: str) -> str:
        """Return ``name`` with the directory's URL, for messages."""

    def exists(self, name: str) -> bool:
        """Return whether there is such a file."""

    def stat(self, name: str) -> FileStat:
        """Return size and version of a file."""

    def read(self, name: str) -> bytes:
        """Return a whole file."""

    def read_text(self, name: str) -> bytes:
        """Return a whole text file."""

    def open_reader(self, name: str) -> AbstractContextManager[RangeReader]:
        """Open a file for ranged reads."""


def fact_of(error: DistExportError) -> str:
    """Return the text of an error, without the advice that only applies to exports."""
    return error.fact if isinstance(error, EndedError) else str(error)


def read_header(directory: Files, name: str) -> Header:
    """Read and check the header of one shard file. Raises PackageError if it is missing, truncated or wrong."""
    where = directory.describe(name)
    try:
        size = directory.stat(name).size
        with directory.open_reader(name) as reader:
            prefix = bytearray(min(8, size))
            reader.read_into(memoryview(prefix), 0)
            raw = reader.read_text(8, header_length(bytes(prefix), path=where, file_size=size))
        return decode_header(raw, path=where, file_size=size)
    except FileNotFoundError:
        raise PackageError(f"{where} is missing") from None
    except OSError as error:
        raise PackageError(f"{where} cannot be read: {error.strerror or error}") from None
    except (CheckpointError, EndedError) as error:
        raise PackageError(fact_of(error)) from None


def read_indexes(directory: Files) -> Indexes:
    """Read ``index`` and ``tensorkey.json``. Raises PackageError if one is missing, or RecIS's loader would refuse it."""
    missing = [name for name in (INDEX, TENSORKEY) if not directory.exists(name)]
    if missing:
        raise PackageError(f"{directory.describe(missing[0])} is missing; RecIS's loader needs it")
    try:
        raw = [_read(directory, name) for name in (INDEX, TENSORKEY)]
        return decode_indexes(*raw, where=directory.url.rstrip("/"))
    except CheckpointError as error:
        raise PackageError(str(error)) from None


class ShardHeaders:
    """The headers of an open package's shards. Each is read only once."""

    def __init__(self, files: Files) -> None:
        self._files = files
        self._headers: dict[str, Header] = {}
        self._indexes: Indexes | None = None

    def of(self, name: str) -> Header:
        """Return the header of one shard file. PackageError as :func:`read_header`."""
        if name not in self._headers:
            self._headers[name] = read_header(self._files, name)
        return self._headers[name]

    def file_of(self, key: str) -> str:
        """Return the file that ``index`` gives for a block. PackageError if it gives none."""
        if self._indexes is None:
            self._indexes = read_indexes(self._files)
        place = self._indexes.place_of_key.get(key)
        if place is None:
            raise PackageError(f"{self._files.describe(INDEX)} does not name {key!r}, which the manifest has")
        return self._indexes.files[int(self._indexes.file[place])]


def _read(directory: Files, name: str) -> bytes:
    try:
        return directory.read_text(name)
    except OSError as error:
        raise PackageError(f"{directory.describe(name)} cannot be read: {error.strerror or error}") from None
    except EndedError as error:
        raise PackageError(error.fact) from None
