"""A terminal for tests: a command runs on a real pty, and what it would show is worked out line by line."""

from __future__ import annotations

import contextlib
import os
import pty
import re
import select
import subprocess
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path

from tests.support.distributed import warm_torchrun

_TOKEN = re.compile(r"\x1b\[([?\d;]*)([A-Za-z])|([\r\n])|([^\x1b\r\n]+)")


class Screen:
    """What a terminal without an end shows: lines of any length, and a cursor. Escapes that it does not know are errors."""

    def __init__(self) -> None:
        self.lines = [""]
        self.row = self.column = 0

    def feed(self, text: str) -> None:
        position = 0
        while position < len(text):
            token = _TOKEN.match(text, position)
            assert token is not None, repr(text[position : position + 20])
            position = token.end()
            argument, command, control, plain = token.groups()
            if control == "\r":
                self.column = 0
            elif control == "\n":
                self.row += 1
                self.lines += [""] * (self.row + 1 - len(self.lines))
            elif plain is not None:
                line = self.lines[self.row].ljust(self.column)
                self.lines[self.row] = line[: self.column] + plain + line[self.column + len(plain) :]
                self.column += len(plain)
            elif command == "K" and argument == "2":
                self.lines[self.row] = ""
            elif command == "A":
                self.row -= int(argument or 1)
            else:
                assert command in "mhl", repr(token[0])


class Terminal:
    """A command on a pty of its own; ``stdout`` may go elsewhere. With ``warm_launcher``, torchrun from the warm pool."""

    def __init__(
        self,
        command: Sequence[str],
        *,
        cwd: Path,
        env: Mapping[str, str] | None = None,
        stdout: int | None = None,
        warm_launcher: bool = False,
    ) -> None:
        self._reader, writer = pty.openpty()
        settings = {"TERM": "xterm-256color", "COLUMNS": "120", **(os.environ if env is None else env)}
        for name in ("NO_COLOR", "FORCE_COLOR", "TTY_COMPATIBLE", "TTY_INTERACTIVE"):
            settings.pop(name, None)
        self.process: subprocess.Popen[bytes] | warm_torchrun.Launcher
        if warm_launcher:
            self.process = warm_torchrun.Launcher(command[3:], settings, terminal=os.ttyname(writer))
        else:
            self.process = subprocess.Popen(
                command, cwd=cwd, env=settings, stdin=writer, stdout=writer if stdout is None else stdout, stderr=writer,
                start_new_session=True,
            )  # fmt: skip
        os.close(writer)
        self.raw = ""

    def read_until(self, is_enough: Callable[[str], bool], *, secs: float = 120.0) -> str:
        """Read until what came is enough, or the command has ended; return all of it."""
        deadline = time.monotonic() + secs
        while not is_enough(self.raw):
            assert time.monotonic() < deadline, self.raw
            if select.select([self._reader], [], [], 0.1)[0]:
                try:
                    piece = os.read(self._reader, 1 << 16)
                except OSError:  # nobody has the other end any more
                    break
                if not piece:
                    break
                self.raw += piece.decode(errors="replace")
        return self.raw

    def read_lines(self) -> list[str]:
        """Wait for the end; return the lines that a user sees then."""
        self.read_until(lambda _: False)
        self.process.wait(60)
        screen = Screen()
        screen.feed(self.raw)
        return [line.rstrip() for line in screen.lines]

    def interrupt(self) -> None:
        """Press Ctrl-C: the kernel sends SIGINT to all processes of the terminal's foreground."""
        os.killpg(self.process.pid, 2)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(self.process.pid, 9)
        self.process.wait(60)
        os.close(self._reader)
