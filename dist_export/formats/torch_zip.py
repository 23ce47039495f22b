"""Find the members of a zip of ``torch.save``, and their positions, whichever program packed it.

Torch trusts positions and lengths. It reads a compressed member as its packed bytes. It lets a storage that claims more
bytes than its member has continue into the next member. Where torch *computes* positions, it assumes the order and
padding of its own writer. Therefore members are looked up here in the zip's directory and in their own headers, which
must agree. Any layout is accepted in which each member is stored uncompressed. Source: PKWARE's APPNOTE 6.3.
"""

from __future__ import annotations

import re
import struct
import zipfile
from typing import IO, NamedTuple

from dist_export.errors import CheckpointError

_MAX_PICKLE_BYTES = 256 << 20
"""Enough for the names, shapes and positions of two million tensors."""
_LOCAL_HEADER_BYTES = 30
_REASON = re.compile(r"WeightsUnpickler error: .*?(?=\. Please use|$)|Trying to load unsupported .*", re.MULTILINE)
"""After this text torch recommends Python calls, which do not help on the command line."""

_END = struct.Struct("<4s4H2LH")
"""The last record of a zip, without its comment."""
_MAX_COMMENT_BYTES = 0xFFFF
_IN_ZIP64 = 0xFFFFFFFF
_IS_UTF8 = 0x800


class StateArchive(NamedTuple):
    """The checked content of a zip of ``torch.save``."""

    pickled: bytes
    """The content of its ``data.pkl``."""
    root: str
    """The folder of all members, with a slash."""
    storages: dict[str, tuple[int, int]]
    """Key of a storage -> (position in the file, size in bytes). The pickle need not use each of them."""
    is_big_endian: bool
    """Whether torch would swap the bytes of each element."""


def is_zip(file: IO[bytes]) -> bool:
    """Return whether the file begins as a zip. A file that ``torch.save`` wrote before torch 1.6 does not."""
    file.seek(0)
    return file.read(4) == b"PK\x03\x04"


def say_refusal(error: Exception) -> str:
    """Return in one line why ``torch.load`` refused a file, without its advice to load it without protection."""
    found = _REASON.search(str(error)) or re.search(r"\S.*", str(error))
    return found[0] if found else type(error).__name__


def check_state_archive(file: IO[bytes], *, where: str) -> StateArchive:
    """Find the members of a zip that ``torch.save`` wrote, or of a repacked one. Reads no payload.

    Args:
        file: seekable; its position afterwards is undefined.
        where: for messages.

    Raises:
        CheckpointError: it is cut short, or no such zip; a member is compressed, overlaps another one, has the name of
            another one, or its own header has a different name; the byte order of its elements is unknown.
    """
    directory = _find_directory(file, where)
    try:
        with zipfile.ZipFile(file) as archive:
            _refuse_numpy(archive, where)
            if archive.start_dir != directory:  # there are bytes before the zip, or two directories in it
                raise CheckpointError(f"{where} does not begin where its zip says; save or copy it again")
            sizes, starts = _check_members(file, archive, where)
            roots = {name.split("/", 1)[0] for name in sizes}
            pickled = f"{next(iter(roots))}/data.pkl" if len(roots) == 1 else ""
            if pickled not in sizes:
                raise CheckpointError(f"{where} is a zip, but none that torch.save writes: it has no data.pkl")
            root = pickled.removesuffix("data.pkl")
            for name, num_bytes in sizes.items():  # torch reads all members except storages into memory
                if num_bytes > _MAX_PICKLE_BYTES and not name.startswith(f"{root}data/"):
                    raise CheckpointError(
                        f"{where}: {name!r} has {num_bytes:,} bytes, more than any state_dict needs"
                        "; save the state_dict alone"
                    )
            raw = archive.read(pickled)
            order = archive.read(f"{root}byteorder") if f"{root}byteorder" in sizes else b"little"
    except (
        zipfile.BadZipFile,
        EOFError,
        OSError,
        ValueError,
        NotImplementedError,
        RuntimeError,
        struct.error,
    ) as error:
        raise CheckpointError(f"{where} is a damaged zip: {error}; save or copy it again") from None
    if order not in (b"little", b"big"):
        raise CheckpointError(
            f"{where}: its bytes are in the order {order[:20]!r}; expected b'little' or b'big'; save or copy it again"
        )
    data = f"{root}data/"
    storages = {name.removeprefix(data): (starts[name], sizes[name]) for name in sizes if name.startswith(data)}
    return StateArchive(raw, root, storages, order == b"big")


def _find_directory(file: IO[bytes], where: str) -> int:
    """Return where the zip's directory begins, from its last record. That record and its comment must end the file.

    zipfile and torch both search backwards for such a record, and may find different ones.
    """
    size = file.seek(0, 2)
    file.seek(max(size - _END.size - 2, 0))  # usually there is no comment, and no more needs to be read
    tail = file.read()
    if len(tail) < _END.size or not tail[-_END.size :].startswith(b"PK\x05\x06"):
        file.seek(max(size - _END.size - _MAX_COMMENT_BYTES, 0))
        tail = file.read()
    place = tail.rfind(b"PK\x05\x06")
    if place >= 0 and len(tail) - place >= _END.size:
        found = _END.unpack_from(tail, place)
        if place + _END.size + found[-1] == len(tail):
            end = size - len(tail) + place
            begin: int = _read_zip64(file, end) if found[6] == _IN_ZIP64 else found[6]
            if begin < end:
                return begin
    raise CheckpointError(f"{where} is truncated, or no file of torch.save; save or copy it again")


def _read_zip64(file: IO[bytes], end: int) -> int:
    """Return where the directory begins, if the last record (at ``end``) has no room for it; return ``end`` if it is unknown."""
    file.seek(max(end - 20, 0))
    locator = file.read(20)
    if len(locator) == 20 and locator.startswith(b"PK\x06\x07"):
        file.seek(min(int(struct.unpack("<Q", locator[8:16])[0]), end))
        record = file.read(56)
        if len(record) == 56 and record.startswith(b"PK\x06\x06"):
            return int(struct.unpack("<Q", record[48:56])[0])
    return end


def _refuse_numpy(archive: zipfile.ZipFile, where: str) -> None:
    """Refuse an archive that ``numpy.savez`` wrote, and say what it is: saving it again would not help."""
    names = archive.namelist()
    if names and all(name.endswith(".npy") for name in names):
        raise CheckpointError(
            f"{where} is an archive of numpy (.npz) with {len(names)} arrays, no file of torch.save; arrays are no checkpoint of "
            "any format that is read here, so give the checkpoint itself"
        )


def _check_members(file: IO[bytes], archive: zipfile.ZipFile, where: str) -> tuple[dict[str, int], dict[str, int]]:
    """Return the size of each member by name, and the position of its content."""
    sizes: dict[str, int] = {}
    starts: dict[str, int] = {}
    seen: set[str] = set()
    end = 0
    for entry in sorted(archive.infolist(), key=lambda info: info.header_offset):
        name = entry.orig_filename
        if name.casefold() in seen:  # torch ignores the case
            raise CheckpointError(f"{where}: two members are called {name!r}; it is no file of torch.save")
        if entry.compress_type != zipfile.ZIP_STORED or entry.compress_size != entry.file_size or entry.flag_bits & 1:
            raise CheckpointError(
                f"{where}: {name!r} is compressed or encrypted, which torch.save never does, and torch.load would take "
                "the packed bytes for values; save it again"
            )
        if entry.header_offset < end:
            raise CheckpointError(f"{where}: {name!r} overlaps the member before it; it is no file of torch.save")
        file.seek(entry.header_offset)
        header = file.read(_LOCAL_HEADER_BYTES)
        name_bytes, extra_bytes = struct.unpack("<HH", header[26:30])
        expected = name.encode("utf-8" if entry.flag_bits & _IS_UTF8 else "cp437")
        if not header.startswith(b"PK\x03\x04") or file.read(name_bytes) != expected:
            raise CheckpointError(f"{where}: {name!r} is not where the zip's directory says; save or copy it again")
        starts[name] = entry.header_offset + _LOCAL_HEADER_BYTES + name_bytes + extra_bytes
        end = starts[name] + entry.file_size
        sizes[name] = entry.file_size
        seen.add(name.casefold())
    if end > archive.start_dir:
        raise CheckpointError(
            f"{where}: a member reaches into the zip's directory; it is damaged or forged; save or copy it again"
        )
    return sizes, starts
