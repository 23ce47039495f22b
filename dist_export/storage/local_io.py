"""System calls on local files: made durable, and with errors that say which file they are about."""

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
"""That the longest path within a package takes, and that of a file on its way."""

_NUMBERS = {
    FileNotFoundError: errno.ENOENT,
    FileExistsError: errno.EEXIST,
    PermissionError: errno.EACCES,
    TimeoutError: errno.ETIMEDOUT,
}
"""Of errors that stores raise without a number."""


def sync_directory(path: str) -> None:
    """Make a rename in ``path`` durable, where the file system knows such a thing."""
    fd = os.open(path, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        with naming(path):
            os.fsync(fd)
    except OSError as error:
        if error.errno not in (errno.EINVAL, errno.EOPNOTSUPP):  # so some network file systems say that they do not
            raise
    finally:
        close_quietly(fd)


def make_directories(path: str) -> None:
    """Make a local directory and its parents, as far as they are not there; the new ones survive a crash."""
    if os.path.isdir(path):
        return
    parent = os.path.dirname(path)
    make_directories(parent)
    with contextlib.suppress(FileExistsError):  # another rank was faster; a file there shows when it is written into
        os.mkdir(path)
    with contextlib.suppress(PermissionError):  # a parent that may be written to but not read cannot be synced
        sync_directory(parent)


def write_new(path: str, data: bytes) -> None:
    """Make a local file with this content, durable."""
    fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)
    try:
        left = memoryview(data)
        while left:
            left = left[refuse_zero(os.write(fd, left)) :]
        os.fsync(fd)
    except BaseException:
        close_quietly(fd)
        raise
    os.close(fd)  # some file systems write only now, and tell only now that they could not


def refuse_zero(written: int) -> int:
    """Return how many bytes a call took; OSError for none, which would be tried again for ever."""
    if not written:
        raise OSError(errno.EIO, "the file system took no bytes")
    return written


def close_quietly(fd: int) -> None:
    """Close what was only read, or what another error has spoilt already: that one is to be told."""
    with contextlib.suppress(OSError):
        os.close(fd)


@contextlib.contextmanager
def naming(where: str) -> Iterator[None]:
    """Let an error of the system say which file or directory it is about: calls on descriptors do not."""
    try:
        yield
    except OSError as error:
        if error.errno is not None and error.filename is not None:
            raise
        number = error.errno or next((n for kind, n in _NUMBERS.items() if isinstance(error, kind)), errno.EIO)
        is_path = isinstance(error, (FileNotFoundError, FileExistsError))  # stores give them the path for a text
        reason = os.strerror(number) if is_path else reason_of(error).removesuffix(".")  # a sentence goes on behind it
        raise OSError(number, reason, where) from error  # of the same class: Python takes it from the number


@contextlib.contextmanager
def naming_any(where: str) -> Iterator[None]:
    """Let also what is no OSError become one: stores, and torch's writers, raise what their libraries do."""
    with naming(where):
        try:
            yield
        except (OSError, DistExportError):
            raise
        except Exception as error:
            cause = error.__context__
            if isinstance(cause, OSError):  # a library that noticed that a call had failed, in its own words
                raise OSError(cause.errno or errno.EIO, reason_of(cause), where) from error
            raise OSError(errno.EIO, f"{type(error).__name__}: {first_line(error)}", where) from error


def why_no_directory(path: str) -> str | None:
    """Return why no directory can be made at ``path``, or no file in it; None where it can. It tries, and leaves nothing behind.

    On one rank: what another one makes there meanwhile stays as it is.
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
    """Give a file its size, and its space where the file system can reserve it."""
    try:
        os.posix_fallocate(fd, 0, num_bytes)
    except OSError as error:
        if error.errno not in (errno.EOPNOTSUPP, errno.EINVAL, errno.ENOSYS):
            raise
        os.ftruncate(fd, num_bytes)


def is_in_memory(path: str) -> bool:
    """Whether a local path lies on a tmpfs; False where the system does not tell."""
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
    """Return the kind of file system that a local path lies on, as the system calls it; empty where it does not tell."""
    real = os.path.realpath(path)
    kind, longest = "", -1
    try:
        with open("/proc/self/mountinfo", encoding="utf-8", errors="surrogateescape") as mounts:
            for line in mounts:
                words = line.split()
                # "36 35 0:28 / /mnt/a\\040b rw shared:4 - ext4 /dev/sda1 rw": proc(5); of two on one place the later is seen
                point = re.sub(r"\\([0-7]{3})", lambda found: chr(int(found[1], 8)), words[4])
                is_above = real == point or real.startswith(point.rstrip("/") + "/")
                if is_above and len(point) >= longest and "-" in words:
                    kind, longest = words[words.index("-") + 1], len(point)
    except OSError:
        return ""
    return kind
