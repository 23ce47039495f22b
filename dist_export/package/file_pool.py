"""The files of one package that stay open between lookups, within a number of descriptors."""

from __future__ import annotations

import resource
import threading
from collections import OrderedDict

from dist_export.package.held_file import HeldFile
from dist_export.storage.range_reader import RangeReader

_MAX_HELD = 256
"""The most descriptors of a package's files that are kept open."""


class FilePool:
    """Open files by name, the least recently used first. Safe to use from any thread."""

    def __init__(self) -> None:
        self.max_files = _MAX_HELD
        self._held: OrderedDict[str, HeldFile] = OrderedDict()
        self._lock = threading.Lock()
        soft, _ = resource.getrlimit(resource.RLIMIT_NOFILE)
        self._last_fd = soft // 2
        """If a file gets this descriptor or a higher one, an older file is closed, so that about half of all descriptors are
        left to the caller. The system always gives out the lowest free descriptor."""

    def is_near_limit(self, held: HeldFile) -> bool:
        """Return whether no further file should be opened in advance."""
        return held.reader.fd >= self._last_fd

    def take(self, name: str) -> HeldFile | None:
        """Return a file that is open, for one more use; None if it is not. Each use ends with :meth:`give_back`."""
        with self._lock:
            held = self._held.get(name)
            if held is not None:
                self._held.move_to_end(name)
                held.uses += 1
            return held

    def keep(self, name: str, reader: RangeReader) -> HeldFile:
        """Take in a file that was opened, for one use."""
        with self._lock:
            held = self._held.get(name)
            if held is None:
                held = self._held[name] = HeldFile(reader)
            else:  # another thread was faster
                reader.close()
            held.uses += 1
            self._shrink(len(self._held) - 1 if self.is_near_limit(held) else self.max_files)
        return held

    def give_back(self, name: str, held: HeldFile) -> None:
        """End one use."""
        with self._lock:
            held.uses -= 1
            if held.uses <= 0 and self._held.get(name) is not held:
                held.close()
            if len(self._held) > self.max_files:  # a lookup uses two files at once
                self._shrink(self.max_files)

    def close_unused(self) -> None:
        """Close all files that no lookup uses now."""
        with self._lock:
            self._shrink(0)

    def _shrink(self, most: int) -> None:
        """Close files that no lookup uses now, the least recently used first. The caller holds the lock."""
        for name in [name for name, held in self._held.items() if not held.uses]:
            if len(self._held) <= most:
                return
            self._held.pop(name).close()

    def survive_fork(self) -> None:
        """In a forked child, take a lock that no thread of the parent holds."""
        self._lock = threading.Lock()

    def close(self) -> None:
        """Close all files, whether in use or not."""
        while self._held:
            self._held.popitem()[1].close()
