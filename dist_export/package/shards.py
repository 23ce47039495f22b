"""Read the sparse part of an exported directory, or of a RecIS checkpoint: headers and the two indexes."""

from __future__ import annotations

from dist_export.errors import CheckpointError, PackageError
from dist_export.layout.indexes import Indexes, decode_indexes
from dist_export.layout.recis import INDEX, TENSORKEY
from dist_export.layout.safetensors import Header, decode_header, header_length
from dist_export.storage import Directory


def read_header(directory: Directory, name: str) -> Header:
    """Read and check the header of one shard file. PackageError where it is missing, truncated or untrue."""
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
    except CheckpointError as error:
        raise PackageError(str(error)) from None


def read_indexes(directory: Directory) -> Indexes:
    """Read ``index`` and ``tensorkey.json``. PackageError where one is missing or not what RecIS's loader takes."""
    missing = [name for name in (INDEX, TENSORKEY) if not directory.exists(name)]
    if missing:
        raise PackageError(f"{directory.describe(missing[0])} is missing; RecIS's loader needs it")
    try:
        raw = [_read(directory, name) for name in (INDEX, TENSORKEY)]
        return decode_indexes(*raw, where=directory.url.rstrip("/"))
    except CheckpointError as error:
        raise PackageError(str(error)) from None


def _read(directory: Directory, name: str) -> bytes:
    try:
        return directory.read_text(name)
    except OSError as error:
        raise PackageError(f"{directory.describe(name)} cannot be read: {error.strerror or error}") from None
