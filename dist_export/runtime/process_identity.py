"""Identify processes, so that a rank can find out whether another rank still runs."""

from __future__ import annotations

import os
import socket
from pathlib import Path

import msgspec

PARENT = os.getppid()
"""The parent process when this module was imported. That is before the seconds that importing torch takes, so a
launcher that dies in that time is noticed too."""

_LAUNCHERS = ("TORCHELASTIC_RUN_ID", "SLURM_PROCID")
"""Environment variables of launchers that live as long as their ranks. Ranks that a person started by hand may outlive
their shell."""

_ZOMBIE = ("Z", "X", "x")


class Identity(msgspec.Struct, frozen=True, kw_only=True):
    """One process of one machine, valid until the machine restarts."""

    host: str
    machine: str
    """Boot id and process namespace. It is equal if two processes can see each other's process ids."""
    pid: int
    started: str
    """Start time in the machine's clock ticks, so that a process with a reused process id is a different one."""

    def __str__(self) -> str:
        return f"process {self.pid} on {self.host}"

    def is_alive(self, seen_from: Identity) -> bool | None:
        """Return whether it runs; None if ``seen_from`` is on another machine or has no ``/proc``."""
        if self.machine != seen_from.machine or not self.machine:
            return None
        try:
            found = _read_stat(self.pid)
        except OSError:  # for example no free descriptor, which says nothing about the other process
            return None
        return found is not None and found[0] not in _ZOMBIE and found[1] == self.started


def identify() -> Identity:
    """Return the identity of this process."""
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
    """Return state and start time of a process (proc_pid_stat(5), fields 3 and 22); None if there is no such process."""
    try:
        text = Path(f"/proc/{pid}/stat").read_text(encoding="utf-8", errors="replace")
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = text.rpartition(")")[2].split()  # the name before it may contain anything
    return fields[0], fields[19]


def find_launcher() -> int | None:
    """Return the process id of the launcher without which this process must not go on; None if there is no launcher."""
    return PARENT if any(name in os.environ for name in _LAUNCHERS) else None
