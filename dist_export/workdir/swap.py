"""Replace a directory with a finished one, in one step if the file system supports it."""

from __future__ import annotations

import ctypes
import errno
import logging
import os
import shutil
import uuid

from dist_export.errors import CommitError
from dist_export.storage.directory import Directory
from dist_export.storage.local_io import sync_directory

logger = logging.getLogger(__name__)

_RENAME_EXCHANGE = 2
_AT_FDCWD = -100
_NO_EXCHANGE = (errno.EINVAL, errno.ENOSYS, errno.EOPNOTSUPP)


def beside(path: str, what: str) -> str:
    """Return the path of a helper directory beside ``path``, on the same file system."""
    parent, name = os.path.split(os.path.realpath(path))
    return os.path.join(parent, f".{name}.dist_export-{what}")


def why_not_replaceable(path: str) -> str | None:
    """Return why the directory ``path`` cannot be replaced; None if no reason is visible in advance."""
    real = os.path.realpath(path)
    if os.path.ismount(real):
        return "is a mount point, which cannot be renamed"
    parent = os.path.dirname(real)
    return None if os.access(parent, os.W_OK | os.X_OK) else f"lies in {parent}, which cannot be written to"


def is_cut_off(path: str) -> bool:
    """Return whether a replacement without exchange was interrupted between its two renames, so that ``path`` is missing."""
    return os.path.isdir(beside(path, "old")) and not os.path.exists(os.path.realpath(path))


def recover(path: str) -> None:
    """Restore the old directory after such an interruption."""
    if is_cut_off(path):
        real = os.path.realpath(path)
        os.rename(beside(path, "old"), real)
        sync_directory(os.path.dirname(real))


def replace_directory(new: str, path: str) -> str:
    """Rename the directory ``new`` to ``path``; return where the old directory is now.

    ``renameat2(RENAME_EXCHANGE)`` is used: a reader sees either directory, and one is always there. File systems without it
    (NFS) get two renames. Between them the name is missing for a moment; :func:`recover` repairs a crash there.

    Raises:
        CommitError: neither worked, and the old directory is in its place; or both did, but a crash may undo it.
    """
    real = os.path.realpath(path)
    old = new
    try:
        if not _exchange(new, real):
            old = beside(path, "old")
            os.rename(real, old)
            try:
                os.rename(new, real)
            except OSError:
                os.rename(old, real)
                raise
    except OSError as error:
        raise CommitError(
            f"{path}: the new package, whole in {new}, cannot take the place of the old one, which is untouched: "
            f"{error.strerror}. Mend that and run the export again"
        ) from error
    try:
        sync_directory(os.path.dirname(real))
    except OSError as error:
        raise CommitError(
            f"{path}: the new package has taken the place of the old one, which is in {old}, but a crash of the machine "
            f"may undo that: {error.strerror}. Mend that and run the export again"
        ) from error
    return old


def _exchange(one: str, other: str) -> bool:
    """Exchange two directories; return whether the system supports it. See renameat2(2)."""
    try:
        renameat2 = ctypes.CDLL(None, use_errno=True).renameat2
    except AttributeError:  # glibc before 2.28, or another libc
        return False
    renameat2.argtypes = (ctypes.c_int, ctypes.c_char_p, ctypes.c_int, ctypes.c_char_p, ctypes.c_uint)
    if renameat2(_AT_FDCWD, os.fsencode(one), _AT_FDCWD, os.fsencode(other), _RENAME_EXCHANGE) == 0:
        return True
    number = ctypes.get_errno()
    if number in _NO_EXCHANGE:
        return False
    raise OSError(number, os.strerror(number), other)


def discard(old: str, final: Directory, *, named: set[str]) -> list[str]:
    """Remove a replaced package; move its foreign files into the new one, and return their names.

    Args:
        old: where the old package is now.
        final: the new package.
        named: the files that the old package's manifest names, with forward slashes.
    """
    token = uuid.uuid4().hex[:12]
    folders = {name.split("/")[0] for name in named}
    kept: list[str] = []
    for entry in sorted(os.listdir(old)):
        if entry in folders or entry.startswith(".dist_export"):
            continue
        if os.path.lexists(final.join(entry)):
            place = beside(final.path, f"kept-{token}")
            os.rename(old, place)
            logger.warning("%s was replaced by a file of the new package; the old one is in %s", entry, place)
            return kept
        os.rename(os.path.join(old, entry), final.join(entry))
        kept.append(entry)
    # renamed first, because half of an old package must never look like the beginning of a new one
    trash = beside(final.path, f"trash-{token}")
    os.rename(old, trash)
    shutil.rmtree(trash)
    return kept


def empty_trash(path: str) -> None:
    """Remove the rest of old packages whose removal was interrupted."""
    parent, prefix = os.path.split(beside(path, "trash-"))
    for name in os.listdir(parent):
        if name.startswith(prefix):
            shutil.rmtree(os.path.join(parent, name))
