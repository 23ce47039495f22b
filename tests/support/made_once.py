"""What takes long to make is made once for all pytest workers."""

from __future__ import annotations

import fcntl
import os
from collections.abc import Callable
from pathlib import Path

import pytest


def make_once(factory: pytest.TempPathFactory, name: str, make: Callable[[Path], object]) -> Path:
    """Return a folder that ``make`` filled, in this worker or another one. Tests must not change it.

    If ``make`` fails, the next caller tries again, so that each of its tests has the error.
    """
    base = factory.getbasetemp()
    base = base.parent if "PYTEST_XDIST_WORKER" in os.environ else base  # workers have a folder each in that of the run
    folder, done = base / name, base / f"{name}.done"
    with open(base / f"{name}.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not done.exists():
            attempt = factory.mktemp(name)
            make(attempt)
            attempt.rename(folder)
            done.touch()
    return folder
