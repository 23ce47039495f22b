"""Show the progress of an export: one line that is redrawn on a terminal, or lines of the library's logger elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, Protocol, cast

from dist_export.errors import printable
from dist_export.reporting.moment import Moment, describe_moment, is_terminal
from dist_export.runtime.terminal import ERASE_LINE, SCREEN

logger = logging.getLogger(__name__)

_LOG_SECS = 5.0
_SPEED_SECS = 10.0
"""A speed is measured over this many seconds."""


class Speedometer:
    """Measures the bytes a second of the last few seconds."""

    def __init__(self) -> None:
        self._seen: deque[tuple[float, int]] = deque()

    def measure(self, now: float, done: int) -> float:
        """Return the speed after ``done`` bytes at ``now`` seconds; zero if it is not known, or nothing was moved."""
        self._seen.append((now, done))
        while len(self._seen) > 2 and now - self._seen[1][0] >= _SPEED_SECS:
            self._seen.popleft()
        begin, before = self._seen[0]
        return (done - before) / (now - begin) if now > begin else 0.0


class Display(Protocol):
    """Shows moments. Rank 0; one thread."""

    wait_secs: float
    """Seconds from one moment to the next."""

    def show(self, moment: Moment) -> None:
        """Show a moment instead of the previous one."""


class LogDisplay:
    """Writes a line to the library's logger if something changed since the last line."""

    def __init__(self) -> None:
        self.wait_secs = _LOG_SECS
        self._last: tuple[object, ...] = ()

    def show(self, moment: Moment) -> None:
        """Log the moment, unless only the time differs from the last line."""
        news = (moment.done, moment.total, moment.stage, moment.step)
        if news != self._last:
            self._last = news
            logger.info("%s", describe_moment(moment))


class LineStream:
    """Replaces a stream. It passes on whole lines until ``close_lines``, and then writes to the stream itself."""

    def __init__(self, stream: Any, print_line: Callable[[str], None]) -> None:
        self._stream = stream
        self._print_line: Callable[[str], None] | None = print_line
        self._rest = ""
        self._lock = threading.RLock()

    def write(self, text: str) -> int:
        """Pass on the lines that are now complete."""
        with self._lock:
            if self._print_line is None:
                return cast("int", self._stream.write(text))
            *lines, self._rest = (self._rest + text).split("\n")
            self._rest = _after_return(self._rest)
            for line in lines:
                self._print_line(_after_return(line))
        return len(text)

    def writelines(self, lines: Iterable[str]) -> None:
        """Write several texts."""
        for line in lines:
            self.write(line)

    def flush(self) -> None:
        """Flush the stream. An incomplete line still waits for its end."""
        self._stream.flush()

    def close_lines(self) -> None:
        """Write to the stream itself from now on, beginning with the incomplete line."""
        with self._lock:
            self._print_line = None
            self._stream.write(self._rest)
            self._rest = ""

    def __getattr__(self, name: str) -> Any:
        return getattr(self._stream, name)


def _after_return(line: str) -> str:
    """Return the text that a terminal shows for a line with carriage returns, such as that of another progress bar."""
    return line.rstrip("\r").rpartition("\r")[2]


@contextlib.contextmanager
def open_display(*, rank: int, world_size: int) -> Iterator[Display | None]:
    """Open the display of an export while the block runs. All ranks. Only rank 0 has a display; the others get None.

    On a terminal, everything that this process writes to standard output, standard error and log handlers goes above the
    drawn line. Output of other ranks on that terminal clears the line first.
    """
    stream = sys.stderr
    if not is_terminal(stream):
        yield LogDisplay() if rank == 0 else None
        return
    if rank:
        SCREEN.has_bar = world_size > 1  # it is never reset, because rank 0 may close its display last
        with _through_lines(_after_erasing(stream)):
            yield None
        return
    from dist_export.reporting.terminal_display import TerminalDisplay  # most exports draw nothing, and it loads rich

    display = TerminalDisplay(stream)
    if not display.can_draw:
        yield LogDisplay()
        return
    with _through_lines(display.print_line):
        with contextlib.suppress(OSError):  # an export does not fail because its terminal is gone
            display.open()
        try:
            yield display
        finally:
            with contextlib.suppress(OSError):
                display.close()


def show_lines(lines: Iterable[str]) -> None:
    """Show the closing summary: on standard error if that is a terminal, else through the library's logger."""
    if not is_terminal(sys.stderr):
        for line in lines:
            logger.info("%s", line)
        return
    with contextlib.suppress(OSError):  # the terminal is gone, but the package is complete
        sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))


def _after_erasing(stream: Any) -> Callable[[str], None]:
    def print_line(line: str) -> None:
        stream.write(f"{ERASE_LINE}{line}\n")
        stream.flush()

    return print_line


@contextlib.contextmanager
def _through_lines(print_line: Callable[[str], None]) -> Iterator[None]:
    """Pass terminal output of ``sys.stdout``, ``sys.stderr`` and log handlers to ``print_line`` while the block runs."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    streams = {name: LineStream(stream, print_line) for name, stream in before.items() if is_terminal(stream)}
    by_id = {id(before[name]): stream for name, stream in streams.items()}
    by_id |= {id(getattr(sys, f"__{name}__")): stream for name, stream in streams.items()}
    by_id.pop(id(None), None)
    handlers = [(handler, handler.stream) for handler in _list_handlers() if id(handler.stream) in by_id]
    for handler, stream in handlers:
        handler.setStream(by_id[id(stream)])
    for name, line_stream in streams.items():
        setattr(sys, name, line_stream)
    try:
        yield
    finally:
        for name, line_stream in streams.items():
            if getattr(sys, name) is line_stream:
                setattr(sys, name, before[name])
            line_stream.close_lines()
        for handler, stream in handlers:
            if isinstance(handler.stream, LineStream):
                handler.setStream(stream)


def _list_handlers() -> list[logging.StreamHandler[Any]]:
    """Return the handlers of all loggers that write to a stream, each once."""
    known = [logging.root, *logging.root.manager.loggerDict.values()]
    handlers = [handler for each in known if isinstance(each, logging.Logger) for handler in each.handlers]
    return list({id(handler): handler for handler in handlers if isinstance(handler, logging.StreamHandler)}.values())
