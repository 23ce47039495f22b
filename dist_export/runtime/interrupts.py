"""Ctrl-C on the command line: the export stops cleanly within seconds, or is ended with exit code 130."""

from __future__ import annotations

import contextlib
import os
import select
import signal
import sys
import threading
import time
from collections.abc import Callable
from types import FrameType

from dist_export.runtime.terminal import SCREEN

EXIT_CODE = 130
"""128 + SIGINT, the code that shells report for a program that SIGINT has ended."""
GRACE_SECS = 5.0
"""How long an interrupted process may take to finish a work unit and clean up by itself."""
_AGAIN_SECS = 1.0
"""A SIGINT that comes sooner than this is the same one: torchrun sends the terminal's SIGINT to ranks a second time."""


class Interrupts:
    """Handles SIGINT while the block runs. One object for the process; entered in the main thread.

    The first SIGINT raises KeyboardInterrupt in the main thread. That thread may be in a call that does not return, or in
    code that swallows the exception. Therefore a second thread ends the process after GRACE_SECS, or at the next Ctrl-C.
    """

    def __init__(self) -> None:
        self.has_come = False
        """Whether the process was interrupted, and ends because of it."""
        self.describe: Callable[[], str] = _describe
        """Returns the message about the interrupt, as one line without a line break."""
        self._reader = self._writer = -1
        self._handler: object = None
        self._wakeup = -1
        self._raised_at = 0.0
        self._thread: threading.Thread | None = None

    def __enter__(self) -> Interrupts:
        is_main = threading.current_thread() is threading.main_thread()
        # a script's background process ignores SIGINT, and a program that calls this may have its own handler
        if is_main and signal.getsignal(signal.SIGINT) is signal.default_int_handler:
            self._reader, self._writer = os.pipe2(os.O_NONBLOCK | os.O_CLOEXEC)
            # the descriptor is written at once, even while the main thread is in a call that does not return
            self._wakeup = signal.set_wakeup_fd(self._writer, warn_on_full_buffer=False)
            self._handler = signal.signal(signal.SIGINT, self._take)
            self._thread = threading.Thread(target=self._watch, name="interrupts", daemon=True)
            self._thread.start()
        return self

    def __exit__(self, *_: object) -> None:
        self.has_come, self.describe = False, _describe
        thread, self._thread = self._thread, None
        if thread is None:
            return
        os.write(self._writer, b"\0")
        thread.join()
        signal.signal(signal.SIGINT, signal.default_int_handler)
        signal.set_wakeup_fd(self._wakeup)
        os.close(self._reader)
        os.close(self._writer)

    def _take(self, _number: int, _frame: FrameType | None) -> None:
        now = time.monotonic()
        if self.has_come and now - self._raised_at < _AGAIN_SECS:
            return  # a second exception would only disturb the clean-up after the first one
        self.has_come, self._raised_at = True, now
        os.write(self._writer, bytes([signal.SIGINT]))  # other code may have taken the wakeup descriptor
        raise KeyboardInterrupt

    def _watch(self) -> None:
        came_at = None
        while True:
            left = None if came_at is None else max(0.0, came_at + GRACE_SECS - time.monotonic())
            ready, _, _ = select.select([self._reader], [], [], left)
            numbers = os.read(self._reader, 64) if ready else b""
            if 0 in numbers:
                return
            now = time.monotonic()
            if signal.SIGINT in numbers and came_at is None:
                self.has_come, came_at = True, now
            is_asked_again = came_at is not None and signal.SIGINT in numbers and now - came_at > _AGAIN_SECS
            if came_at is not None and (is_asked_again or now - came_at >= GRACE_SECS):
                self._leave()

    def _leave(self) -> None:
        """End the process and its children at once. The first rank of each machine prints the message."""
        if os.environ.get("LOCAL_RANK", "0") == "0":
            with contextlib.suppress(OSError):  # the terminal may be gone
                os.write(2, f"{SCREEN.close()}dist_export: {self.describe()}\n".encode())
        end_children()
        os._exit(EXIT_CODE)


def end_children() -> None:
    """End the processes that this one started with multiprocessing, as a regular exit does: nobody waits for them."""
    if "multiprocessing" in sys.modules:
        import multiprocessing

        for child in multiprocessing.active_children():
            child.terminate()


def _describe() -> str:
    return "interrupted"


INTERRUPTS = Interrupts()
