"""What a process writes before a line if a progress bar may be drawn. This module does not need rich: see watchdog.py."""

from __future__ import annotations

ERASE_LINE = "\r\x1b[2K"
"""Go to the first column and clear the line (ECMA-48, EL 2). The bar is one line, and its process draws it again."""


class Screen:
    """Whether standard error is a terminal with a bar. One object for the process; any thread."""

    def __init__(self) -> None:
        self.has_bar = False
        """The last line may hold a bar of this process, or of a rank 0 that shares the terminal."""
        self.is_closed = False
        """No more bars are drawn, because this process ends."""

    def prefix(self) -> str:
        """Return the prefix that keeps a line of text apart from a bar."""
        return ERASE_LINE if self.has_bar else ""

    def close(self) -> str:
        """Stop all drawing of bars; return the prefix of this process's last message."""
        self.is_closed = True
        return self.prefix()


SCREEN = Screen()
