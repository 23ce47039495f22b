"""What the threads of this process are doing to files right now: how a hang is told from slow work, and which file it is in."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator


class Activity:
    """Calls to the system that are under way, and how many have come back. One for the process; any thread."""

    def __init__(self) -> None:
        self.done = 0
        """Grows with every call that came back. Not exact where threads add at once; that it moves is what counts."""
        self._running: dict[int, tuple[float, str]] = {}

    def begin(self, where: str) -> None:
        """Say that this thread is about to read or write the file ``where``."""
        self._running[threading.get_ident()] = (time.monotonic(), where)

    def end(self) -> None:
        """Say that the call came back."""
        self._running.pop(threading.get_ident(), None)
        self.done += 1

    @contextlib.contextmanager
    def of(self, where: str) -> Iterator[None]:
        """Say that this thread reads or writes the file ``where`` while the block runs."""
        self.begin(where)
        try:
            yield
        finally:
            self.end()

    def oldest(self) -> str:
        """Return the file of the call that has been under way for longest, empty where there is none."""
        running = list(self._running.values())
        return min(running)[1] if running else ""


ACTIVITY = Activity()

_STAGES: list[tuple[str, float]] = []


@contextlib.contextmanager
def in_stage(name: str) -> Iterator[None]:
    """Say which stage of the export the main thread is in while the block runs."""
    _STAGES.append((name, time.monotonic()))
    try:
        yield
    finally:
        _STAGES.pop()


def current_stage() -> str:
    """Return the stage that the main thread is in, empty between stages."""
    return current_stage_since()[0]


def current_stage_since() -> tuple[str, float]:
    """Return that stage and when it began, on the clock of ``time.monotonic``."""
    return next(iter(_STAGES[-1:]), ("", time.monotonic()))
