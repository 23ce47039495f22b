"""Cache values that are slow to make and large: each thread keeps only the value that it requested last."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable, Hashable
from typing import Generic, TypeVar

T = TypeVar("T")


class HeldValues(Generic[T]):
    """Returns the value of another thread that has the same key, or makes a new one. Any thread."""

    def __init__(self) -> None:
        self._mine = threading.local()
        self._known: weakref.WeakValueDictionary[Hashable, T] = weakref.WeakValueDictionary()
        self._lock = threading.Lock()

    def let_go(self) -> None:
        """Release this thread's value."""
        self._mine.key = self._mine.value = None

    def get(self, key: Hashable, fetch: Callable[[], T]) -> T:
        """Return the value under ``key``; call ``fetch`` if no thread has it."""
        if getattr(self._mine, "key", None) == key:
            held: T = self._mine.value
            return held
        self.let_go()  # before the next one is made, so that memory never holds both
        with self._lock:
            found = self._known.get(key)
            if found is None:
                found = self._known[key] = fetch()
        self._mine.key, self._mine.value = key, found
        return found
