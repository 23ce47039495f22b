"""What this process has exchanged with object stores, counted."""

from __future__ import annotations

import threading
from collections import Counter


class Traffic:
    """What this process has exchanged with object stores. Any thread."""

    NAMES = ("downloaded", "uploaded", "copied", "requests", "retries")
    """Bytes of objects that came here, went from here, and were copied within the store; requests; those tried again."""

    def __init__(self) -> None:
        self._lock = threading.Lock()
        self._counts: Counter[str] = Counter()

    def add(self, **counts: int) -> None:
        """Add to some counts."""
        with self._lock:
            self._counts.update(counts)

    def snapshot(self) -> dict[str, int]:
        """Return all counts so far."""
        with self._lock:
            return {name: self._counts[name] for name in self.NAMES}

    def since(self, before: dict[str, int]) -> dict[str, int]:
        """Return what has been added since a snapshot."""
        return {name: count - before[name] for name, count in self.snapshot().items()}


TRAFFIC = Traffic()
