"""Which files the threads of this process read or write right now. It tells a hang from slow work, and names the file."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class Activity:
    """Counts the system calls that have returned, and lists those that are running. One object for the process; any thread."""

    def __init__(self) -> None:
        self.done = 0
        """Grows with every call that returns. Threads may lose an increment; only the fact that it changes is used."""
        self._running: dict[int, tuple[float, str]] = {}

    def begin(self, where: str) -> None:
        """Record that this thread is about to read or write the file ``where``."""
        self._running[threading.get_ident()] = (time.monotonic(), where)

    def end(self) -> None:
        """Record that the call has returned."""
        self._running.pop(threading.get_ident(), None)
        self.done += 1

    @contextlib.contextmanager
    def of(self, where: str) -> Iterator[None]:
        """Record that this thread reads or writes the file ``where`` while the block runs."""
        self.begin(where)
        try:
            yield
        finally:
            self.end()

    def oldest(self) -> str:
        """Return the file of the call that has run longest; empty if no call is running."""
        running = list(self._running.values())
        return min(running)[1] if running else ""


ACTIVITY = Activity()

_STAGES: list[tuple[str, float]] = []


@contextlib.contextmanager
def in_stage(name: str) -> Iterator[None]:
    """Record which stage of the export the main thread is in while the block runs."""
    _STAGES.append((name, time.monotonic()))
    try:
        yield
    finally:
        _STAGES.pop()


def current_stage() -> str:
    """Return the stage that the main thread is in; empty between stages."""
    return current_stage_since()[0]


def current_stage_since() -> tuple[str, float]:
    """Return that stage and the time when it began, on the clock of ``time.monotonic``."""
    return next(iter(_STAGES[-1:]), ("", time.monotonic()))
