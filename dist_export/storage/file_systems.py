"""Identify a file by more than its size and modification time, which any program can set back."""

from __future__ import annotations

import os

from dist_export.storage import local_io

_WITH_INODES = frozenset(
    ["bcachefs", "btrfs", "ext2", "ext3", "ext4", "f2fs", "jfs", "overlay", "ramfs", "reiserfs", "tmpfs", "xfs", "zfs"]
)
"""Local file systems. A file keeps its inode as long as it exists."""
_WITH_CHANGES = frozenset(["beegfs", "ceph", "gpfs", "lustre", "nfs", "nfs4", "wekafs"]) | _WITH_INODES
"""File systems that keep the time of a file's last change, equal on all machines. Others may invent it at each mount."""
_MOST_FOLDERS = 4_096
_kinds: dict[tuple[int, str], str] = {}
"""(device, directory) -> kind of file system."""


def trace_of(found: os.stat_result, path: str) -> tuple[int, ...]:
    """Return (inode, time of the last change in ns) of the file at a local path, if its file system keeps them.

    The inode is 0 if only the time is kept; the tuple is empty if neither is kept. The system is asked once for each directory
    and device.
    """
    place = (found.st_dev, os.path.dirname(path))  # links in a directory may lead to other devices
    if place not in _kinds:
        if len(_kinds) >= _MOST_FOLDERS:
            _kinds.clear()
        _kinds[place] = local_io.file_system_of(path)
    kind = _kinds[place]
    if kind not in _WITH_CHANGES:
        return ()
    return (found.st_ino if kind in _WITH_INODES else 0, found.st_ctime_ns)
