"""SIGTERM as an event that a thread can wait for, because the main thread may be inside a collective for long."""

from __future__ import annotations

import os
import select
import signal
from types import FrameType


class SigtermPipe:
    """Replaces the handler of SIGTERM until it is closed. Built and closed in the main thread; another thread waits."""

    def __init__(self) -> None:
        self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
        self._handler = signal.signal(signal.SIGTERM, _do_nothing)
        self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)

    def wait(self, secs: float) -> bool:
        """Wait for at most ``secs`` seconds; return whether SIGTERM has arrived."""
        ready, _, _ = select.select([self._reader], [], [], secs)
        numbers = os.read(self._reader, 64) if ready else b""
        others = numbers.replace(b"\0", b"").replace(bytes([signal.SIGTERM]), b"")
        if others and self._wakeup >= 0:
            os.write(self._wakeup, others)  # other signals go to the earlier wakeup descriptor
        return signal.SIGTERM in numbers

    def wake(self) -> None:
        """End a wait."""
        os.write(self._writer, b"\0")

    def close(self) -> None:
        """Restore the earlier handler of SIGTERM. Call it once: a second call could close descriptors of other code."""
        signal.set_wakeup_fd(self._wakeup)
        signal.signal(signal.SIGTERM, self._handler)
        os.close(self._reader)
        os.close(self._writer)


def _do_nothing(_number: int, _frame: FrameType | None) -> None:
    """Replace the default handler, which would end the process before it could print a message."""
