"""Describe errors inside the user's model, with the line of the user's code."""

from __future__ import annotations

import contextlib
import linecache
import logging
import os
import re
import sysconfig
import traceback
from collections.abc import Iterator
from typing import Any

import torch

_OWN = tuple(os.path.dirname(os.path.abspath(file)) + os.sep for file in (torch.__file__, os.path.dirname(__file__)))
_SYMPY = os.path.join("site-packages", "sympy", "")
_STANDARD = os.path.join(sysconfig.get_path("stdlib"), "")
_GUARD_LOG = "torch.fx.experimental.symbolic_shapes"


def said(error: BaseException) -> str:
    """Return the type of an error and the first line of its text that is not empty."""
    lines = [line.strip() for line in str(error).splitlines() if line.strip()]
    return f"{type(error).__name__}: {lines[0][:400]}" if lines else type(error).__name__


def blame(error: BaseException) -> str:
    """Return `` at <file>:<line> (<code>)``, the innermost line of the user's own code; empty if there is none."""
    place = _innermost([(frame.filename, frame.lineno or 0) for frame in traceback.extract_tb(error.__traceback__)])
    if not place:  # torch.export may drop the traceback, but its text contains it
        place = blame_text(str(error))
    return place


def blame_text(text: str) -> str:
    """Do the same as :func:`blame` for a traceback as text, such as a node of a graph has."""
    return _innermost([(file, int(line)) for file, line in re.findall(r'File "([^"]+)", line (\d+)', text)])


@contextlib.contextmanager
def watch_sizes() -> Iterator[list[str]]:
    """Within this block, record the user's lines that fix a free size, as ``blame`` does.

    torch.export reports that a size became a constant, but not where. It writes its log of guards while the user's line
    runs, so the stack at that time shows the line.
    """
    found: list[str] = []

    class Listener(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            text = record.getMessage()
            is_unification = re.search(r"eval Eq\([a-z]+\d+, [a-z]+\d+\) \[guard", text)  # two inputs' batch sizes
            if is_unification or not ("[guard added]" in text or re.search(r"set_replacement \w+ = \d+ ", text)):
                return
            place = _innermost([(frame.filename, frame.lineno or 0) for frame in traceback.extract_stack()])
            if place and place not in found:
                found.append(place)

    logger: Any = logging.getLogger(_GUARD_LOG)
    kept = logger.handlers, logger.level, logger.propagate
    logger.handlers, logger.propagate = [Listener()], False
    logger.setLevel(logging.INFO)
    try:
        yield found
    finally:
        logger.handlers, _, logger.propagate = kept
        logger.setLevel(kept[1])


def _innermost(frames: list[tuple[str, int]]) -> str:
    own = [(file, line) for file, line in frames if _is_users(file)]
    if not own:
        return ""
    file, line = own[-1]
    text = linecache.getline(file, line).strip()
    return f" at {file}:{line}" + (f" ({text})" if text else "")


def _is_users(filename: str) -> bool:
    path = os.path.abspath(filename)
    if filename.startswith("<") or path.startswith(_OWN) or _SYMPY in path:
        return False
    return not path.startswith(_STANDARD) or "site-packages" in path
