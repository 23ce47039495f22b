"""Tell a file of a package from another file with the same name: by its state, and in doubt by its content."""

from __future__ import annotations

import os
from typing import NamedTuple

from dist_export.formats.digests import ALGORITHMS, algorithm_of, missing_package


class FileState(NamedTuple):
    """The state of a file. It differs for another file with the same name, and after a change of the file."""

    size: int
    version: tuple[int | str, ...]
    """Device, inode and time of modification on a disk; elsewhere the store's version."""
    changed: int = 0
    """Time of the last change of the inode, in ns. Nobody can set it back. A change of the inode's links changes it too."""
    links: int = 0

    def is_same(self, now: FileState) -> bool:
        """Return whether a file in the state ``now`` has the content that it had in this state."""
        # removing or adding a link changes the inode, but not the content
        is_kept = self.changed == now.changed or self.links != now.links
        return self.size == now.size and self.version == now.version and is_kept

    def may_be_same(self, now: FileState) -> bool:
        """Return whether at most the times differ, as after chmod or touch. Then the content decides."""
        return bool(self.changed) and self.size == now.size and self.version[:2] == now.version[:2]


def state_of(found: os.stat_result) -> FileState:
    """Return the state of a file on a disk."""
    version = (found.st_dev, found.st_ino, found.st_mtime_ns)
    return FileState(found.st_size, version, found.st_ctime_ns, found.st_nlink)


def can_hash(digest: str) -> bool:
    """Return whether a whole file can be checked against this digest with the installed packages."""
    algorithm = algorithm_of(digest)
    return bool(digest) and algorithm in ALGORITHMS and missing_package(algorithm) is None
