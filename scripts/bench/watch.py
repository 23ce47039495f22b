"""What a process uses: memory, sampled while it works, and bytes read."""

from __future__ import annotations

import mmap
import os
import threading

import numpy as np

_INTERVAL_SECS = 0.005
_FIELDS = (b"RssAnon:", b"RssFile:", b"RssShmem:")


class MemoryWatch:
    """Samples this process's resident memory every 5 ms in a thread. All figures are bytes above the first sample."""

    def __init__(self) -> None:
        self._status = os.open("/proc/self/status", os.O_RDONLY)
        self._baseline = self._sample()
        self._peaks = (0, 0)
        self._stop = threading.Event()
        self._thread = threading.Thread(target=self._run, name="memory watch", daemon=True)
        self._thread.start()

    @property
    def peak_anonymous(self) -> int:
        """Highest anonymous memory so far."""
        self._look()
        return self._peaks[0]

    @property
    def peak_mapped(self) -> int:
        """Highest memory that belongs to mapped files and shared memory so far."""
        self._look()
        return self._peaks[1]

    @property
    def baseline(self) -> int:
        """Anonymous and mapped memory, in bytes, when the watch began."""
        return sum(self._baseline)

    def stop(self) -> None:
        """End the sampling; the peaks stay."""
        self._stop.set()
        self._thread.join()

    def _run(self) -> None:
        while not self._stop.wait(_INTERVAL_SECS):
            self._look()

    def _look(self) -> None:
        anonymous, mapped = self._sample()
        self._peaks = (
            max(self._peaks[0], anonymous - self._baseline[0]),
            max(self._peaks[1], mapped - self._baseline[1]),
        )

    def _sample(self) -> tuple[int, int]:
        lines = os.pread(self._status, 8192, 0).splitlines()
        kilobytes = {line.split()[0]: int(line.split()[1]) for line in lines if line.startswith(_FIELDS)}
        anonymous, mapped, shared = (kilobytes[field] << 10 for field in _FIELDS)
        return anonymous, mapped + shared


def touch_memory(num_bytes: int) -> None:
    """Write to so much memory and give it back, so that what is timed next gets pages that the machine really has.

    A hypervisor takes back what a virtual machine has not used for a while (free page reporting); the first touch then
    costs ten times a common page fault, and whoever came first in a round would pay for it.
    """
    if num_bytes:
        with mmap.mmap(-1, num_bytes) as memory:
            np.frombuffer(memory, np.uint8)[:: mmap.PAGESIZE] = 1


def count_read_bytes() -> int:
    """Return the bytes that this process has read by system calls so far, from the page cache too."""
    with open("/proc/self/io", encoding="ascii") as file:
        return next(int(line.split()[1]) for line in file if line.startswith("rchar:"))
