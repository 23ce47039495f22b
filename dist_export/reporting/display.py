"""Show the progress of an export: one line that is redrawn on a terminal, or lines of the library's logger elsewhere."""

from __future__ import annotations

import contextlib
import logging
import sys
import threading
from collections import deque
from collections.abc import Callable, Iterable, Iterator
from typing import Any, NamedTuple, Protocol, cast

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dist_export.errors import printable
from dist_export.humanize import amount
from dist_export.runtime.terminal import ERASE_LINE, SCREEN

logger = logging.getLogger(__name__)

_LOG_SECS = 5.0
_DRAW_SECS = 0.2
_SPEED_SECS = 10.0
"""A speed is measured over this many seconds."""


class Moment(NamedTuple):
    """The state of an export at one moment. The bytes are those of all ranks."""

    stage: str
    step: str
    """The current step of the stage, as the ranks name it."""
    secs: float
    """Seconds since the stage began."""
    done: int = 0
    total: int = 0
    """Zero if no bytes are being moved."""
    speed: float = 0.0
    """Bytes a second; zero if none were moved recently."""


def describe_moment(moment: Moment) -> str:
    """Return a moment as text, without its bar."""
    if not moment.total:
        return f"{_describe_stage(moment)}, {_describe_secs(moment.secs)}"
    if moment.done >= moment.total:
        return f"shards: all {amount(moment.total)} done; {_describe_stage(moment)}, {_describe_secs(moment.secs)}"
    speed = ""
    if moment.speed:
        left = _describe_secs((moment.total - moment.done) / moment.speed)
        speed = f", {amount(round(moment.speed))}/s, {left} left"
    beside = "" if moment.stage == "transfer" else f"; {moment.stage}, {_describe_secs(moment.secs)}"
    return f"shards: {amount(moment.done)} of {amount(moment.total)}{speed}{beside}"


def _describe_stage(moment: Moment) -> str:
    if moment.total and moment.stage != "transfer":
        return moment.stage  # the step belongs to the transfer, which runs beside this stage
    return moment.step if moment.step.startswith(moment.stage) else f"{moment.stage}: {moment.step}"


def _describe_secs(secs: float) -> str:
    if secs < 60:
        return f"{secs:.0f} s"
    return f"{int(secs) // 60} min {int(secs) % 60} s"


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


class TerminalDisplay:
    """Draws moments in the last line of a terminal. Open and close it. In between, print other lines by :meth:`print_line`."""

    def __init__(self, stream: Any) -> None:
        self.wait_secs = _DRAW_SECS
        self._console = Console(file=stream)
        self._line = Table.grid(padding=(0, 1))
        self._live = Live(
            console=self._console,
            auto_refresh=False,
            transient=True,
            redirect_stdout=False,
            redirect_stderr=False,
            get_renderable=lambda: self._line,
        )

    def open(self) -> None:
        """Begin to draw."""
        self._live.start()
        self._console.show_cursor(True)  # otherwise a killed process would leave the terminal without a cursor
        SCREEN.has_bar = True

    def close(self) -> None:
        """Clear the line, and stop drawing."""
        SCREEN.has_bar = False
        self._live.stop()

    def show(self, moment: Moment) -> None:
        """Draw the moment."""
        if SCREEN.is_closed:
            return
        line = Table.grid(padding=(0, 1))
        text = Text(describe_moment(moment), no_wrap=True, overflow="ellipsis")
        if moment.total and moment.done < moment.total:
            line.add_row(ProgressBar(total=moment.total, completed=moment.done, width=24), text)
        else:
            line.add_row(text)
        self._line = line
        self._live.refresh()

    def print_line(self, line: str) -> None:
        """Write a line unchanged above the drawn one. Any thread."""
        self._console.print(Text(line), soft_wrap=True)


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
    if not _is_terminal(stream):
        yield LogDisplay() if rank == 0 else None
        return
    if rank:
        SCREEN.has_bar = world_size > 1  # it is never reset, because rank 0 may close its display last
        with _through_lines(_after_erasing(stream)):
            yield None
        return
    display = TerminalDisplay(stream)
    if not display._console.is_interactive:  # noqa: SLF001 -- a terminal that cannot move its cursor (TERM=dumb)
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


@contextlib.contextmanager
def counting_rows() -> Iterator[Callable[[int], object]]:
    """Show how many rows are done, in a line of a terminal. Yields what is called with the rows of each batch."""
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn())
    with Progress(
        *columns, console=Console(stderr=True), transient=True, disable=not _is_terminal(sys.stderr)
    ) as shown:
        task = shown.add_task("", total=None)
        yield lambda rows: shown.advance(task, rows)


def show_lines(lines: Iterable[str]) -> None:
    """Show the closing summary: on standard error if that is a terminal, else through the library's logger."""
    if not _is_terminal(sys.stderr):
        for line in lines:
            logger.info("%s", line)
        return
    with contextlib.suppress(OSError):  # the terminal is gone, but the package is complete
        sys.stderr.write("".join(f"{printable(line)}\n" for line in lines))


def _is_terminal(stream: Any) -> bool:
    """Return whether a stream is a terminal. Programs put all kinds of objects into ``sys.stderr``."""
    try:
        return bool(stream.isatty())
    except (AttributeError, ValueError):  # there is no stream or no such method, or the stream is closed
        return False


def _after_erasing(stream: Any) -> Callable[[str], None]:
    def print_line(line: str) -> None:
        stream.write(f"{ERASE_LINE}{line}\n")
        stream.flush()

    return print_line


@contextlib.contextmanager
def _through_lines(print_line: Callable[[str], None]) -> Iterator[None]:
    """Pass terminal output of ``sys.stdout``, ``sys.stderr`` and log handlers to ``print_line`` while the block runs."""
    before = {name: getattr(sys, name) for name in ("stdout", "stderr")}
    streams = {name: LineStream(stream, print_line) for name, stream in before.items() if _is_terminal(stream)}
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
