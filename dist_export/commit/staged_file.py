"""A file beside a shard: it is built in the staging, read back, and published with its receipt."""

from __future__ import annotations

import contextlib
import os
from collections.abc import Mapping

import xxhash

from dist_export.errors import CommitError
from dist_export.formats.digests import XXH3, digest_pieces, hash_whole
from dist_export.formats.tuning import STANDARD
from dist_export.manifest import RowIndexEntry
from dist_export.plan.plan import SparsePlan
from dist_export.runtime.io_activity import ACTIVITY
from dist_export.storage.directory import Directory, digest_file, pieces_of
from dist_export.storage.local_io import close_quietly, naming_any, refuse_zero
from dist_export.storage.staging import Staging
from dist_export.workdir.state import Receipt, read_receipt, write_receipt


class StagedFile:
    """A file that is being built. One thread. ``abandon`` it, unless ``publish`` was called."""

    def __init__(self, staging: Staging, name: str) -> None:
        """Begin the file. What an earlier export left of it is removed."""
        self.name = name
        self._staging = staging
        self._sums: list[tuple[int, int, bytes]] = []
        path = staging.path(name)
        with naming_any(path):
            staging.remove(name)
            self._fd = os.open(path, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_CLOEXEC, 0o666)

    def write(self, view: memoryview, position: int) -> None:
        """Write bytes at a position."""
        where = self._staging.path(self.name)
        with ACTIVITY.of(where), naming_any(where):
            written = 0
            while written < len(view):
                written += refuse_zero(os.pwrite(self._fd, view[written:], position + written))

    def expect(self, begin: int, num_bytes: int, xxh3: bytes) -> None:
        """Remember the xxh3-128 of bytes that were written. They are read back before the file is published."""
        self._sums.append((begin, num_bytes, xxh3))

    def publish(
        self,
        target: Directory,
        plan: SparsePlan,
        *,
        num_bytes: int,
        digest: str,
        in_place: bool,
        row_indexes: Mapping[str, RowIndexEntry | None] | None = None,
        chunk_bytes: int = STANDARD.chunk_bytes,
    ) -> Receipt:
        """Read the file back, and give it its name. Return its receipt, which is also written except ``in_place``.

        Raises:
            CommitError: what was read back is not what was written.
        """
        path, fd = self._staging.path(self.name), self._fd
        with ACTIVITY.of(path), naming_any(path):
            os.ftruncate(fd, num_bytes)  # a part that was given up may have left bytes
            os.fsync(fd)
            self._fd = -1
            os.close(fd)
        try:
            found = self._read_back(target, num_bytes, digest, chunk_bytes)
        except BaseException:
            self._staging.remove(self.name)
            raise
        receipt = Receipt(
            plan=plan.digest, name=self.name, num_bytes=num_bytes, digest=found, row_indexes=dict(row_indexes or {})
        )
        if not in_place:
            write_receipt(target, receipt)  # first, so that a killed export leaves no file that nobody knows
        self._staging.publish(self.name)
        return receipt

    def abandon(self) -> None:
        """Remove the file, unless it was published."""
        if self._fd >= 0:
            close_quietly(self._fd)
            self._fd = -1
            with contextlib.suppress(OSError):  # why it is unfinished is what the user must see
                self._staging.remove(self.name)

    def _read_back(self, target: Directory, num_bytes: int, algorithm: str, chunk_bytes: int) -> str:
        """Return the digest of the file, which must hold what was written. CommitError if the disk has changed it."""
        with contextlib.closing(self._staging.open_reader(self.name)) as reader:
            for begin, length, expected in self._sums:
                if hash_whole(pieces_of(reader, length, begin), XXH3) != expected:
                    raise CommitError(
                        f"{target.describe(self.name)}: what was read back is not what was written. No manifest was "
                        "written, so there is no package; check the disk and run the export again"
                    )
            return digest_pieces(pieces_of(reader, num_bytes), algorithm, chunk_bytes=chunk_bytes)


def hash_bytes(data: bytes) -> bytes:
    """Return the xxh3-128 that :meth:`StagedFile.expect` takes."""
    return xxhash.xxh3_128_digest(data)


def find_finished(
    target: Directory,
    plan: SparsePlan,
    name: str,
    *,
    digest: str,
    in_place: bool,
    chunk_bytes: int = STANDARD.chunk_bytes,
) -> Receipt | None:
    """Return the receipt of a file that an interrupted export of this plan has finished, if the file is still whole."""
    receipt = None if in_place else read_receipt(target, name)
    if receipt is None or receipt.plan != plan.digest or not target.exists(name):
        return None
    if target.stat(name).size != receipt.num_bytes:
        return None
    is_whole = digest_file(target, name, digest, chunk_bytes=chunk_bytes) == receipt.digest
    return receipt if is_whole else None
