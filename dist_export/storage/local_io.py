"""System calls on local files: writes are durable, and errors name the file."""

from __future__ import annotations

import contextlib
import errno
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

from dist_export.errors import DistExportError
from dist_export.redact import first_line, reason_of

_FILE_NAME_BYTES = 128
"""Room for the longest path within a package, and for its temporary name."""

_PIECE_BYTES = 1 << 20

_NUMBERS = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    TimeoutError: errno.ETIMEDOUT,
}
"""Numbers for errors that stores raise without one."""


def sync_directory(path: str) -> None:
    """Make a rename in ``path`` durable, if the file system supports it."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # network file systems without support return these
            raise
    finally:
        close_quietly(fd)


def make_directories(path: str) -> None:
    """Make a local directory and its missing parents; the new ones survive a crash."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_directories(parent)
    with contextlib.suppress(FileExistsError):  # another rank was faster; if it is a file, a later write fails
        os.mkdir(path)
    with contextlib.suppress(PermissionError):  # a parent that can be written to but not read cannot be synced
        sync_directory(parent)


def write_new(path: str, data: bytes) -> None:
    """Create a local file with this content, and make it durable."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[refuse_zero(os.write(fd, left)) :]
        os.fsync(fd)
    except BaseException:
        close_quietly(fd)
        raise
    os.close(fd)  # some file systems write only now, and report a failure only now


def read_pieces_of(fd: int) -> Iterator[memoryview]:
    """Yield the content of an open file from begin to end, through one reused buffer."""
    buffer, offset = memoryview(bytearray(_PIECE_BYTES)), 0
    while count := os.preadv(fd, [buffer], offset):
        yield buffer[:count]
        offset += count


def refuse_zero(written: int) -> int:
    """Return how many bytes a call took; OSError for zero, because the call would be repeated forever."""
    if not written:
        raise OSError(errno.EIO, "the file system took no bytes")
    return written


def close_quietly(fd: int) -> None:
    """Close a file that was only read, or one that already failed, so that the earlier error is the one reported."""
    with contextlib.suppress(OSError):
        os.close(fd)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Add the file or directory to an error of the system: calls on descriptors do not name it."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise
        number = error.errno or next((n for kind, n in _NUMBERS.items() if isinstance(error, kind)), errno.EIO)
        is_path = isinstance(error, (FileNotFoundError, FileExistsError))  # stores put the path into their text
        reason = os.strerror(number) if is_path else reason_of(error).removesuffix(".")  # more text follows it
        raise OSError(number, reason, where) from error  # Python derives the same class from the number


@contextlib.contextmanager
def naming_any(where: str) -> Iterator[None]:
    """Do as :func:`naming`, and turn other exceptions into OSError: stores and torch's writers raise their own types."""
    with naming(where):
        try:
            yield
        except (OSError, DistExportError):
            raise
        except Exception as error:
            cause = error.__context__
            if isinstance(cause, OSError):  # a library noticed a failed call and raised its own error
                raise OSError(cause.errno or errno.EIO, reason_of(cause), where) from error
            raise OSError(errno.EIO, f"{type(error).__name__}: {first_line(error)}", where) from error


def why_no_directory(path: str) -> str | None:
    """Return why no directory can be made at ``path``, or no file in it; None if it can. It tries, and cleans up.

    Called on one rank. What another process makes there in the meantime is kept.
    """
    nearest = Path(path)
    while not os.path.lexists(nearest) and nearest.parent != nearest:
        nearest = nearest.parent
    try:
        longest = os.pathconf(nearest, "PC_PATH_MAX")
        if len(os.fsencode(os.path.abspath(path))) + _FILE_NAME_BYTES > longest:
            return f"it is too long: a path may have {longest:,} bytes"
        with tempfile.TemporaryDirectory(prefix=".dist_export-", dir=nearest) as folder:
            (Path(folder) / "file").touch()
    except OSError as error:
        return f"{nearest} cannot be written to: {error.strerror or error}"
    return None


def reserve(fd: int, num_bytes: int) -> None:
    """Set the size of a file, and reserve its space if the file system can."""
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, num_bytes)


def is_in_memory(path: str) -> bool:
    """Return whether a local path is on a tmpfs; False if the system does not report it."""
    try:
        device = os.stat(path).st_dev
        with open("/proc/self/mountinfo", encoding="utf-8", errors="replace") as mounts:
            lines = [line.split() for line in mounts]
    except OSError:
        return False
    # "36 35 0:28 / /dev/shm rw shared:4 - tmpfs tmpfs rw": proc(5)
    name = f"{os.major(device)}:{os.minor(device)}"
    return any(words[2] == name and words[words.index("-") + 1] == "tmpfs" for words in lines if "-" in words)


def file_system_of(path: str) -> str:
    """Return the kind of file system that a local path is on, as the system names it; empty if it is not reported."""
    real = os.path.realpath(path)
    kind, longest = "", -1
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                words = line.split()
                # "36 35 0:28 / /mnt/a\\040b rw shared:4 - ext4 /dev/sda1 rw": proc(5); a later mount hides an earlier one
                point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), words[4])
                is_above = real == point or real.startswith(point.rstrip("/") + "/")
                if is_above and len(point) >= longest and "-" in words:
                    kind, longest = words[words.index("-") + 1], len(point)
    except OSError:
        return ""
    return kind
