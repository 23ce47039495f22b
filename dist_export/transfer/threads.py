"""Run one function for several shares of work, a thread each. Every error is heard: the first one is raised."""

from __future__ import annotations

import concurrent.futures
from collections.abc import Callable, Sequence
from typing import TypeVar

S = TypeVar("S")
T = TypeVar("T")


def run_threads(work: Callable[[S], T], shares: Sequence[S]) -> list[T]:
    """Return what ``work`` returned for each share, in order; a single share needs no thread."""
    if len(shares) == 1:
        return [work(shares[0])]
    with concurrent.futures.ThreadPoolExecutor(len(shares), thread_name_prefix="transfer") as pool:
        return [future.result() for future in [pool.submit(work, share) for share in shares]]
