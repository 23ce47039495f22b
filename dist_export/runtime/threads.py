"""Run one function for several shares of work, with a thread for each. The first error is raised."""

from __future__ import annotations

import concurrent.futures
import ctypes
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

_KEPT_BYTES = (32 << 20) - (1 << 16)
"""Just under glibc's own maximum for that threshold."""

S = TypeVar("S")
T = TypeVar("T")


def keep_freed_memory() -> None:
    """Make the allocator reuse freed buffers of up to 32 MiB instead of giving each back to the system.

    glibc raises its threshold to the size of the largest block that it has given back (mallopt(3), M_MMAP_THRESHOLD). Before
    that, every array of a census causes page faults, and they take longer than the work. One untouched array is enough.
    """
    np.empty(_KEPT_BYTES, np.uint8)


def run_threads(work: Callable[[S], T], shares: Sequence[S]) -> list[T]:
    """Return the results of ``work`` for each share, in order. A single share runs without a new thread."""
    if len(shares) == 1:
        return [work(shares[0])]
    with concurrent.futures.ThreadPoolExecutor(len(shares), thread_name_prefix="share") as pool:
        return [future.result() for future in [pool.submit(work, share) for share in shares]]


def return_freed_memory() -> None:
    """Give memory that was freed and kept for reuse back to the system, where the C library can (malloc_trim(3))."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)
