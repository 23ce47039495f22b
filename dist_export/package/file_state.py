"""What tells a file of a package from another one under its name: its state, and where that is in doubt its content."""

from __future__ import annotations

import os
from collections.abc import Iterator
from typing import NamedTuple

from dist_export.formats.digests import ALGORITHMS, algorithm_of, missing_package

_PIECE_BYTES = 1 << 20


class FileState(NamedTuple):
    """What tells a file from another one under its name, and from itself after a change."""

    size: int
    version: tuple[int | str, ...]
    """Device, inode and time of modification on a disk, a store's version elsewhere."""
    changed: int = 0
    """Time of the last change of the inode, which nobody can set back; of links to it, too."""
    links: int = 0

    def is_same(self, now: FileState) -> bool:
        """Whether a file that is in the state ``now`` has the content that it had in this one."""
        # removing or linking it changes its inode, and not its content
        is_kept = self.changed == now.changed or self.links != now.links
        return self.size == now.size and self.version == now.version and is_kept

    def may_be_same(self, now: FileState) -> bool:
        """Whether the times alone are other ones, as after chmod or touch: then the content tells."""
        return bool(self.changed) and self.size == now.size and self.version[:2] == now.version[:2]


def state_of(found: os.stat_result) -> FileState:
    """Return the state of a file on a disk."""
    version = (found.st_dev, found.st_ino, found.st_mtime_ns)
    return FileState(found.st_size, version, found.st_ctime_ns, found.st_nlink)


def read_pieces_of(fd: int) -> Iterator[memoryview]:
    """Yield the content of an open file from begin to end, over one reused buffer."""
    buffer, offset = memoryview(bytearray(_PIECE_BYTES)), 0
    while count := os.preadv(fd, [buffer], offset):
        yield buffer[:count]
        offset += count


def can_hash(digest: str) -> bool:
    """Whether a whole file can be held against this digest here."""
    algorithm = algorithm_of(digest)
    return bool(digest) and algorithm in ALGORITHMS and missing_package(algorithm) is None
