"""Counters, queues of work and small values that ranks share without waiting.

Nothing here is a collective: any rank and any thread may call it at any time. A single process keeps it in memory.
"""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

_FROM_END = 1 << 32


class SharedStore:
    """Counters, queues and values of the ranks of one export."""

    def __init__(
        self, store: Any, *, ask: Callable[[Callable[[], Any]], Any], note_progress: Callable[[], None]
    ) -> None:
        """Keep the shared data in ``store``, a store of ``torch.distributed``, or in this process if it is None.

        Args:
            store: the job's store, within the export's own prefix.
            ask: runs one call to the store, and handles a store that is gone.
            note_progress: called when this rank has added to a counter, which shows that it does not hang.
        """
        self._store = store
        self._ask = ask
        self._note_progress = note_progress
        self._counters: dict[str, int] = {}
        self._values: dict[str, bytes] = {}
        self._lock = threading.Lock()

    def add(self, counter: str, amount: int) -> int:
        """Add to a counter and return its value; an amount of 0 reads it."""
        if self._store is None:
            with self._lock:
                self._counters[counter] = self._counters.get(counter, 0) + amount
                return self._counters[counter]
        if amount:  # a read is no progress: the display reads all the time
            self._note_progress()
        return int(self._ask(lambda: self._store.add(f"add/{counter}", amount)))

    def put(self, key: str, value: bytes) -> None:
        """Store a few bytes under ``key``, for any rank."""
        if self._store is None:
            self._values[key] = value
        else:
            self._ask(lambda: self._store.set(f"put/{key}", value))

    def take(self, key: str) -> bytes:
        """Return the value under ``key``, which a rank is known to have stored."""
        return self._values[key] if self._store is None else bytes(self._ask(lambda: self._store.get(f"put/{key}")))

    def open_queue(self, queue: str) -> None:
        """Create a queue, so that :meth:`count_taken` finds it. One rank calls it, in a step before the queue is used."""
        self.add(f"queue/{queue}", 0)

    def claim(self, queue: str, length: int, *, from_end: bool = False) -> int | None:
        """Return the number of an item that no other call gets; None if all items are taken.

        One counter holds how many items were taken from the front (low half) and from the end (high half), so a single
        addition decides. The owner takes from the front; a rank that steals work takes from the end.
        """
        taken = self.add(f"queue/{queue}", _FROM_END if from_end else 1)
        front, back = taken % _FROM_END, taken // _FROM_END
        if front + back > length:
            return None
        return length - back if from_end else front - 1

    def count_taken(self, queues: list[str]) -> list[tuple[int, int]]:
        """Return for each queue how often an item was requested from its front and from its end."""
        if self._store is None:
            counts = [self.add(f"queue/{queue}", 0) for queue in queues]
        else:
            keys = [f"add/queue/{queue}" for queue in queues]
            counts = [int(value) for value in self._ask(lambda: self._store.multi_get(keys))]
        return [(count % _FROM_END, count // _FROM_END) for count in counts]
