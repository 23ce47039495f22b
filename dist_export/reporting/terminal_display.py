"""Draw progress in the last line of a terminal, with rich."""

from __future__ import annotations

import contextlib
import sys
from collections.abc import Callable, Iterator
from typing import Any

from rich.console import Console
from rich.live import Live
from rich.progress import Progress, SpinnerColumn, TextColumn, TimeElapsedColumn
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from dist_export.reporting.moment import Moment, describe_moment, is_terminal
from dist_export.runtime.terminal import SCREEN

_DRAW_SECS = 0.2


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

    @property
    def can_draw(self) -> bool:
        """Whether the terminal can move its cursor; one with TERM=dumb cannot."""
        return self._console.is_interactive

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


@contextlib.contextmanager
def counting_rows() -> Iterator[Callable[[int], object]]:
    """Show how many rows are done, in a line of a terminal. Yields what is called with the rows of each batch."""
    columns = (SpinnerColumn(), TextColumn("{task.completed:,.0f} rows"), TimeElapsedColumn())
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not is_terminal(sys.stderr)) as shown:
        task = shown.add_task("", total=None)
        yield lambda rows: shown.advance(task, rows)
