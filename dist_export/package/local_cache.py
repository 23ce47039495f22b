"""Keep ranges of a store's files on a local disk, so that a lookup asks the store for rows alone."""

from __future__ import annotations

import contextlib
import os
import tempfile
import threading
from pathlib import Path

import numpy as np
import xxhash

from dist_export.errors import UserError
from dist_export.package.opened_files import OpenedFiles
from dist_export.storage.directory import Directory

_PIECE_BYTES = 4 << 20
_DIGEST_BYTES = 16


def make_scratch(directory: Directory, held: contextlib.ExitStack) -> str | None:
    """Return a new cache directory in TMPDIR for a package that is looked up piece by piece, each of which needs its ids.

    ``held`` removes it. None for a package on a disk.
    """
    if directory.is_local:
        return None
    return held.enter_context(tempfile.TemporaryDirectory(prefix="dist_export-cache-", ignore_cleanup_errors=True))


class LocalCache:
    """Ranges of one package's files in a local directory, mapped. Processes may share the directory.

    Each range has a folder named after the package's digest, so a package that replaced another is never mixed with it.
    """

    def __init__(self, folder: str | os.PathLike[str], files: OpenedFiles, digest: str) -> None:
        """Use ``folder``, which is made if it is missing, for the package of this manifest digest."""
        self._folder = Path(folder) / digest.rpartition(":")[2]
        self._files = files
        self._mapped: dict[tuple[str, int, int], np.ndarray] = {}
        self._lock = threading.Lock()

    def map(self, name: str, begin: int, num_bytes: int) -> np.ndarray:
        """Return a range of a file, uint8 of shape (num_bytes,). It is fetched only once.

        Its digest is behind it in the cached file, and is compared once in each process. A damaged range is fetched again.

        Raises:
            PackageError: the store cannot be read, or the package was replaced.
            UserError: the directory cannot be written.
        """
        mapped = self._mapped.get((name, begin, num_bytes))
        if mapped is not None:
            return mapped
        with self._lock:  # threads that begin together fetch a range once
            mapped = self._mapped.get((name, begin, num_bytes))
            if mapped is None:
                mapped = self._mapped[name, begin, num_bytes] = self._map(name, begin, num_bytes)
        return mapped

    def _map(self, name: str, begin: int, num_bytes: int) -> np.ndarray:
        path = self._folder / f"{xxhash.xxh3_128_hexdigest(name.encode())}-{begin}-{num_bytes}"
        try:
            if not _is_whole(path, num_bytes):
                self._fetch(name, begin, num_bytes, path)
            return np.memmap(path, np.uint8, "r")[:num_bytes]
        except OSError as error:
            raise UserError(
                f"cache_dir: {error.filename or path} cannot be used: {error.strerror or error}; give a directory that can "
                "be written, or none. In a store, the base of an export and packages of diff need a TMPDIR with room"
            ) from error

    def _fetch(self, name: str, begin: int, num_bytes: int, path: Path) -> None:
        self._folder.mkdir(parents=True, exist_ok=True)
        fd, partial = tempfile.mkstemp(prefix=path.name, suffix=".partial", dir=self._folder)
        try:
            with (
                open(fd, "wb") as file,
                self._files.open_reader(name) as reader,
                reader.ahead(begin, num_bytes) as stream,
            ):
                hasher = xxhash.xxh3_128()
                buffer = memoryview(bytearray(min(_PIECE_BYTES, num_bytes)))
                for first in range(0, num_bytes, len(buffer)):
                    piece = buffer[: min(len(buffer), num_bytes - first)]
                    stream.read_into(piece)
                    hasher.update(piece)
                    file.write(piece)
                file.write(hasher.digest())
                file.flush()
                os.fsync(file.fileno())
            os.replace(partial, path)
        except BaseException:
            os.unlink(partial)
            raise


def _is_whole(path: Path, num_bytes: int) -> bool:
    """Return whether a cached range is there, with the digest that was written behind it."""
    if not path.exists() or path.stat().st_size != num_bytes + _DIGEST_BYTES:
        return False
    cached = np.memmap(path, np.uint8, "r")
    return xxhash.xxh3_128_digest(cached[:num_bytes].data) == cached[num_bytes:].tobytes()
