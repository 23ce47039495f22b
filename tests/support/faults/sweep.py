"""Let each call of an export fail once, one after the other, and judge how each export ends; started by scripts/faults.sh.

usage: python -m tests.support.faults.sweep [MODE ...]     modes: reshard merge kernel copy dense; by default all but dense
"""

from __future__ import annotations

import errno
import sys
import tempfile
from pathlib import Path

from tests.support.faults.fault_cases import Bench, assert_ends_well, build_shim

CALLS = (
    *("pwrite", "write", "pread", "read", "copy", "sendfile", "fsync", "rename", "create", "open"),
    *("fallocate", "truncate", "unlink", "mkdir", "close"),
)
ERRORS = {"pwrite": (errno.EIO, errno.ENOSPC), "write": (errno.EIO, errno.ENOSPC), "create": (errno.EIO, errno.EMFILE)}
MODES = ["reshard", "merge", "kernel", "copy"]


def sweep(bench: Bench, mode: str, place: str) -> tuple[int, list[str]]:
    """Return how many faults were tried on the calls that touch ``place``, and what was wrong."""
    tried, wrong = 0, []
    for call in CALLS:
        # the standard library closes a directory twice where the first time fails, which no directory does
        spec = f"calls={call} path={place} not=scratch-"
        seen = bench.export(mode, bench.new_target(), f"{spec} what=none").seen
        for number in ERRORS.get(call, (errno.EIO,)):
            for at in range(1, seen + 1):
                fault = f"{spec} at={at} what=error:{number}"
                tried += 1
                try:
                    assert_ends_well(bench, mode, fault)
                except AssertionError as error:
                    wrong.append(f"{mode}: {fault}: {error}")
    return tried, wrong


def main() -> int:
    """Return the exit code: 1 where something was wrong."""
    with tempfile.TemporaryDirectory() as folder:
        shim = build_shim(Path(folder))
        if isinstance(shim, str):
            print(shim)
            return 1
        bench = Bench(Path(folder), shim)
        is_wrong = False
        try:
            for mode in sys.argv[1:] or MODES:
                for place in ("/out_", f"/{bench.source(mode).name}/"):
                    tried, wrong = sweep(bench, mode, place)
                    is_wrong = is_wrong or bool(wrong)
                    print(
                        f"{mode}: {tried} faults on {place}: {len(wrong)} did not end well",
                        *wrong,
                        sep="\n  ",
                        flush=True,
                    )
        finally:
            bench.close()
    return int(is_wrong)


if __name__ == "__main__":
    sys.exit(main())
