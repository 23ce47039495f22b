"""Count what this process exchanges with object stores."""

from __future__ import annotations

import threading
from collections import Counter


class Traffic:
    """Counts of what this process has exchanged with object stores. Any thread."""

    NAMES = ("downloaded", "uploaded", "copied", "requests", "retries")
    """Bytes downloaded, uploaded and copied within the store; number of requests; number of retries."""

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
        """Return how much the counts have grown since a snapshot."""
        return {name: count - before[name] for name, count in self.snapshot().items()}


TRAFFIC = Traffic()
