"""Refuse links in a package that lead out of its directory."""

from __future__ import annotations

import errno
import os
import stat


def refuse_link_out(name: str, fd: int, folder: int) -> None:
    """Raise OSError if a file was reached through a link that leads out of the directory.

    Args:
        name: the path of the file within the directory.
        fd: a descriptor of the open file.
        folder: a descriptor of the directory.
    """
    steps = name.split("/")
    paths = ("/".join(steps[:length]) for length in range(1, len(steps) + 1))
    if not any(_is_link(path, folder) for path in paths):
        return
    found, root = (os.readlink(f"/proc/self/fd/{number}") for number in (fd, folder))
    if os.path.commonpath([found, root]) != root:
        raise OSError(
            errno.EPERM, f"is a link that leads out of the directory, to {found}; put the file itself there (cp -L)"
        )


def _is_link(path: str, folder: int) -> bool:
    return stat.S_ISLNK(os.stat(path, dir_fd=folder, follow_symlinks=False).st_mode)
