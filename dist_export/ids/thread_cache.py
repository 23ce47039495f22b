"""Things that are costly to make and large to hold: each thread holds what it asked for last, and no longer."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class HeldValues(Generic[T]):
    """Gives what another thread holds to whoever asks for the same; else makes it anew. Any thread."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._known: weakref.WeakValueDictionary[Hashable, T] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def let_go(self) -> None:
        """Hold nothing any more in this thread."""
        self._mine.key = self._mine.value = None

    def get(self, key: Hashable, fetch: Callable[[], T]) -> T:
        """Return the value under ``key``, which ``fetch`` gives where no thread has it."""
        if getattr(self._mine, "key", None) == key:
            held: T = self._mine.value
            return held
        self.let_go()  # before the next one is made, not after
        with self._lock:
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = fetch()
        self._mine.key, self._mine.value = key, found
        return found
