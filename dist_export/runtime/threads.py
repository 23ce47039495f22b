"""Run one function for several shares of work, a thread each. Every error is heard: the first one is raised."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import TypeVar

import numpy as np

_KEPT_BYTES = (32 << 20) - (1 << 16)
"""Just under glibc's own limit for that bound."""

S = TypeVar("S")
T = TypeVar("T")


def keep_freed_memory() -> None:
    """Let the allocator keep buffers of up to 32 MiB for their next use instead of giving each back to the system.

    glibc raises that bound to the size of the largest block that it has given back (mallopt(3), M_MMAP_THRESHOLD); until
    then every array of a census costs page faults, more of them than work. An array that is never touched is enough.
    """
    np.empty(_KEPT_BYTES, np.uint8)


def run_threads(work: Callable[[S], T], shares: Sequence[S]) -> list[T]:
    """Return what ``work`` returned for each share, in order; a single share needs no thread."""
    if len(shares) == 1:
        return [work(shares[0])]
    with concurrent.futures.ThreadPoolExecutor(len(shares), thread_name_prefix="share") as pool:
        return [future.result() for future in [pool.submit(work, share) for share in shares]]
