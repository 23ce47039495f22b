"""Count the packages that read open files, so that the last one that is closed closes them."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Callable


class OpenCount:
    """The packages that read the files of one package: itself, and the delta packages on top of it. Any thread."""

    def __init__(self, close: Callable[[], object]) -> None:
        """Count from 0. ``close`` is called when the last user leaves."""
        self._close = close
        self._num_users = 0
        self._lock = threading.Lock()

    def join(self, user: object) -> Callable[[], None]:
        """Add a user, and return what it calls once it no longer reads. Later calls do nothing.

        A user that is gone without that call is no longer counted. It closes nothing: the files may still be read by whoever
        has a reference to them, and are closed with the last reference.
        """
        with self._lock:
            self._num_users += 1
        forget = weakref.finalize(user, self._leave, closes=False)
        forget.atexit = False

        def leave() -> None:
            if forget.detach() is not None:
                self._leave(closes=True)

        return leave

    def _leave(self, *, closes: bool) -> None:
        with self._lock:
            self._num_users -= 1
            is_last = not self._num_users
        if closes and is_last:
            self._close()
