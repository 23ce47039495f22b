"""What the command line prints: logs, lines and JSON, with foreign names made printable."""

from __future__ import annotations

import logging
import os
import sys
from collections.abc import Iterable

from dist_export.errors import printable


def configure_logging() -> None:
    """Let the library's log go to standard error: all of rank 0's, errors of the others."""
    rank = os.environ.get("RANK", "0")
    level = logging.INFO if rank == "0" else logging.ERROR
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(_OneLine(f"%(asctime)s rank {rank} %(stage)s%(message)s", datefmt="%H:%M:%S"))
    handler.addFilter(_name_stage)
    logging.basicConfig(level=level, handlers=[handler])
    for noisy in ("torch", "fsspec", "asyncio", "s3fs", "aiobotocore", "botocore", "aiohttp", "urllib3"):
        logging.getLogger(noisy).setLevel(logging.WARNING)


def _name_stage(record: logging.LogRecord) -> bool:
    """Add the stage of the export to a log record. The line at the end of a stage names it itself."""
    from dist_export.runtime.io_activity import current_stage

    stage = current_stage()
    record.stage = f"[{stage}] " if stage else ""
    return True


class _OneLine(logging.Formatter):
    """Makes messages printable, because they may quote foreign names. A traceback keeps its lines."""

    def formatMessage(self, record: logging.LogRecord) -> str:  # noqa: N802 -- logging's name
        return printable(super().formatMessage(record))


def print_lines(lines: Iterable[str]) -> None:
    """Print lines that may contain foreign names, each of them as one line."""
    for line in lines:
        print(printable(line))


def print_now(line: str) -> None:
    """Print one line that a reader gets at once, also through a pipe."""
    print(printable(line), flush=True)


def print_json(value: object) -> None:
    """Print a value as indented JSON, in which every character can be printed."""
    import msgspec

    text = msgspec.json.format(msgspec.json.encode(value), indent=2).decode()
    # JSON is printable except in its texts, where an escape means the same character
    print("\n".join(line if line.isprintable() else _escape(line) for line in text.split("\n")))


def _escape(line: str) -> str:
    import json

    return "".join(c if c.isprintable() else json.dumps(c)[1:-1] for c in line)
