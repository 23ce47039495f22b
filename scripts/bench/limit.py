"""The limit: how fast this machine copies files that hold nothing but the kept bytes.

The fastest of three ways counts: the ``cp`` command, a ``sendfile`` loop, a ``copy_file_range`` loop. Each writer has
an equal share of the bytes; the two loops may cut files for that, ``cp`` takes whole ones. Every file is synced.
"""

from __future__ import annotations

import itertools
import os
import shutil
import subprocess
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any, NamedTuple

from scripts.bench.watch import touch_memory

_MAX_BYTES = 1 << 30
"""Of one system call."""


class Range(NamedTuple):
    """Bytes ``begin`` to ``end`` of a file."""

    path: Path
    begin: int
    end: int


def time_limits(files: Path, target: Path, num_writers: Sequence[int], *, touch: int) -> dict[str, dict[str, float]]:
    """Copy all files of a directory to ``target`` in each way; return seconds by number of writers and way.

    ``touch``: bytes of memory to touch before each, see :func:`~scripts.bench.watch.touch_memory`.
    """
    paths = sorted(files.iterdir())
    found: dict[str, dict[str, float]] = {}
    for writers in num_writers:
        shares = share_ranges(paths, writers)
        ways: dict[str, Callable[[], None]] = {
            "cp": lambda writers=writers: _run_all(_copy_whole, share_files(paths, writers), target),  # type: ignore[misc]
            "sendfile": lambda shares=shares: _run_all(_send, shares, target),  # type: ignore[misc]
            "copy_file_range": lambda shares=shares: _run_all(_copy_ranges, shares, target),  # type: ignore[misc]
        }
        found[str(writers)] = {}
        for way, copy in ways.items():
            touch_memory(touch)
            target.mkdir()
            begin = time.monotonic()
            copy()
            found[str(writers)][way] = time.monotonic() - begin
            for path in paths:
                if (target / path.name).stat().st_size != path.stat().st_size:
                    raise RuntimeError(f"{way} did not copy all of {path}")
            shutil.rmtree(target)
    return found


def share_files(paths: Sequence[Path], writers: int) -> list[list[Path]]:
    """Deal whole files to writers, the largest first, each to the one with the fewest bytes."""
    shares: list[list[Path]] = [[] for _ in range(writers)]
    num_bytes = [0] * writers
    for path in sorted(paths, key=lambda path: -path.stat().st_size):
        least = num_bytes.index(min(num_bytes))
        shares[least].append(path)
        num_bytes[least] += path.stat().st_size
    return [share for share in shares if share]


def share_ranges(paths: Sequence[Path], writers: int) -> list[list[Range]]:
    """Cut all bytes into equal shares, which may begin and end within a file."""
    sizes = [path.stat().st_size for path in paths]
    total = sum(sizes)
    bounds = [total * writer // writers for writer in range(writers + 1)]
    shares = []
    for first, last in itertools.pairwise(bounds):
        share, position = [], 0
        for path, size in zip(paths, sizes, strict=True):
            begin, end = max(first - position, 0), min(last - position, size)
            if begin < end:
                share.append(Range(path, begin, end))
            position += size
        shares.append(share)
    return shares


def sync_files(directory: Path) -> None:
    """Make all files of a directory durable."""
    for path in sorted(directory.rglob("*")):
        if path.is_file():
            _sync(path)


def _run_all(copy: Callable[[list[Any], Path], None], shares: Sequence[list[Any]], target: Path) -> None:
    with ThreadPoolExecutor(len(shares)) as pool:
        for done in [pool.submit(copy, share, target) for share in shares]:
            done.result()


def _copy_whole(paths: list[Path], target: Path) -> None:
    subprocess.run(["cp", *map(str, paths), str(target)], check=True)
    for path in paths:
        _sync(target / path.name)


def _send(ranges: list[Range], target: Path) -> None:
    def send(source: int, output: int, position: int, num_bytes: int) -> int:
        os.lseek(output, position, os.SEEK_SET)
        return os.sendfile(output, source, position, num_bytes)

    _copy(ranges, target, send)


def _copy_ranges(ranges: list[Range], target: Path) -> None:
    def copy(source: int, output: int, position: int, num_bytes: int) -> int:
        return os.copy_file_range(source, output, num_bytes, position, position)

    _copy(ranges, target, copy)


def _copy(ranges: list[Range], target: Path, copy: Callable[[int, int, int, int], int]) -> None:
    for path, begin, end in ranges:
        source = os.open(path, os.O_RDONLY)
        output = os.open(target / path.name, os.O_WRONLY | os.O_CREAT, 0o644)
        try:
            position = begin
            while position < end:
                count = copy(source, output, position, min(end - position, _MAX_BYTES))
                if count == 0:
                    raise RuntimeError(f"{path} ended at byte {position}")
                position += count
            os.fsync(output)
        finally:
            os.close(source)
            os.close(output)


def _sync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
