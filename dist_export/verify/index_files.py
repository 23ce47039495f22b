"""Read ``index`` and ``tensorkey.json`` for ``verify``. If one of them is damaged, report it and still use the other."""

from __future__ import annotations

from dist_export.errors import CheckpointError
from dist_export.formats.recis import INDEX, encode_index
from dist_export.formats.recis_index import Indexes, decode_indexes
from dist_export.storage.directory import Directory
from dist_export.verify.indexed_tables import RowIndexedBlocks
from dist_export.verify.report import Report


def decode_both(raw_index: bytes, raw_tensorkey: bytes) -> Indexes | None:
    """Decode both files at once. Return None if one of them is damaged; then decode each one separately."""
    try:
        return decode_indexes(raw_index, raw_tensorkey, where="")
    except CheckpointError:
        return None


def read_small(directory: Directory, name: str, report: Report, row_indexed: RowIndexedBlocks) -> bytes | None:
    """Return the content of an index file. If it is missing and not needed, return an empty one.

    If it is needed and missing, or cannot be read, add a finding and return None.
    """
    try:
        return directory.read_text(name)
    except FileNotFoundError:
        if not row_indexed.needs_index:
            return encode_index({}) if name == INDEX else b"{}"
        hint = (
            "; RecIS's Exporter leaves it out when it copies, and a save that did not finish has none"
            if name == INDEX
            else ""
        )
        report.add(name, name, f"is missing; RecIS's loader cannot open the directory without it{hint}")
    except OSError as error:
        report.add(name, name, f"cannot be read: {error.strerror or error}")
    return None


def decodable(name: str, raws: tuple[bytes, bytes], report: Report) -> bytes | None:
    """Return the raw content of ``name`` from the pair ``raws`` if it can be decoded; else add a finding and return None.

    The other one of the pair must be empty.
    """
    try:
        decode_indexes(*raws, where="")
    except CheckpointError as error:
        report.add(name, name, without(f"/{name}", str(error)))
        return None
    return raws[name != INDEX]


def without(path: str, message: str) -> str:
    """Return a reader's message without the path at its beginning."""
    return message.removeprefix(path).removeprefix(":").strip()
