"""Processes of this machine, as the ranks of a job see each other: who one is, and whether it still runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

PARENT = os.getppid()
"""Whoever started this process, as of the import of this module, which is before that of torch takes its seconds: a
launcher that dies meanwhile is missed all the same."""

_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")
"""Environment variables of launchers that live as long as their ranks. Ranks that were started by hand may outlive
the shell that did it."""

_ZOMBIE = ("Z", "X", "x")


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """One process of one machine, for as long as the machine is up."""

    host: str
    machine: str
    """Equal where two processes can see each other's process ids: boot and namespace."""
    pid: int
    started: str
    """In the machine's clock ticks, so that a process id that was given out again is another process."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_alive(self, seen_from: Identity) -> bool | None:
        """Return whether it runs, None where ``seen_from`` cannot tell: on another machine, or without ``/proc``."""
        if self.machine != seen_from.machine or not self.machine:
            return None
        try:
            found = _read_stat(self.pid)
        except OSError:  # no descriptor left, say: that tells nothing of the other process
            return None
        return found is not None and found[0] not in _ZOMBIE and found[1] == self.started


def identify() -> Identity:
    """Return this process."""
    try:
        found = _read_stat(os.getpid())
    except OSError:
        found = None
    return Identity(
        host=socket.gethostname(),
        machine="" if found is None else _machine(),
        pid=os.getpid(),
        started="" if found is None else found[1],
    )


def _machine() -> str:
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text(encoding="ascii").strip()
        return f"{boot}/{os.readlink('/proc/self/ns/pid')}"
    except OSError:
        return ""


def _read_stat(pid: int) -> tuple[str, str] | None:
    """Return state and start time of a process (proc_pid_stat(5), fields 3 and 22); None where there is none."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may hold anything
    return fields[0], fields[19]


def find_launcher() -> int | None:
    """Return the process id of the launcher without which this process must not go on; None where there is none."""
    return PARENT if any(name in os.environ for name in _LAUNCHERS) else None
