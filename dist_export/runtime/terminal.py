"""What a process writes ahead of a line where a progress bar may be drawn. It needs nothing of rich: see watchdog.py."""

from __future__ import annotations

ERASE_LINE = "\r\x1b[2K"
"""To the first column, and clear the line (ECMA-48, EL 2). The bar is one line, and whoever drew it draws it again."""


class Screen:
    """Whether standard error is a terminal with a bar. One for the process; any thread."""

    def __init__(self) -> None:
        self.has_bar = False
        """A bar may be in the last line: that of this process, or of the rank 0 that has the same terminal."""
        self.is_closed = False
        """No bar is drawn any more: this process ends."""

    def prefix(self) -> str:
        """Return what goes ahead of a line of text, so that it is not glued to a bar."""
        return ERASE_LINE if self.has_bar else ""

    def close(self) -> str:
        """Let no bar be drawn any more; return what goes ahead of the last words of this process."""
        self.is_closed = True
        return self.prefix()


SCREEN = Screen()
