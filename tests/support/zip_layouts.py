"""The same members as other zips, each legal and stored: order, padding, descriptors, comment, zip64, folder, dead bytes."""

from __future__ import annotations

import io
import random
import struct
import zipfile
import zlib
from collections.abc import Callable, Sequence

Member = tuple[str, bytes]
"""Name below the folder, and content."""


def read_members(raw: bytes) -> list[Member]:
    """Return the members of a zip that torch wrote."""
    with zipfile.ZipFile(io.BytesIO(raw)) as archive:
        return [(info.filename.partition("/")[2], archive.read(info)) for info in archive.infolist()]


def write_zip(
    members: Sequence[Member],
    *,
    root: str = "archive",
    align: int = 1,
    extra: bytes = b"",
    has_descriptors: bool = False,
    is_zip64: bool = False,
    comment: bytes = b"",
    dead: bytes = b"",
    gap: bytes = b"",
) -> bytes:
    """Write a zip by hand, so that each field is as a writer may choose it (APPNOTE 6.3).

    Args:
        align: positions of contents are multiples of it, by a field of padding.
        extra: of each member, in its own header alone.
        dead: before the first member: another member, which the directory no longer has.
        gap: between members.
    """
    out, directory = bytearray(), bytearray()
    if dead:
        out += struct.pack("<4s5H3L2H", b"PK\x03\x04", 20, 0, 0, 0, 33, zlib.crc32(dead), len(dead), len(dead), 4, 0)
        out += b"dead" + dead
    flag = (8 if has_descriptors else 0) | 0x800
    for name, content in members:
        path, crc, begin = f"{root}/{name}".encode(), zlib.crc32(content), len(out)
        size = 0 if has_descriptors else len(content)
        own = extra
        if is_zip64:
            own += struct.pack("<HHQQ", 1, 16, len(content), len(content))
            size = 0xFFFFFFFF
        padding = -(begin + 30 + len(path) + len(own) + 4) % align if align > 1 else 0
        own += struct.pack("<HH", 0x4246, padding) + b"Z" * padding if align > 1 else b""
        shown_crc = 0 if has_descriptors else crc
        out += struct.pack("<4s5H3L2H", b"PK\x03\x04", 45, flag, 0, 0, 33, shown_crc, size, size, len(path), len(own))
        out += path + own + content
        if has_descriptors:
            code = "<4sLQQ" if is_zip64 else "<4sLLL"
            out += struct.pack(code, b"PK\x07\x08", crc, len(content), len(content))
        out += gap
        far = struct.pack("<HHQQQ", 1, 24, len(content), len(content), begin) if is_zip64 else b""
        size, place = (0xFFFFFFFF, 0xFFFFFFFF) if is_zip64 else (len(content), begin)
        directory += struct.pack(
            "<4s6H3L5H2L",
            b"PK\x01\x02",
            45,
            45,
            flag,
            0,
            0,
            33,
            crc,
            size,
            size,
            len(path),
            len(far),
            0,
            0,
            0,
            0,
            place,
        )
        directory += path + far
    begin, count = len(out), len(members)
    out += directory
    if is_zip64:
        end = len(out)
        out += struct.pack("<4sQ2H2L4Q", b"PK\x06\x06", 44, 45, 45, 0, 0, count, count, len(directory), begin)
        out += struct.pack("<4sLQL", b"PK\x06\x07", 0, end, 1)
        out += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, 0xFFFF, 0xFFFF, 0xFFFFFFFF, 0xFFFFFFFF, len(comment))
    else:
        out += struct.pack("<4s4H2LH", b"PK\x05\x06", 0, 0, count, count, len(directory), begin, len(comment))
    return bytes(out + comment)


def _by_zipfile(members: Sequence[Member]) -> bytes:
    buffer = io.BytesIO()
    with zipfile.ZipFile(buffer, "w") as archive:
        for name, content in members:
            archive.writestr(f"archive/{name}", content)
    return buffer.getvalue()


def _shuffled(members: Sequence[Member]) -> list[Member]:
    mixed = list(members)
    random.Random(3).shuffle(mixed)
    return mixed


def _with_folders(members: Sequence[Member]) -> list[Member]:
    return [("", b""), ("data/", b""), *members]


LAYOUTS: dict[str, Callable[[Sequence[Member]], bytes]] = {
    "as Python's zipfile packs": _by_zipfile,
    "storages first": lambda m: write_zip(sorted(m, key=lambda member: not member[0].startswith("data/"))),
    "backwards": lambda m: write_zip(m[::-1], align=64),
    "mixed": lambda m: write_zip(_shuffled(m), align=4096),
    "extra fields": lambda m: write_zip(m, extra=struct.pack("<HH", 0x5455, 5) + b"\x01abcd", align=8),
    "data descriptors": lambda m: write_zip(m, has_descriptors=True),
    "a comment": lambda m: write_zip(m, comment=b"packed by hand, PK\x01\x02 and so on"),
    "zip64": lambda m: write_zip(_shuffled(m), is_zip64=True, has_descriptors=True),
    "a member left out of the directory": lambda m: write_zip(m, dead=b"\x07" * 100),
    "gaps": lambda m: write_zip(m, gap=b"\xff" * 37),
    "another folder": lambda m: write_zip(m, root="my model é.v2"),
    "entries of folders": lambda m: write_zip(_with_folders(m)),
}
