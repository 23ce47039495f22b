"""Ranges of a store's files on a local disk: threads that ask for one range together fetch it once."""

from __future__ import annotations

import contextlib
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import numpy as np

from dist_export.package.local_cache import LocalCache

CONTENT = np.arange(100, dtype=np.uint8)


class Files:
    """As the files of an open package, of one file that is slow to read."""

    def __init__(self) -> None:
        self.num_reads = 0

    @contextlib.contextmanager
    def open_reader(self, name: str) -> Iterator[Any]:
        del name
        yield self

    @contextlib.contextmanager
    def ahead(self, begin: int, num_bytes: int) -> Iterator[Any]:
        self.num_reads += 1
        time.sleep(0.05)
        self._rest = CONTENT[begin : begin + num_bytes]
        yield self

    def read_into(self, piece: memoryview) -> None:
        piece[:] = self._rest[: len(piece)].data
        self._rest = self._rest[len(piece) :]


def test_threads_that_begin_together_fetch_a_range_once(tmp_path: Path) -> None:
    files: Any = Files()
    cache, together = LocalCache(tmp_path / "cache", files, "xxh3:1"), threading.Barrier(4)

    def ask(_: int) -> bytes:
        together.wait()
        return cache.map("file", 10, 20).tobytes()

    with ThreadPoolExecutor(4) as pool:
        assert set(pool.map(ask, range(4))) == {CONTENT[10:30].tobytes()}
    assert files.num_reads == 1
