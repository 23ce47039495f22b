"""Open a package in a fresh process; print what that costs as JSON: ``python -m scripts.bench.opening PACKAGE``.

It is opened several times, and none is closed: memory that a closed package gave back would serve the next one.
"""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import NamedTuple

import dist_export
from scripts.bench.processes import ROOT, ContenderError
from scripts.bench.watch import MemoryWatch

_TIMES = 16


class Opening(NamedTuple):
    """What one opening costs."""

    seconds: float
    """Of processor time, median."""
    anonymous_bytes: float
    mapped_bytes: float
    """Resident memory, while the package is open."""


def measure_opening(package: Path) -> Opening:
    """Open a package in a process of its own; ContenderError if that fails."""
    command = [sys.executable, "-m", "scripts.bench.opening", str(package)]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise ContenderError(f"{package} cannot be opened in a process of its own: {done.stderr.strip()}")
    return Opening(**json.loads(done.stdout.splitlines()[-1]))


def main() -> int:
    """Open the package, and print the figures."""
    path = sys.argv[1]
    packages = [dist_export.open_package(path)]  # the first imports what it needs
    watch = MemoryWatch()
    seconds = []
    for _ in range(_TIMES):
        begin = time.process_time()
        packages.append(dist_export.open_package(path))
        seconds.append(time.process_time() - begin)
    watch.stop()
    opening = Opening(statistics.median(seconds), watch.peak_anonymous / _TIMES, watch.peak_mapped / _TIMES)
    print(json.dumps(opening._asdict()))
    for package in packages:
        package.close()
    return 0


if __name__ == "__main__":
    sys.exit(main())
